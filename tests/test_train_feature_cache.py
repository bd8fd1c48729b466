"""Feature-cached steps: the weights of one big batch, whatever the micro-batch, the ZeRO stage and the number of ranks."""

import json
import os
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, tiny_table, train_here, training_flags, write_stages

DROPPING_MODEL = {**TINY_VIT, "vision_cfg": {**TINY_VIT["vision_cfg"], "patch_dropout": 0.5}}
MODELS = {"tiny-vit": TINY_VIT, "tiny-vit-drop": DROPPING_MODEL}
# The loss reduces some numbers for each of the 36 rows; gradients are tens of thousands.
LARGE = 1000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    store = tiny_store(folder, num_hues=12)
    tiny_table(folder / "pairs", store)
    for name, model in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(model), encoding="utf-8")
    write_stages(folder)
    return folder


class Reductions(TorchDispatchMode):
    """Sums the elements that this process gives to large reductions, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "reduce" in function._opname:
            size = max(tensor.numel() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor))
            self.num_elements += size if size >= LARGE else 0
        return function(*args, **(kwargs or {}))


@contextmanager
def features_recorded():
    """The image features of every forward pass through the engine, and whether it had a graph."""
    from train.engine import Engine

    records, original = [], Engine.forward

    def forward(self, *args):
        features = original(self, *args)
        records.append((torch.is_grad_enabled(), features[0].detach().clone()))
        return features

    Engine.forward = forward
    try:
        yield records
    finally:
        Engine.forward = original


def train_run(
    rank: int, world_size: int, folder: Path, name: str, stage: int, **flags: object
) -> dict[str, torch.Tensor]:
    """Two steps in this process of an existing group; the weights."""
    from train.models.clip_library import open_clip
    from train.models.model import load_model

    open_clip.add_model_config(folder)
    settings = {"model__name": "tiny-vit", "max_steps": 2, "threads": 1, **flags}
    # Adam divides a gradient by its own size, rounding and all; with a large epsilon the update follows the gradient.
    settings |= {"optim__eps": 1.0, "optim__lr": 1.0, "optim__warmup": 0, "optim__lr_end": 1.0}
    places = (folder / "store", folder / name, folder / f"stage_{stage}.json")
    train_here(rank, world_size, training_flags(*places, **settings))
    return load_model(folder / name).model.state_dict()


def largest_difference(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((some[name] - other[name]).abs().max().item() for name in some)


def compare_stages(rank: int, world_size: int, folder: Path) -> dict:
    margin = {"data__pairs": folder / "pairs", "data__hard_per_anchor": 2, "loss__margin_weight": 3.0, "batch_size": 36}
    found = {}
    for stage in range(4):
        runs = {}
        for micro in (0, 5):
            with Reductions() as reductions:
                weights = train_run(
                    rank, world_size, folder, f"{stage}-{micro}", stage, micro_batch_size=micro, **margin
                )
            runs[micro] = (weights, reductions.num_elements)
        start = (
            train_run(rank, world_size, folder, f"{stage}-start", stage, **{**margin, "max_steps": 1})
            if not stage
            else None
        )
        found[stage] = {
            "difference": largest_difference(runs[0][0], runs[5][0]),
            "reduced": (runs[0][1], runs[5][1]),
            "scale": (runs[0][0]["logit_scale"].item(), runs[5][0]["logit_scale"].item()),
        }
        if start is not None:
            found["step"] = largest_difference(start, runs[0][0])
    return found


@pytest.mark.slow
def test_micro_batches_give_the_weights_of_the_whole_batch_at_every_stage_and_reduce_once(world):
    found = run_on_ranks(compare_stages, 2, world, timeout_s=300)[0]
    assert found["step"] > 1e-3
    for stage in range(4):
        assert found[stage]["difference"] < 1e-6, stage
        assert found[stage]["scale"][0] == pytest.approx(found[stage]["scale"][1], abs=1e-6)
        whole, cached = found[stage]["reduced"]
        assert 0 < cached == whole, stage


def record_features(rank: int, world_size: int, folder: Path) -> list[tuple[bool, torch.Tensor]]:
    with features_recorded() as records:
        train_run(rank, world_size, folder, "drop", 1, model__name="tiny-vit-drop", micro_batch_size=4, max_steps=1)
    return records


@pytest.mark.slow
def test_patch_dropout_is_replayed(world):
    records = run_on_ranks(record_features, 1, world)[0]
    first, replayed = ([features for had_graph, features in records if had_graph is graph] for graph in (False, True))
    assert len(first) == len(replayed) == 4
    assert all(torch.equal(one, other) for one, other in zip(first, replayed, strict=True))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations have made inside and that are still there: now, and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.now, self.most = dict[int, int](), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.most = max(self.most, self.now)
        return results

    def forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def most_bytes_of_steps(rank: int, world_size: int, folder: Path, sizes: list[tuple[int, int]]) -> list[int]:
    """Most bytes of tensors within one step of each (global batch, micro-batch)."""
    from train.config import ModelConfig, OptimConfig, TrainConfig
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.models.clip_library import open_clip
    from train.models.model import TwoTowers, build_model
    from train.step import train_step

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    open_clip.add_model_config(folder)
    ds_config, found = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6}}, []
    for batch_size, micro in sizes:
        config = TrainConfig(model=ModelConfig("tiny-vit"), batch_size=batch_size, micro_batch_size=micro)
        ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
        towers = TwoTowers(*build_model(config.model))
        engine = Engine(towers, ds_config, OptimConfig(), batch_size=batch_size, ranks=ranks)
        pictures, texts = torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8), torch.ones(batch_size, 24).long()
        batch = RankBatch(pictures, texts, torch.arange(batch_size), batch_size, 0)
        # The optimizer makes its moments in the first step.
        train_step(engine, config, batch, 1e-4)
        with LiveBytes() as live:
            train_step(engine, config, batch, 1e-4)
        found.append(live.most)
        engine.close()
    return found


@pytest.mark.slow
def test_peak_memory_is_that_of_one_micro_batch_plus_features(world):
    sizes = [(8, 0), (16, 0), (64, 8), (256, 8)]
    (one, two, some, many), *_ = run_on_ranks(most_bytes_of_steps, 1, world, sizes)
    # Of each row: two towers' 32 numbers, their gradients, some copies of both, the loss's numbers, a share of its chunk's random state.
    features = 24 * 2 * 32 * 4
    assert 0 < many - some < (256 - 64) * features
    assert many - one < 256 * features
    # And of each row whose activations are kept:
    row = (two - one) / 8
    assert row > 30 * features


def batch_norm_steps(rank: int, world_size: int, folder: Path) -> int:
    weights = train_run(rank, world_size, folder, "norm", 1, model__name="pocket-rn", micro_batch_size=8, max_steps=3)
    return int(weights["visual.bn1.num_batches_tracked"])


@pytest.mark.slow
def test_running_statistics_see_each_micro_batch_once(world):
    assert run_on_ranks(batch_norm_steps, 1, world) == [3 * 2]


@pytest.mark.parametrize("micro_batch_size", [-1, 1])
def test_a_micro_batch_of_no_size_is_refused(micro_batch_size):
    from train.main import parse_config

    flags = training_flags("store", "run", micro_batch_size=micro_batch_size)
    with pytest.raises(ValueError, match=f"micro_batch_size={micro_batch_size} must be 0"):
        parse_config("pocket-pretrain", list(flags))
