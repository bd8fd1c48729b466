"""The training split's features, kept in the run folder between evaluations of the same checkpoint.

One file per data set, replaced when the checkpoint, the preprocessing or a shard changes, so the cache never grows.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mining.manifest import fingerprint, write_json_atomically
from train.evaluate.data import Source
from train.evaluate.features import EncodedSet, Encoder, encode_source
from train.models.model import CONFIG_FILE

CACHE_VERSION = 1


def encode_with_cache(
    encoder: Encoder, source: Source, keep_fields: frozenset[str], folder: Path, *, title: str
) -> EncodedSet:
    """`encode_source`, or what an earlier call stored in `folder` for the same checkpoint, files and fields."""
    stem = f"features_{fingerprint(source.format, list(source.locations), source.train_split)[:12]}"
    wanted = cache_key(encoder, source, keep_fields)
    found = read_cache(folder, stem, wanted)
    if found is None:
        found = encode_source(encoder, source, keep_fields, title=title)
        write_cache(folder, stem, wanted, found, keep_fields)
    return found


def cache_key(encoder: Encoder, source: Source, keep_fields: frozenset[str]) -> str:
    loaded = encoder.loaded
    # The hash of a published file says what it means.
    config = (loaded.source / CONFIG_FILE).read_bytes() if loaded.source.is_dir() else loaded.name
    return fingerprint(CACHE_VERSION, loaded.checkpoint_hash, config, source.identity(), sorted(keep_fields))


def read_cache(folder: Path, stem: str, wanted: str) -> EncodedSet | None:
    # The JSON is written last and names the key, so a kill between the two files leaves a cache that is not used.
    description, array = folder / f"{stem}.json", folder / f"{stem}.npy"
    if not description.is_file() or not array.is_file():
        return None
    content: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
    if content["key"] != wanted:
        return None
    return EncodedSet(torch.from_numpy(np.load(array)), content["keys"], content["shards"], content["fields"])


def write_cache(folder: Path, stem: str, key: str, encoded: EncodedSet, keep_fields: frozenset[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").unlink(missing_ok=True)
    save_array_atomically(folder / f"{stem}.npy", encoded.image_ND.numpy())
    fields = [{name: row[name] for name in keep_fields if name in row} for row in encoded.fields]
    description = {"key": key, "keys": encoded.keys, "shards": encoded.shards, "fields": fields}
    write_json_atomically(folder / f"{stem}.json", description)


def save_array_atomically(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
