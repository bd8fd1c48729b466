"""Every method's recipe, on a tiny model: its loss falls, it goes on from a checkpoint byte-equal, and HELIP refines what it made."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, tiny_table, train_here, training_flags
from train.config import ObjectiveConfig, TrainConfig
from train.recipes import METHODS, RECIPES

REGIMES = {
    "stage_0": {"zero_optimization": {"stage": 0}},
    "stage_1": {"zero_optimization": {"stage": 1}},
    "stage_2": {"zero_optimization": {"stage": 2}},
    # Every weight sharded, the temperatures of one element too.
    "stage_3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "bf16_stage_2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
}
# Each method on some ranks under one regime, some with feature caching.
RUNS = {
    "slip": (1, "stage_3", 0),
    "rocket": (1, "stage_2", 4),
    "siamlip": (1, "stage_0", 0),
    "byolip": (2, "stage_1", 0),
    "barlip": (1, "bf16_stage_2", 0),
    "swalip": (1, "stage_0", 4),
    "declip": (1, "stage_1", 4),
}
ONE_LAYER = {name: {**TINY_VIT[name], "layers": 1} for name in ("vision_cfg", "text_cfg")}
NUM_STEPS, SAVED_STEP, ROWS = 20, 15, 16
FLAGS = {"model__name": "tinier-vit", "max_steps": NUM_STEPS, "save_every_steps": SAVED_STEP, "keep_checkpoints": 9}
FLAGS |= {"threads": 1, "batch_size": ROWS, "optim__warmup": 4, "optim__lr": 2e-3}
WIDTHS = {"head_width": 32, "head_dim": 16, "siam_width": 32, "siam_dim": 16, "barlow_width": 32, "barlow_dim": 32}
WIDTHS |= {"declip_dim": 32, "declip_width": 16, "queue_length": 64}
FLAGS |= {f"objective__{name}": width for name, width in WIDTHS.items()}
DROPPING = {"objective__text_dropout": 0.1, "objective__text_drop_path": 0.1}
HEADS = "objective.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    store = tiny_store(folder, num_hues=12)
    tiny_table(folder / "pairs", store)
    (folder / "tinier-vit.json").write_text(json.dumps({**TINY_VIT, **ONE_LAYER}), encoding="utf-8")
    for name, regime in REGIMES.items():
        (folder / f"{name}.json").write_text(json.dumps(regime), encoding="utf-8")
    return folder


def train_method(rank: int, world_size: int, world: Path, method: str, out: str, regime: str, **more: object) -> None:
    from train.models.clip_library import open_clip

    open_clip.add_model_config(world)
    flags = training_flags(world / "store", world / out, world / f"{regime}.json", **{**FLAGS, **more})
    train_here(rank, world_size, [*flags, "--trackers"], f"pocket-{method}")


def train_methods(rank: int, world_size: int, world: Path) -> None:
    """The methods of so many ranks to their end, and again from the checkpoint in their middle."""
    from train.distributed import barrier

    for method, (num_ranks, regime, micro) in RUNS.items():
        if num_ranks != world_size:
            continue
        # BYOLIP goes on elsewhere, too, where other random states would drop other words.
        flags = {"micro_batch_size": micro, **({} if method == "byolip" else DROPPING)}
        train_method(rank, world_size, world, method, method, regime, **flags)
        if rank == 0:
            cut_copy(world / method, world / f"{method}-again")
        barrier()
        train_method(rank, world_size, world, method, f"{method}-again", regime, **flags)


def refine_methods(rank: int, world_size: int, world: Path) -> list[str]:
    """Two steps of HELIP on what each method made, and BYOLIP on another stage than before; what the logs say."""
    from train.records.metrics import MetricsLog

    said, original = [], MetricsLog.say

    def say(self, message):
        said.append(message)
        original(self, message)

    MetricsLog.say = say
    train_method(rank, world_size, world, "byolip", "byolip-elsewhere", "stage_0")
    helip = {"data__pairs": world / "pairs", "data__hard_per_anchor": 2, "loss__margin_weight": 3.0, "max_steps": 2}
    helip |= {"batch_size": 18}
    for method in RUNS:
        recipe, flags = "slip-refine" if method == "slip" else method, {**helip, "model__pretrained": world / method}
        train_method(rank, world_size, world, recipe, f"{method}-refined", "stage_1", **flags)
    plainly = {**helip, "model__pretrained": world / "slip"}
    train_method(rank, world_size, world, "refine", "refined-plainly", "stage_1", **plainly)
    return said


def cut_copy(run: Path, copy: Path) -> None:
    """The run as it would be, had it been killed after its first checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{NUM_STEPS}")
    shutil.rmtree(copy / "export")


