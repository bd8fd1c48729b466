"""A tiny world for end-to-end tests: coloured shapes with captions, ingested by the real program, and the programs as a user runs
them."""

import colorsys
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mining import PairTable
from tests.tar_shards import ingest, sample, write_tar
from train.data.pair_store import PairStore

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("square", "circle", "triangle", "cross")
TINY_MODEL = "pocket-rn"
# Without BatchNorm and dropout: then a micro-batch changes nothing but the order of sums, and weights may be bfloat16.
TINY_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 8192, "width": 32, "heads": 2, "layers": 2},
}


def drawing(shape: str, hue: int, size: int = 40) -> bytes:
    """One coloured shape as PNG bytes; `hue` in 0..35."""
    image = Image.new("RGB", (size, size), "white")
    color = tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue / 36, 0.9, 0.8))
    draw, low, high = ImageDraw.Draw(image), size // 5, size - size // 5
    if shape == "square":
        draw.rectangle((low, low, high, high), fill=color)
    elif shape == "circle":
        draw.ellipse((low, low, high, high), fill=color)
    elif shape == "triangle":
        draw.polygon(((low, high), (high, high), (size // 2, low)), fill=color)
    else:
        draw.line((low, low, high, high), fill=color, width=5)
        draw.line((low, high, high, low), fill=color, width=5)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, num_hues: int = 24) -> None:
    """Shards of unequal size holding every shape in every hue; 4 * num_hues pairs with different captions."""
    pairs = [(shape, hue) for hue in range(num_hues) for shape in SHAPES]
    cut = len(pairs) * 2 // 3
    for number, part in enumerate((pairs[:cut], pairs[cut:])):
        members = []
        for index, (shape, hue) in enumerate(part):
            key = f"{number * 1000 + index:06d}"
            members += sample(key, f"{shape} of hue {hue}", drawing(shape, hue), extension="png")
        write_tar(folder / f"{number:05d}.tar", members)


def tiny_store(folder: Path, num_hues: int = 24) -> PairStore:
    write_shards(folder / "shards", num_hues)
    return ingest(str(folder / "shards" / "*.tar"), folder / "store")


def tiny_table(folder: Path, store: PairStore, k: int = 6) -> PairTable:
    """Neighbours in pair_id order as hard pairs: what matters in these tests is which ids they are, not how they were found."""
    num_pairs = len(store)
    pair_ids = (np.arange(num_pairs)[:, None] + 1 + np.arange(k)) % num_pairs
    similarity = np.tile(np.linspace(0.9, 0.5, k), (num_pairs, 1))
    return PairTable.write(folder, pair_ids, similarity, similarity, store_fingerprint=store.fingerprint)


def program(*command: str, timeout: float = 300, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command from the repository's root as a user would, on the CPU, and return its output."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=program_environment(**environment),
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


def program_environment(**changes: str) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **changes}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def deepspeed(num_ranks: int, *arguments: str) -> list[str]:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(num_ranks), "--master_port", str(free_port()), *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training_flags(
    store: str | Path, out: str | Path, ds_config: str | Path = "ds_configs/cpu.json", **flags: object
) -> Sequence[str]:
    """Flags of a short run of the tiny model; keywords name further flags, `data__pairs` stands for --data.pairs."""
    settings = {
        "data.store": store,
        "out": out,
        "ds_config": ds_config,
        "device": "cpu",
        "batch_size": 16,
        "log_every_steps": 1,
    }
    settings.update({name.replace("__", "."): value for name, value in flags.items()})
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def write_stages(folder: Path, **more: object) -> None:
    """stage_0.json to stage_3.json: DeepSpeed JSONs that differ in nothing but the ZeRO stage."""
    for stage in range(4):
        config = {"zero_optimization": {"stage": stage}, **more}
        (folder / f"stage_{stage}.json").write_text(json.dumps(config), encoding="utf-8")


def train_here(rank: int, world_size: int, flags: Sequence[str], recipe: str = "pocket-pretrain") -> None:
    """A run of a recipe in this process, a rank of an existing group."""
    from train.distributed import Ranks
    from train.loop import train
    from train.main import parse_config

    # What the launcher says, and DeepSpeed reads.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    train(parse_config(recipe, list(flags)), recipe, ranks)
