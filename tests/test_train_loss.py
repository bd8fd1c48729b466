"""The loss as a recipe names it: a sigmoid run from flags to a file that plain open_clip loads, and what does not go together."""

import json

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, train_here, training_flags, write_stages


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_store(folder, num_hues=12)
    (folder / "tiny-vit.json").write_text(json.dumps(TINY_VIT), encoding="utf-8")
    write_stages(folder, bf16={"enabled": True})
    return folder


def sigmoid_runs(rank, world_size, folder):
    from train.models.clip_library import open_clip
    from train.models.model import load_model

    open_clip.add_model_config(folder)
    flags = {"model__name": "tiny-vit", "loss__kind": "sigmoid", "max_steps": 3, "optim__warmup": 0, "threads": 1}
    place = (folder / "store", folder / "run", folder / "stage_1.json")
    train_here(rank, world_size, training_flags(*place, micro_batch_size=4, **flags))
    # Goes on from the bias that was learned, in another run.
    start = {"model__pretrained": folder / "run", "optim__lr": 1e-12}
    place = (folder / "store", folder / "next", folder / "stage_3.json")
    train_here(rank, world_size, [*training_flags(*place, **{**flags, **start}), "--model.lock_text"])
    return {name: load_model(folder / name).model.state_dict() for name in ("run", "next")}


@pytest.mark.slow
def test_a_sigmoid_run_learns_a_bias_that_plain_open_clip_loads(world):
    from train.models.clip_library import open_clip

    found = run_on_ranks(sigmoid_runs, 1, world)[0]
    rows = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    # SigLIP's start: scale 10, bias -10.
    assert rows[0]["logit_scale"] == pytest.approx(10, rel=1e-6)
    assert rows[0]["logit_bias"] == -10
    for row in rows:
        assert row["loss"] == pytest.approx(row["positive"] + row["negative"], rel=1e-5)
        assert "margin" not in row
    # The bias is larger than -10 + 1/64, the next number of bfloat16, only in its fp32 master.
    assert -10 < rows[-1]["logit_bias"] < -10 + 1 / 64
    loaded = open_clip.create_model(f"local-dir:{world / 'run' / 'export'}")
    assert loaded.logit_bias.item() == found["run"]["logit_bias"].item() != -10
    assert torch.equal(loaded.visual.proj, found["run"]["visual.proj"])
    assert found["next"]["logit_bias"].item() == pytest.approx(found["run"]["logit_bias"].item(), abs=1e-6)
    frozen = [name for name in found["run"] if name.startswith(("transformer.", "token_embedding"))]
    # What is locked has no fp32 master under bf16 weights: it stays as bf16 has it (torch_autocast keeps it fp32).
    assert all(torch.equal(found["run"][name].bfloat16().float(), found["next"][name]) for name in frozen)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"loss__kind": "sigmoid", "loss__label_smoothing": 0.1},
            "loss.label_smoothing=0.1 belongs to --loss.kind contrastive",
        ),
        (
            {"loss__kind": "sigmoid", "loss__margin_weight": 2.0, "data__hard_per_anchor": 1, "data__pairs": "pairs"},
            "loss.margin_weight=2.0 belongs to --loss.kind contrastive",
        ),
        ({"loss__kind": "sigmoidal"}, "sigmoidal"),
    ],
)
def test_terms_of_the_other_loss_are_refused(flags, message):
    from train.main import parse_config

    with pytest.raises(ValueError, match=message):
        parse_config("pocket-pretrain", list(training_flags("store", "run", **flags)))


def test_locking_both_towers_is_refused():
    from train.main import parse_config

    flags = [*training_flags("store", "run"), "--model.lock_image", "--model.lock_text"]
    with pytest.raises(ValueError, match="leave no tower to train"):
        parse_config("pocket-pretrain", flags)