@pytest.fixture(scope="module")
def trained(world):
    """What the refinements said; every run lies in the world's folder."""
    for num_ranks in (1, 2):
        run_on_ranks(train_methods, num_ranks, world, timeout_s=600)
    cut_copy(world / "byolip", world / "byolip-elsewhere")
    return run_on_ranks(refine_methods, 1, world, timeout_s=600)[0]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_every_method_falls_in_twenty_steps(trained, world, method):
    losses = [row["loss"] for row in rows_of(world / method)]
    assert len(losses) == NUM_STEPS
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4]), losses


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_byte_equal_heads_temperatures_and_teacher_included(trained, world, method):
    whole, again = world / method, world / f"{method}-again"
    assert [row["loss"] for row in rows_of(again)] == [row["loss"] for row in rows_of(whole)]
    last = f"checkpoints/step_{NUM_STEPS}"
    for name in (*(f"state_rank{rank:05d}.safetensors" for rank in range(RUNS[method][0])), HEADS):
        assert (again / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    kinds = {key.split("/")[0] for key in load_file(whole / last / "state_rank00000.safetensors")}
    assert ("average" in kinds) == (method == "byolip")


@pytest.mark.slow
def test_the_exported_model_is_the_towers_alone_and_the_heads_lie_beside_it(trained, world):
    towers = load_file(world / "rocket" / "export" / "open_clip_model.safetensors")
    heads = load_file(world / "rocket" / "export" / HEADS)
    assert not any(name.startswith(("objective", "l2l")) for name in towers)
    assert heads["l2l_image_projector.layer3.weight"].shape == (WIDTHS["head_dim"], WIDTHS["head_width"])
    # Of a BatchNorm its statistics, too: one update a step, feature-cached or not.
    assert heads["l2l_image_projector.bn1.num_batches_tracked"].item() == 2 * NUM_STEPS
    assert heads["l2l_logit_scale"].shape == (1,)
    settings = json.loads((world / "rocket" / "export" / "objective.json").read_text(encoding="utf-8"))
    assert settings["name"] == "cl2l"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_helip_refines_every_method_with_the_heads_that_it_has(trained, world, method):
    name = METHODS[method]
    folder = world / method / "checkpoints" / f"step_{NUM_STEPS}"
    assert any(line.startswith(f"the heads of {name} are those of {folder}") for line in trained), trained
    rows = rows_of(world / f"{method}-refined")
    assert len(rows) == 2
    assert all(row["margin"] > 0 for row in rows)
    heads = [load_file(run / HEADS) for run in (folder, world / f"{method}-refined" / "export")]
    layers = [layer for layer in heads[0] if layer.endswith("layer1.weight")]
    # Two steps of warm-up away from where they were, not drawn anew.
    assert layers
    for layer in layers:
        assert (heads[1][layer] - heads[0][layer]).norm() < 0.1 * heads[0][layer].norm(), layer


@pytest.mark.slow
def test_a_refinement_without_heads_leaves_them(trained, world):
    assert [line for line in trained if line.endswith("are left there")] == [
        f"the heads of slip in {world / 'slip' / 'checkpoints' / f'step_{NUM_STEPS}'} are left there"
    ]
    assert not (world / "refined-plainly" / "export" / HEADS).exists()


@pytest.mark.slow
def test_a_teacher_goes_on_with_other_ranks_and_another_stage(trained, world):
    """Its shards of two ranks at ZeRO-1 become the whole of one at ZeRO-0."""
    losses, elsewhere = ([row["loss"] for row in rows_of(world / run)] for run in ("byolip", "byolip-elsewhere"))
    assert elsewhere == pytest.approx(losses, rel=1e-3)
    whole, sharded = (average_of(world / run) for run in ("byolip-elsewhere", "byolip"))
    assert whole.keys() == sharded.keys()
    assert any(name.startswith("objective.") for name in whole)
    distance = sum((whole[name] - sharded[name]).square().sum() for name in whole).sqrt()
    assert distance < 1e-2 * sum(weight.square().sum() for weight in whole.values()).sqrt()


def average_of(run: Path) -> dict[str, torch.Tensor]:
    """The teacher's weights, flat, put together from the files of all ranks."""
    pieces: dict[str, list] = {}
    for path in sorted((run / "checkpoints" / f"step_{NUM_STEPS}").glob("state_rank*")):
        for key, tensor in load_file(path).items():
            kind, start, name = key.split("/", 2)
            if kind == "average" and tensor.numel():
                pieces.setdefault(name, []).append((int(start), tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda p: p[0])]) for name, parts in pieces.items()
    }


def test_every_recipe_has_values_that_go_together():
    for name, recipe in RECIPES.items():
        config = TrainConfig(**recipe())
        config.objective.check()
        assert recipe.__doc__.endswith((".", "weights.")), name
    assert {RECIPES[f"pocket-{method}"]()["objective"].name for method in METHODS} == set(METHODS.values())


