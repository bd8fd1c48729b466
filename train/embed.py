"""The program `deepspeed --module train.embed --checkpoint runs/a --store data/cc12m --out embeddings/a`: a PairStore's embeddings."""

import os

# DeepSpeed's launcher says LOCAL_SIZE, MosaicML Streaming reads LOCAL_WORLD_SIZE when it is imported (streaming issue 717).
os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mining.command_line import parse
from mining.stopping import run_stoppable
from train.data.pair_store import PairStore

PROGRAM = "train.embed"


@dataclass(frozen=True)
class EmbedConfig:
    """Embed every pair of a store."""

    checkpoint: str
    """run folder, checkpoint folder or export folder of the model, or a file of published weights (open_clip, OpenAI, SLIP, LaCLIP,
    CLIP-rocket, DeCLIP)"""
    store: str
    """PairStore folder, or the URL of one in remote storage"""
    out: str
    """EmbeddingStore folder to write; an interrupted one goes on"""
    cache: str = ""
    """folder that keeps what is fetched of a remote store"""
    extend: str = ""
    """EmbeddingStore of the store as it was before it grew: its rows are taken over byte for byte, only new pairs are embedded (what
    `mining.main append` needs)"""
    batch_size: int = 256
    """pairs in a block: the unit of work and of resuming"""
    workers: int = 0
    """data loading processes of each rank"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPUs when there are any"""
    model_name: str = ""
    """of a file of published weights: its architecture, where the weights alone don't say (as --model.name in training)"""
    threads: int = 0
    """CPU threads of each rank; 0 leaves the choice to torch"""
    hang_timeout_s: float = 900.0
    """end the job (exit code 86) when no rank makes progress for so long"""


def main(arguments: Sequence[str]) -> None:
    config = parse(EmbedConfig, program=PROGRAM, description="Embed every pair of a PairStore.", arguments=arguments)
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size} must be at least 1")
    if not config.hang_timeout_s > 0:
        raise ValueError(f"hang_timeout_s={config.hang_timeout_s} must be positive seconds")
    if not Path(config.checkpoint).exists():
        raise ValueError(
            f"{config.checkpoint} is not there; --checkpoint takes a run, one of its checkpoints, an export or a file of published weights"
        )
    store = PairStore.open(config.store, cache=config.cache or None)
    # Imported here: torch and open_clip take seconds, which a mistake in a flag need not wait for.
    from train.distributed import connected
    from train.embedding import embed
    from train.supervision.phases import Phases
    from train.supervision.supervisor import supervised

    with connected(config.device) as ranks, supervised(ranks, Phases(), config.hang_timeout_s, saves=False) as watched:
        embed(config, store, ranks, watched.phases)


if __name__ == "__main__":
    run_stoppable(main)
