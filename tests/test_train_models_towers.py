"""Towers: locked in part, patches dropped, adapters, and every kind of open_clip config built at tiny size."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import published_weights as published
from tests.ranks import run_on_ranks
from tests.tiny_world import TINY_VIT, tiny_store, train_here, training_flags
from train.config import ModelConfig, ObjectiveConfig
from train.engine import Engine
from train.models.compilation import check_compiles, compile_blocks
from train.models.model import TwoTowers, attention_for, build_model, load_model, resolve, save_model

TEXT = TINY_VIT["text_cfg"]


@pytest.fixture(scope="module")
def vit_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny-vit3.json"
    config = json.loads(json.dumps(TINY_VIT))
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 3
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def trained(model: torch.nn.Module, prefix: str) -> set[str]:
    """Parts of a tower that are trained: "resblocks.2", "proj", ..."""
    names = {name for name, tensor in model.named_parameters() if tensor.requires_grad and name.startswith(prefix)}
    return {".".join(name.removeprefix(prefix).removeprefix("transformer.").split(".")[:2]) for name in names}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (0, set()),
        (1, {"proj"}),
        (2, {"proj", "resblocks.2", "ln_post.weight", "ln_post.bias"}),
        (3, {"proj", "resblocks.2", "resblocks.1", "ln_post.weight", "ln_post.bias"}),
    ],
)
def test_the_last_groups_of_a_locked_image_tower_are_trained(vit_json, groups, expected):
    model, _ = build_model(ModelConfig(name=vit_json, lock_image=True, lock_image_unlocked_groups=groups))
    assert trained(model, "visual.") == expected
    assert model.token_embedding.weight.requires_grad


def test_the_last_groups_of_a_locked_text_tower_are_trained(vit_json):
    model, _ = build_model(ModelConfig(name=vit_json, lock_text=True, lock_text_unlocked_layers=2))
    names = {
        name for name, tensor in model.named_parameters() if tensor.requires_grad and not name.startswith("visual.")
    }
    assert {name.split(".resblocks.")[-1].split(".")[0] for name in names} == {
        "2",
        "ln_final",
        "text_projection",
        "logit_scale",
    }


def test_the_last_groups_of_a_timm_tower_are_trained(tmp_path):
    torch.save({"state_dict": published.slip()}, tmp_path / "slip.pt")
    config = ModelConfig(pretrained=str(tmp_path / "slip.pt"), lock_image=True, lock_image_unlocked_groups=1)
    model, _ = build_model(config)
    frozen = [name for name, tensor in model.visual.named_parameters() if not tensor.requires_grad]
    assert any("blocks.0" in name for name in frozen)
    assert not any(name.startswith("head.") for name in frozen)
    assert model.visual.trunk.norm.weight.requires_grad


def test_a_tower_that_open_clip_can_not_unlock_in_part_is_named():
    with pytest.raises(
        ValueError, match="lock_image_unlocked_groups=1: open_clip can't unlock a part of ModifiedResNet"
    ):
        build_model(ModelConfig(name="pocket-rn", lock_image=True, lock_image_unlocked_groups=1))


def test_a_locked_tower_with_batch_norm_is_saved_and_loaded(tmp_path):
    model, preprocess = build_model(ModelConfig(name="pocket-rn", lock_image=True))
    save_model(tmp_path, "pocket-rn", model.state_dict(), preprocess)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).model.encode_image(images), model.encode_image(images))


def test_dropped_patches_are_not_seen_in_training_alone(vit_json):
    model, _ = build_model(ModelConfig(name=vit_json, patch_dropout=0.5))
    seen = []
    model.visual.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    images = torch.randn(2, 3, 32, 32)
    model.encode_image(images)
    model.eval().encode_image(images)
    assert seen == [1 + 8, 1 + 16]


@pytest.mark.parametrize(
    ("trunk", "reason"),
    [("", "can't recompute a ModifiedResNet"), ("inception_v3", "timm can't recompute a InceptionV3")],
)
def test_towers_that_are_not_recomputed_are_named(tmp_path, trunk, reason):
    vision = {"image_size": 96, "timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear"}
    (tmp_path / "trunk.json").write_text(json.dumps(TINY_VIT | {"vision_cfg": vision}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"model.grad_checkpointing: .*{reason}"):
        build_model(
            ModelConfig(name=str(tmp_path / "trunk.json") if trunk else "pocket-rn", grad_checkpointing=True),
            device="meta",
        )


def test_patches_of_a_resnet_can_not_be_dropped():
    with pytest.raises(ValueError, match=r"patch_dropout=0.5 needs a vision transformer"):
        build_model(ModelConfig(name="pocket-rn", patch_dropout=0.5))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lock_image_unlocked_groups": 1}, "needs --model.lock_image"),
        ({"lock_text": True, "lock_text_unlocked_layers": -1}, "must be 0 or more"),
        ({"lock_image": True, "lock_text": True}, "leave no tower to train"),
        ({"patch_dropout": 1.0}, "patch_dropout=1.0"),
        ({"lora_rank": -1}, "lora_rank=-1"),
        ({"lora_rank": 2, "lock_image": True, "lock_image_unlocked_groups": 1}, "keeps towers frozen"),
    ],
)
def test_senseless_settings_are_named(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**changes).check()


CONFIGS = {
    "pooled": {
        "vision_cfg": TINY_VIT["vision_cfg"] | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}
    },
    "attention-pool": {"vision_cfg": TINY_VIT["vision_cfg"] | {"attentional_pool": True, "attn_pooler_queries": 4}},
    "layer-scale": {
        "vision_cfg": TINY_VIT["vision_cfg"] | {"ls_init_value": 0.1},
        "text_cfg": TEXT | {"ls_init_value": 0.1},
    },
    "custom-block": {"vision_cfg": TINY_VIT["vision_cfg"] | {"qk_norm": True, "scale_fc": True}},
    "bidirectional": {
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "custom_text": True,
    },
    "sin-cos": {"vision_cfg": TINY_VIT["vision_cfg"] | {"pos_embed_type": "sin_cos_2d"}},
    "timm-vit": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
    },
    "timm-resnet": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "mlp"}
    },
    "timm-convnext": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    },
    "timm-efficientnet": {
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_efficientnet",
            "timm_pool": "avg",
            "timm_proj": "linear",
        }
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_open_clip_config_trains_and_is_saved(tmp_path, kind):
    (tmp_path / f"{kind}.json").write_text(json.dumps(TINY_VIT | CONFIGS[kind]), encoding="utf-8")
    config = ModelConfig(name=str(tmp_path / f"{kind}.json"), grad_checkpointing=True)
    if kind == "custom-block":
        with pytest.raises(ValueError, match="grad_checkpointing: open_clip can't recompute"):
            build_model(config)
        config = replace(config, grad_checkpointing=False)
    model, preprocess = build_model(config)
    size = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    tokens = torch.randint(1, 8000, (2, 24))
    image_BD, text_BD, scale = TwoTowers(model, preprocess)(images, tokens)
    with attention_for(images.device):
        (scale * (image_BD * text_BD).sum()).backward()
    assert all(tensor.grad is not None for tensor in model.parameters() if tensor.requires_grad)
    save_model(tmp_path, kind, model.state_dict(), preprocess)
    loaded = load_model(tmp_path).model
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(tokens), model.eval().encode_text(tokens))
        pixels = images / 255
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))


def statistics_of_a_step(
    tmp_path, kind: str, *, recomputes: bool, through_engine: bool = True
) -> dict[str, torch.Tensor]:
    """BatchNorm's state after one forward and backward pass."""
    (tmp_path / f"{kind}.json").write_text(json.dumps(TINY_VIT | CONFIGS[kind]), encoding="utf-8")
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name=str(tmp_path / f"{kind}.json"), grad_checkpointing=recomputes))
    towers = TwoTowers(model, preprocess)
    image_BD, *_ = towers(torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), torch.randint(1, 8000, (3, 24)))
    if through_engine:
        backward = SimpleNamespace(backward=lambda loss: loss.backward())
        engine = SimpleNamespace(device=torch.device("cpu"), module=towers, engine=backward, _reduces_once=False)
        Engine._backward(engine, image_BD.sum())
    else:
        image_BD.sum().backward()
    return dict(model.visual.named_buffers())


