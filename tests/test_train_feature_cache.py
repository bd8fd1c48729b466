"""Feature-cached steps: the weights of one big batch, whatever the micro-batch, the ZeRO stage and the number of ranks."""

import json
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
    from train.clip_library import open_clip
    from train.model import load_model

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


def saved_for_backward_mib(rank: int, world_size: int, folder: Path, micro: int) -> float:
    """Most memory that autograd held at once for backward passes."""
    held = {"now": 0, "most": 0}

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held["now"] += self.size
            held["most"] = max(held["most"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        train_run(rank, world_size, folder, f"memory-{micro}", 1, micro_batch_size=micro, batch_size=32, max_steps=1)
    return held["most"] / 2**20


@pytest.mark.slow
def test_activations_are_those_of_one_micro_batch(world):
    whole, cached = (run_on_ranks(saved_for_backward_mib, 1, world, micro)[0] for micro in (0, 4))
    # An eighth of the rows; weights, which a graph holds once each, do not shrink with them.
    assert cached < whole / 4


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
