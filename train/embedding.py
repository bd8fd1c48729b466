"""The work of `train.embed`: every pair of a store through both towers.

Ranks take blocks of pairs in turn, so an interrupted run goes on with the blocks that are missing. Out: an EmbeddingStore with the
pairs' duplicate groups inside, which is all that mining needs.

Shape letters: B rows of a block, N pairs, L text tokens, D embedding.
"""

import io
import os
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mining import EmbeddingStore
from mining.embedding_store import EmbeddingWriter
from mining.stopping import end_with_parent
from train.data.pair_store import PairStore
from train.distributed import Ranks, barrier
from train.embed import EmbedConfig
from train.models.model import LoadedModel, attention_for, load_model
from train.supervision.phases import Phases

ROWS_COPIED = 65536
PAIRS_COMPARED = 32
# Another batch size or device rounds otherwise, by far less than two pictures differ.
SAME_DISTANCE = 0.01


class BlockDataset(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """Item b: the pairs of block b as (first pair id, images float [B, 3, H, W], tokens int64 [B, L])."""

    def __init__(self, store: PairStore, loaded: LoadedModel, blocks: Sequence[range]) -> None:
        self.store, self.blocks = store, blocks
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        samples = [self.store[pair_id] for pair_id in self.blocks[index]]
        images = torch.stack(
            [self.preprocess(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples]
        )
        return self.blocks[index].start, images, self.tokenizer([sample.caption for sample in samples])


def embed(config: EmbedConfig, store: PairStore, ranks: Ranks, phases: Phases | None = None) -> None:
    """Write the EmbeddingStore; `phases` hears block by block where this rank is. Collective: every rank calls."""
    phases = phases or Phases()
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load_model(config.checkpoint, ranks.device, name=config.model_name)
    if finished(config, store, loaded):
        if ranks.is_main:
            print(f"{config.out} is complete already")
        return
    # Rank 0 creates the folder, the others join it.
    if ranks.is_main:
        writer = open_writer(config, store, loaded)
        if config.extend:
            take_over(writer, EmbeddingStore.open(config.extend), store, loaded)
    barrier()
    if not ranks.is_main:
        writer = open_writer(config, store, loaded)
    first = len(EmbeddingStore.open(config.extend)) if config.extend else 0
    blocks = [
        range(start, min(start + config.batch_size, len(store)))
        for start in range(first, len(store), config.batch_size)
    ]
    missing = [block for block in blocks if not writer.rows_done[block.start : block.stop].all()]
    barrier()  # every rank has read what is done before any rank adds to it, so that all share out the same list
    dataset = BlockDataset(store, loaded, missing[ranks.rank :: ranks.world_size])
    bar = tqdm(
        total=len(store),
        initial=int(writer.rows_done.sum()),
        desc="embed",
        unit="pair",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        file=sys.stderr,
        disable=not ranks.is_main,
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=config.workers, worker_init_fn=end_with_parent)
    for block, (start, images, tokens) in enumerate(loader, start=1):
        phases.begin_step(block)
        image_BD, text_BD = features(loaded, images.to(ranks.device), tokens.to(ranks.device))
        writer.write_rows(
            start, image_BD, text_BD, (image_BD * text_BD).sum(1) if image_BD.shape == text_BD.shape else None
        )
        # Rank 0's share stands for everybody's.
        bar.update(min(len(images) * ranks.world_size, len(store) - bar.n))
    bar.close()
    barrier()
    if ranks.is_main:
        finished_store = writer.finish()
        print(f"embedded {len(finished_store)} pairs into {config.out}")
    barrier()


def open_writer(config: EmbedConfig, store: PairStore, loaded: LoadedModel) -> EmbeddingWriter:
    width = embedding_width(loaded)
    return EmbeddingStore.writer(
        config.out,
        len(store),
        width,
        width,
        has_alignment=True,
        image_group_N=store.image_group_N,
        caption_group_N=store.caption_group_N,
        encoder=loaded.name,
        checkpoint_hash=loaded.checkpoint_hash,
        store_fingerprint=store.fingerprint,
    )


def take_over(writer: EmbeddingWriter, old: EmbeddingStore, store: PairStore, loaded: LoadedModel) -> None:
    """Copy the rows of `old` as the first rows of the new store.

    Raises ValueError unless `old` was made by this model and, as far as some of its pairs tell, of the pairs that come first in `store`.
    """
    if old.manifest.get("checkpoint_hash") != loaded.checkpoint_hash:
        raise ValueError(
            f"{old.path} holds the embeddings of another checkpoint; embed the whole store without --extend"
        )
    if len(old) > len(store):
        raise ValueError(f"{old.path} has {len(old)} pairs, {store.path} only {len(store)}: the store did not grow")
    check_same_pairs(old, store, loaded)
    for start in range(0, len(old), ROWS_COPIED):
        rows = slice(start, min(start + ROWS_COPIED, len(old)))
        # A row without a valid embedding goes in as it came the first time.
        lost_B1 = ~np.asarray(old.valid_N[rows])[:, None]
        towers = (np.where(lost_B1, np.float16("nan"), tower_ND[rows]) for tower_ND in (old.image_ND, old.text_ND))
        writer.write_rows(start, *towers, np.asarray(old.alignment_N[rows]))


def check_same_pairs(old: EmbeddingStore, store: PairStore, loaded: LoadedModel) -> None:
    """Embed some pairs of `old` anew; ids that moved would name other pairs."""
    ids = [int(pair_id) for pair_id in np.unique(np.linspace(0, len(old) - 1, PAIRS_COMPARED).astype(int))]
    device = loaded.model.logit_scale.device
    for pair_id in ids:
        if not old.valid_N[pair_id]:
            continue
        _, images, tokens = BlockDataset(store, loaded, [range(pair_id, pair_id + 1)])[0]
        for tower, now_1D in zip(
            (old.image_ND, old.text_ND), features(loaded, images.to(device), tokens.to(device)), strict=True
        ):
            if not np.linalg.norm(now_1D[0] - tower[pair_id]) < SAME_DISTANCE:
                raise ValueError(
                    f"pair {pair_id} of {store.path} is not the one that {old.path} was made of: pairs were not only added at the end; "
                    "embed the whole store without --extend"
                )


def embedding_width(loaded: LoadedModel) -> int:
    with torch.inference_mode():
        device = loaded.model.logit_scale.device
        return loaded.model.encode_text(loaded.tokenizer(["width"]).to(device)).shape[1]


def finished(config: EmbedConfig, store: PairStore, loaded: LoadedModel) -> bool:
    """True when `out` is this store under this model already; ValueError when it is a finished store of anything else."""
    if not os.path.isfile(os.path.join(config.out, "manifest.json")):
        return False
    manifest = EmbeddingStore.open(config.out).manifest
    for name, expected in (("store_fingerprint", store.fingerprint), ("checkpoint_hash", loaded.checkpoint_hash)):
        if manifest.get(name) != expected:
            raise ValueError(
                f"{config.out} holds the embeddings of another {name.split('_')[0]}; give another --out or delete the folder"
            )
    return True


@torch.inference_mode()
def features(loaded: LoadedModel, images: torch.Tensor, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float32 [B, D] of both towers."""
    with attention_for(images.device):
        image_BD = loaded.model.encode_image(images, normalize=True)
        text_BD = loaded.model.encode_text(tokens, normalize=True)
    return image_BD.float().cpu().numpy(), text_BD.float().cpu().numpy()