@pytest.mark.parametrize("kind", ["timm-resnet", "timm-efficientnet"])
def test_a_recomputed_batch_norm_counts_its_batch_once(tmp_path, kind):
    wanted = statistics_of_a_step(tmp_path, kind, recomputes=False)
    found = statistics_of_a_step(tmp_path, kind, recomputes=True)
    assert wanted.keys() == found.keys()
    assert {int(value) for name, value in found.items() if "num_batches" in name} == {1}
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    twice = statistics_of_a_step(tmp_path, kind, recomputes=True, through_engine=False)
    assert {int(value) for name, value in twice.items() if "num_batches" in name} > {1}, (
        "plain autograd counts it twice"
    )


def random_adapters(model: torch.nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)


@pytest.mark.parametrize("tower", ["open_clip", "timm"])
def test_adapters_begin_as_nothing_and_are_merged_in_what_is_saved(tmp_path, vit_json, tower):
    torch.save({"state_dict": published.slip()}, tmp_path / "slip.pt")
    chosen = {"name": vit_json} if tower == "open_clip" else {"pretrained": str(tmp_path / "slip.pt")}
    torch.manual_seed(3)
    plain, _ = build_model(ModelConfig(**chosen))
    torch.manual_seed(3)
    model, preprocess = build_model(ModelConfig(**chosen, lora_rank=4, lora_alpha=6))
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 8000, (2, model.context_length))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), plain.encode_image(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), plain.encode_text(tokens), rtol=0, atol=1e-5)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert all(".lora_" in name or name == "logit_scale" for name in trained)
    assert any(name.startswith("visual.") for name in trained)
    assert any(name.startswith("transformer.") for name in trained)
    random_adapters(model)
    save_model(tmp_path, resolve(ModelConfig(**chosen)).name, model.state_dict(), preprocess)
    loaded = load_model(tmp_path).model
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for tower, given in (("encode_image", images), ("encode_text", tokens)):
            expected = getattr(model.eval(), tower)(given)
            torch.testing.assert_close(getattr(loaded, tower)(given), expected, rtol=0, atol=2e-5)
            assert (expected - getattr(plain, tower)(given)).abs().max() > 1e-3