@pytest.mark.parametrize(
    ("recipe", "wd", "text_dropout", "reduction", "stop_words", "captions", "layers"),
    [
        ("cc3m-rocket-rn50", 0.5, 0.2, "avg", 0.8, ("whole", False), 6),
        ("cc12m-rocket-rn50", 0.1, 0.05, "sum", 0.8, ("whole", False), 12),
        ("cc12m-barlip-rn50", 0.1, 0.1, "sum", 0.8, ("whole", False), 12),
        ("yfcc15m-swalip-rn50", 0.1, 0.0, "sum", 0.9, ("single", True), 12),
        ("yfcc15m-rocket-vit-b16", 0.1, 0.0, "sum", 0.8, ("single", True), 12),
    ],
)
def test_what_clip_rocket_changes_between_data_sets(recipe, wd, text_dropout, reduction, stop_words, captions, layers):
    # Expected: the published command lines, one for each data set and method.
    from train.models.architecture import architecture

    config = TrainConfig(**RECIPES[recipe]())
    assert (config.optim.wd, config.optim.lr, config.optim.beta2, config.optim.eps) == (wd, 3e-3, 0.98, 1e-8)
    assert (config.objective.text_dropout, config.objective.reduction) == (text_dropout, reduction)
    assert (config.augment.stop_words_prob, config.strong_augment.stop_words_prob) == (stop_words, stop_words)
    assert (config.data.caption_sampling, config.data.clean_captions) == captions
    assert architecture(config.model.name)["text_cfg"]["layers"] == layers
    edits = config.strong_augment
    assert (edits.synonym_weight, edits.swap_weight, edits.delete_weight) == (0.4, 0.4, 0.2)
    assert config.objective.strong_label_smoothing == (0.0 if "swalip" in recipe else 0.1)
    assert config.batch_size == 4096


def test_a_methods_settings_come_back_from_config_json():
    from train.main import parse_config
    from train.records.same_run import to_json
    from train.reproduce import config_from_json

    flags = [*training_flags("store", "run", objective__text_dropout=0.1), "--legacy-gradients"]
    config = parse_config("pocket-byolip", flags)
    assert config.objective.text_dropout == 0.1
    assert config.objective.legacy_gradients
    assert config_from_json(TrainConfig, to_json(asdict(config))) == config


def test_doctor_and_plan_count_the_heads_and_the_passes():
    from train.doctor.training import model
    from train.planning.plan import model_size, plan_rank

    config = TrainConfig(**RECIPES["pocket-byolip"](), device="cpu")
    plain = TrainConfig(**RECIPES["pocket-pretrain"](), device="cpu")
    findings, num_parameters = model(config)
    assert "6 passes of each picture and 6 of each text" in findings[1].message
    assert num_parameters > 1.25 * model(plain)[1]
    sizes = [
        model_size(settings, {"zero_optimization": {"stage": 1}}, flash_attention=False) for settings in (config, plain)
    ]
    assert sizes[0].passes == (6, 6)
    assert sizes[0].num_trained == sizes[1].num_trained + sizes[0].num_head
    assert sizes[0].input_bytes_per_row == 3 * sizes[1].input_bytes_per_row
    # Three views of both towers, and the heads' own.
    assert sizes[0].activation_bytes_per_row > 3 * sizes[1].activation_bytes_per_row
    two = [plan_rank(size, config, {"zero_optimization": {"stage": 1}}, 2).device for size in sizes]
    assert two[0]["teacher's weights and average"] == 4 * sizes[0].num_trained + 4 * -(-sizes[0].num_trained // 2)
    assert "teacher's weights and average" not in two[1]


def test_counted_flop_are_those_of_every_view_and_of_the_teachers_forward():
    from train.models.clip_library import PreprocessCfg, open_clip
    from train.models.model import TwoTowers
    from train.objectives.towers_and_heads import build_towers
    from train.planning.flops import flop_of_a_pair

    clip = open_clip.model.CLIP(**TINY_VIT, nonscalar_logit_scale=True)
    one = flop_of_a_pair(TwoTowers(clip, PreprocessCfg(size=32)), (32, 32), 24)
    found = {}
    for name in ("cl2l", "siamlip", "byolip"):
        objective = ObjectiveConfig(name=name, **WIDTHS)
        towers = build_towers(clip, PreprocessCfg(size=32), TrainConfig(objective=objective))
        found[name] = flop_of_a_pair(towers, (32, 32), 24)
    # A linear layer's two products backward and one forward, of two views on both trunks of 32.
    heads = 3 * 2 * 2 * 2 * (32 * 32 + 32 * 32 + 32 * 16)
    assert found["cl2l"] == pytest.approx(3 * one + heads, rel=1e-3)
    # Forward is a third of a step, and a teacher's all of its views' without the heads of the strong ones and the predictors.
    assert found["byolip"] - found["siamlip"] == pytest.approx(one, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"objective__num_strong_views": 3}, "num_strong_views=3 does not go with"),
        ({"objective__text_dropout": 1.0}, "text_dropout=1.0 must be from 0"),
        ({"objective__strong_temperature": 0.0}, "strong_temperature=0.0 must be positive"),
        ({"objective__head_width": 0}, "head_width=0 must be at least 1"),
        ({"objective__ssl_weight": -1.0}, "ssl_weight=-1.0 must be 0 or more"),
    ],
)
def test_senseless_settings_of_an_objective_are_refused(flags, message):
    from train.main import parse_config

    with pytest.raises(ValueError, match=message):
        parse_config("pocket-slip", list(training_flags("store", "run", **flags)))
