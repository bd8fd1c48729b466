"""Encode a data set once: pictures and texts become unit rows on the CPU that every task shares.

Legend: N pictures, M texts, D embedding, C H W image.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train.evaluate.data import Sample, Source
from train.models.model import LoadedModel, attention_for


@dataclass(frozen=True)
class Encoder:
    """A model with how to run it: `batch_size` rows a forward pass, `num_workers` threads that decode pictures.

    strong: a StrongModel (strong_views.py) for checkpoints with strong embeddings beside the weak ones, which are measured together then.
    """

    loaded: LoadedModel
    device: str = "cpu"
    batch_size: int = 256
    num_workers: int = 2
    strong: Any = None

    def encode_images(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Weak unit rows, and strong ones where there are any."""
        if self.strong is not None:
            return self.strong.encode_images(image_BCHW)
        return (self.loaded.model.encode_image(image_BCHW, normalize=True),)


@dataclass(frozen=True)
class EncodedSet:
    """image_ND: float32 unit rows on the CPU; keys, shards, fields: of the same N samples, in the same order.

    strong_NE: strong unit rows of an encoder that has them.
    """

    image_ND: Tensor
    keys: list[str]
    shards: list[str]
    fields: list[dict[str, Any]]
    strong_NE: Tensor | None = None

    def values(self, key: str) -> list[Any]:
        """Field `key` of every sample. Raises ValueError naming the first sample without it and the fields it has."""
        missing = next((row for row, fields in enumerate(self.fields) if key not in fields), None)
        if missing is not None:
            have = ", ".join(sorted(self.fields[missing])) or "none"
            where = f"{self.shards[missing]}: sample {self.keys[missing]}"
            raise ValueError(f"{where} has no field {key!r} (it has: {have}); correct class_key, caption_key or within")
        return [fields[key] for fields in self.fields]


def progress_bar(title: str, total: int | None, unit: str) -> tqdm:
    # Nothing left to do shows no bar.
    hidden = total == 0
    return tqdm(
        disable=hidden, total=total, desc=title, unit=unit, unit_scale=True, dynamic_ncols=True, mininterval=0.5
    )


@contextmanager
def inference(device: str) -> Iterator[None]:
    with torch.inference_mode(), attention_for(torch.device(device)):
        yield


def encode_source(encoder: Encoder, source: Source, keep_fields: frozenset[str] | None, *, title: str) -> EncodedSet:
    """Encode every picture of `source`, keeping of each sample's fields those in `keep_fields` (None: all names known).

    Raises ValueError naming the sample when a picture cannot be decoded, and when there is no sample at all.
    """
    blocks, keys, shards, kept = [], [], [], []
    with progress_bar(title, source.count(), "image") as progress, inference(encoder.device):
        for samples, image_BCHW in decoded_batches(encoder, source.samples()):
            blocks.append([rows.float().cpu() for rows in encoder.encode_images(image_BCHW.to(encoder.device))])
            keys.extend(sample.key for sample in samples)
            shards.extend(sample.shard for sample in samples)
            kept.extend(keep(sample.fields, keep_fields) for sample in samples)
            progress.update(len(samples))
    if not keys:
        raise ValueError(f"{', '.join(source.locations)} holds no samples")
    image_ND, *strong = (checked(torch.cat(rows), f"pictures of {title}") for rows in zip(*blocks, strict=True))
    return EncodedSet(image_ND, keys, shards, kept, *strong)


def keep(fields: dict[str, Any], names: frozenset[str] | None) -> dict[str, Any]:
    # The names stay, so that an error can list them; the values of long metadata do not.
    return fields if names is None else {name: value if name in names else None for name, value in fields.items()}


def decoded_batches(encoder: Encoder, samples: Iterator[Sample]) -> Iterator[tuple[list[Sample], Tensor]]:
    """Batches of samples with their [B, C, H, W] pictures; threads decode the next batch while the model runs."""
    with ThreadPoolExecutor(max(1, encoder.num_workers)) as pool:

        def start(batch: list[Sample]) -> list[Future]:
            return [pool.submit(decode, sample, encoder.loaded.preprocess) for sample in batch]

        batch = list(islice(samples, encoder.batch_size))
        pending = start(batch)
        while batch:
            upcoming = list(islice(samples, encoder.batch_size))
            upcoming_pending = start(upcoming)
            yield batch, torch.stack([future.result() for future in pending])
            batch, pending = upcoming, upcoming_pending


def decode(sample: Sample, preprocess: Any) -> Tensor:
    source = io.BytesIO(sample.image) if isinstance(sample.image, bytes) else sample.image
    try:
        if isinstance(source, Image.Image):
            return preprocess(source)
        assert isinstance(source, io.BytesIO | Path), "data.py yields bytes, a path or a picture"
        with Image.open(source) as image:
            return preprocess(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{sample.shard}: sample {sample.key} cannot be decoded ({error})") from error


def encode_texts(encoder: Encoder, texts: Sequence[str], *, title: str) -> Tensor:
    """[M, D] float32 unit rows on the CPU; texts longer than the model's context are cut by its tokenizer."""
    blocks = []
    with progress_bar(title, len(texts), "text") as progress, inference(encoder.device):
        for start in range(0, len(texts), encoder.batch_size):
            tokens_BL = encoder.loaded.tokenizer(list(texts[start : start + encoder.batch_size])).to(encoder.device)
            blocks.append(encoder.loaded.model.encode_text(tokens_BL, normalize=True).float().cpu())
            progress.update(len(tokens_BL))
    return checked(torch.cat(blocks), title)


def checked(features_ND: Tensor, what: str) -> Tensor:
    """Return the features. Raises ValueError when some are not finite: comparisons with NaN would count as hits."""
    broken = int((~torch.isfinite(features_ND).all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(features_ND)} feature rows ({what}) are not finite; the checkpoint has diverged"
        )
    return features_ND
