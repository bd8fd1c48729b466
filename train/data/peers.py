"""open_clip's WebDataset pipeline as its trainer builds it: what `train.data.bench` and `train.bench`
measure against, imported here alone.

In: tars, a transform of PIL pictures, a tokenizer. Out: its batches (pictures, tokens).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from webdataset.tariterators import tar_file_expander


def open_clip_data(
    tars: Sequence[str],
    *,
    num_samples: int,
    batch_size: int,
    workers: int,
    seed: int,
    transform: Callable[[Any], torch.Tensor],
    tokenizer: Callable[[str], torch.Tensor],
    world_size: int = 1,
) -> Any:
    """`open_clip_train.data.get_wds_dataset` with the settings of a training run; batch_size: of a rank."""
    arguments = argparse.Namespace(
        train_data="::".join(tars),
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch_size,
        workers=workers,
        world_size=world_size,
        seed=seed,
    )
    return _open_clip_data().get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)


def open_clip_train_one_epoch() -> Callable[..., None]:
    """Its trainer's loop over an epoch."""
    from open_clip_train.train import train_one_epoch

    return train_one_epoch


def _open_clip_data() -> ModuleType:
    # It reads CSV files with pandas, which it imports in any case and which this project does not have.
    placeholder = "pandas" not in sys.modules and find_spec("pandas") is None
    if placeholder:
        sys.modules["pandas"] = ModuleType("pandas")
    try:
        from open_clip_train import data
    finally:
        if placeholder:
            del sys.modules["pandas"]
    # It is written for webdataset before 0.2.96, which marks no ends of tars in the stream (webdataset issue 384).
    data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    return data