def test_adapters_need_peft_and_blocks(vit_json, monkeypatch):
    with pytest.raises(ValueError, match=r"image tower has no transformer blocks .*--model.lock_image"):
        build_model(ModelConfig(name="pocket-rn", lora_rank=2))
    model, _ = build_model(ModelConfig(name="pocket-rn", lora_rank=2, lock_image=True, lora_layers="attention"))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"in_proj", "out_proj"}
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="lora_rank=2 needs peft: pip install peft"):
        build_model(ModelConfig(name=vit_json, lora_rank=2))


def train_and_resume(rank: int, world_size: int, runs: list[list[str]], cut: Path) -> None:
    """The runs; then the last one again, without its last checkpoint."""
    for flags in runs:
        train_here(rank, world_size, flags)
    shutil.copytree(cut, cut.with_name("uncut"))
    shutil.rmtree(cut)
    train_here(rank, world_size, runs[-1])


@pytest.mark.slow
def test_adapters_train_alike_with_and_without_zero_and_resume(tmp_path, vit_json):
    store = tiny_store(tmp_path)
    runs, flags = [], {"model__name": vit_json, "model__lora_rank": 4, "save_every_steps": 2, "optim__lr": 1e-2}
    for stage, section in ((0, {}), (3, {"stage3_param_persistence_threshold": 0})):
        ds_config = tmp_path / f"stage{stage}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage, **section}}), encoding="utf-8")
        runs.append(training_flags(store.path, tmp_path / f"run{stage}", ds_config, max_steps=4, **flags))
    steps = tmp_path / "run3" / "checkpoints"
    run_on_ranks(train_and_resume, 1, runs, steps / "step_4")
    first, last = (
        [json.loads(line) for line in (tmp_path / f"run{stage}" / "metrics.jsonl").read_text().splitlines()]
        for stage in (0, 3)
    )
    assert [row["loss"] for row in last] == pytest.approx([row["loss"] for row in first], rel=1e-5)
    start, end, uncut = (load_model(steps / name).model.state_dict() for name in ("step_2", "step_4", "uncut"))
    assert all(torch.equal(end[name], uncut[name]) for name in end)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in moved
    assert "visual.transformer.resblocks.0.attn.in_proj_bias" not in moved
    assert not moved & {"visual.conv1.weight", "token_embedding.weight", "visual.proj"}
    assert (tmp_path / "run3" / "export" / "open_clip_model.safetensors").is_file()


def test_compiled_blocks_give_the_same_and_keep_their_names(tmp_path):
    torch.save({"state_dict": published.slip(layers=1)}, tmp_path / "slip.pt")
    model, preprocess = build_model(ModelConfig(pretrained=str(tmp_path / "slip.pt")))
    names, towers, gradients = list(model.state_dict()), TwoTowers(model, preprocess), []
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 8000, (2, model.context_length))
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(model, "cpu", backend="aot_eager") == 1 + 2
        image_BD, text_BD, _ = towers(images, tokens)
        with attention_for(images.device):
            gradients.append(
                torch.autograd.grad((image_BD * text_BD).sum(), [p for p in model.parameters() if p.ndim > 1])
            )
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names


class PackedAttention(torch.nn.Module):
    """Attention as torch's nn.MultiheadAttention packs it, without its softmax and projection: what compiles to the fewest loops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)

    def forward(self, x_BLW: torch.Tensor) -> torch.Tensor:
        packed = self.qkv(x_BLW.transpose(0, 1)).unflatten(-1, (3, -1))
        q, k, v = packed.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous().transpose(1, 2)
        return (q * 0.35) @ (k.transpose(-2, -1) * 0.35) @ v


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_bfloat16_gradients_of_attention_are_the_plain_ones():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([PackedAttention(64)])})
    weight, x_BLW, gradients = model["blocks"][0].qkv.weight, torch.randn(2, 77, 64, requires_grad=True), []
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(model, "cpu") == 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = model["blocks"][0](x_BLW).float().square().mean()
        gradients.append(torch.autograd.grad(loss, [weight, x_BLW]))
    for plain, other in zip(*gradients, strict=True):
        assert (other - plain).norm() <= 0.01 * plain.norm()


def test_what_can_not_be_compiled_is_named():
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        check_compiles(stage=3, config=ObjectiveConfig())
    with pytest.raises(ValueError, match=r"objective.text_dropout"):
        check_compiles(stage=1, config=ObjectiveConfig(text_dropout=0.1))
    check_compiles(stage=1, config=ObjectiveConfig())
    with pytest.raises(ValueError, match="finds no blocks"):
        compile_blocks(torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1)}), "cpu", backend="eager")
