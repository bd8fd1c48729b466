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
from train.data.pair_store import PairStore
from train.distributed import Ranks, barrier
from train.embed import EmbedConfig
from train.model import LoadedModel, attention_for, load_model


class BlockDataset(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    """Item b: the pairs of block b as (first pair id, images float [B, 3, H, W], tokens int64 [B, L])."""

    def __init__(self, store: PairStore, loaded: LoadedModel, blocks: Sequence[int], block_size: int) -> None:
        self.store, self.blocks, self.block_size = store, blocks, block_size
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        start = self.blocks[index] * self.block_size
        samples = [self.store[pair_id] for pair_id in range(start, min(start + self.block_size, len(self.store)))]
        images = torch.stack(
            [self.preprocess(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples]
        )
        return start, images, self.tokenizer([sample.caption for sample in samples])


def embed(config: EmbedConfig, store: PairStore, ranks: Ranks) -> None:
    """Write the EmbeddingStore. Collective: every rank calls."""
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load_model(config.checkpoint, ranks.device)
    if finished(config, store, loaded):
        if ranks.is_main:
            print(f"{config.out} is complete already")
        return
    # Rank 0 creates the folder, the others join it.
    if ranks.is_main:
        writer = open_writer(config, store, loaded)
    barrier()
    if not ranks.is_main:
        writer = open_writer(config, store, loaded)
    num_blocks = -(-len(store) // config.batch_size)
    missing = [
        b for b in range(num_blocks) if not writer.rows_done[b * config.batch_size : (b + 1) * config.batch_size].all()
    ]
    barrier()  # every rank has read what is done before any rank adds to it, so that all share out the same list
    dataset = BlockDataset(store, loaded, missing[ranks.rank :: ranks.world_size], config.batch_size)
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
    for start, images, tokens in DataLoader(dataset, batch_size=None, num_workers=config.workers):
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


def open_writer(config: EmbedConfig, store: PairStore, loaded: LoadedModel):
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
