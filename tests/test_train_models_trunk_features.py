"""The towers' features before their projections, of every kind of tower that heads may sit on, and the dropout of strong texts."""

import pytest
import torch

from train.config import ObjectiveConfig, TrainConfig
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.trunk_features import dropping, encode_image, encode_text, text_blocks, tower_widths
from train.objectives.objective import TowerWidths
from train.objectives.towers_and_heads import ENCODE, build_towers, forward_passes

TEXT = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
VIT = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TIMM = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 32}
SMALL = {"head_width": 16, "head_dim": 8, "siam_width": 16, "siam_dim": 8, "barlow_width": 16, "barlow_dim": 16}


def clip_of(vision: dict, *, custom: bool = False, **text: object) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    return kind(20, vision, {**TEXT, **text}, nonscalar_logit_scale=True).eval()


def pictures(side: int) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens() -> torch.Tensor:
    return torch.randint(1, 63, (3, 8), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("more", [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_a_vits_projection_of_the_trunk_is_its_feature(more):
    clip = clip_of({**VIT, **more})
    features, trunk = encode_image(clip, pictures(16))
    assert torch.equal(features, clip.encode_image(pictures(16)))
    assert torch.equal(trunk @ clip.visual.proj, features)


def test_a_modified_resnets_trunk_is_the_mean_of_its_last_map():
    clip = clip_of(RESNET)
    features, trunk = encode_image(clip, pictures(32))
    assert torch.equal(features, clip.encode_image(pictures(32)))
    visual, rows = clip.visual, pictures(32)
    for stage in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        rows = stage(rows)
    assert torch.allclose(trunk, rows.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("projection", ["linear", "mlp", ""])
def test_a_timm_models_trunk_is_what_enters_open_clips_head(projection):
    clip = clip_of({**TIMM, "timm_proj": projection})
    features, trunk = encode_image(clip, pictures(32))
    assert torch.equal(features, clip.encode_image(pictures(32)))
    assert torch.equal(trunk, clip.visual.trunk(pictures(32)))


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool", ["argmax", "last"])
def test_a_text_towers_projection_of_the_trunk_is_its_feature(custom, pool):
    clip = clip_of(VIT, custom=custom, pool_type=pool)
    features, trunk = encode_text(clip, tokens())
    assert torch.equal(features, clip.encode_text(tokens()))
    assert torch.equal(trunk @ getattr(clip, "text", clip).text_projection, features)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    ("vision", "side"),
    [(VIT, 16), (RESNET, 32), ({**TIMM, "timm_proj": "linear"}, 32), ({**TIMM, "timm_proj": ""}, 32)],
)
def test_widths_are_those_of_the_features(vision, side, custom):
    clip = clip_of(vision, custom=custom)
    (image, image_trunk), (text, text_trunk) = encode_image(clip, pictures(side)), encode_text(clip, tokens())
    assert tower_widths(clip) == TowerWidths(image_trunk.shape[1], text_trunk.shape[1], image.shape[1], 64)
    assert text.shape == image.shape


def test_a_tower_of_another_kind_is_refused():
    clip = clip_of(VIT)
    clip.visual = torch.nn.Flatten()
    with pytest.raises(ValueError, match="image tower Flatten is of no kind"):
        encode_image(clip, pictures(16))
    with pytest.raises(ValueError, match="image tower Flatten is of no kind"):
        tower_widths(clip)


def test_dropout_takes_its_share_of_what_enters_every_block():
    clip, shares = clip_of(VIT).train(), []
    with dropping(clip, 0.5, 0.0):
        for block in text_blocks(clip):
            block.register_forward_pre_hook(lambda _, given: shares.append((given[0] == 0).float().mean().item()))
        torch.manual_seed(0)
        clip.encode_text(tokens().repeat(20, 1))
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    # Outside nothing is dropped.
    assert torch.equal(clip.encode_text(tokens()), clip.encode_text(tokens()))


def test_stochastic_depth_passes_rows_by_and_keeps_the_mean():
    clip, rows = clip_of(VIT).train(), []
    block = text_blocks(clip)[0]
    with dropping(clip, 0.0, 0.25):
        block.register_forward_hook(lambda _, given, output: rows.append((given[0], output)))
        torch.manual_seed(0)
        clip.encode_text(tokens()[:1].repeat(400, 1))
    given, output = rows[0]
    passed = (output == given).all(2).all(1)
    assert passed.float().mean().item() == pytest.approx(0.25, abs=0.06)
    # What is not passed by counts for 4 / 3.
    expected = given[0] + (block(given[:1], attn_mask=clip.attn_mask)[0] - given[0]) * 4 / 3
    assert torch.allclose(output[~passed][0], expected, atol=1e-5)


def towers_of(name: str, vision: dict = VIT, **more: object):
    clip = clip_of(vision).train()
    return build_towers(
        clip, PreprocessCfg(size=16), TrainConfig(objective=ObjectiveConfig(name=name, **SMALL, **more))
    )


def views(side: int = 16, rows: int = 4) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8) for _ in range(3)]
    texts = [torch.randint(1, 63, (rows, 8), generator=generator) for _ in range(3)]
    return tuple(images), tuple(texts)


def test_views_in_one_pass_are_those_of_one_pass_each():
    towers = towers_of("cl2l")
    assert towers.images_at_once
    images, texts = views()
    image, text, image_trunk, text_trunk, no_words, (scale,) = towers(ENCODE, images, texts)
    assert no_words == ()
    for number in range(3):
        alone = towers(ENCODE, images[number : number + 1], texts[number : number + 1])
        for together, single in zip((image, text, image_trunk, text_trunk), alone, strict=False):
            assert torch.allclose(together[number], single[0], atol=1e-6)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_each_view_is_a_batch_for_the_batch_norms_of_a_tower():
    towers = towers_of("cl2l", RESNET)
    assert not towers.images_at_once
    images, texts = views(32)
    together = towers(ENCODE, images, texts)
    for number in range(3):
        alone = towers(ENCODE, images[number : number + 1], texts[:1])
        assert torch.equal(together[0][number], alone[0][0])


def test_dropout_leaves_the_weak_text_alone():
    towers = towers_of("cl2l", text_dropout=0.3)
    images, texts = views()
    exact = towers_of("cl2l")(ENCODE, images, texts)
    torch.manual_seed(1)
    dropped = towers(ENCODE, images, texts)
    assert torch.allclose(dropped[1][0], exact[1][0], atol=1e-6)
    for number in (1, 2):
        assert (dropped[1][number] - exact[1][number]).abs().max() > 0.01


def test_a_text_tower_with_dropout_is_not_recomputed():
    clip = clip_of(VIT)
    clip.set_grad_checkpointing()
    config = TrainConfig(objective=ObjectiveConfig(name="cl2l", text_dropout=0.1, **SMALL))
    build_towers(clip, PreprocessCfg(size=16), config)
    assert (clip.visual.transformer.grad_checkpointing, clip.transformer.grad_checkpointing) == (True, False)


def test_forward_passes_are_those_of_the_papers_table():
    expected = {"clip": (1, 1), "slip": (3, 1), "cl2l": (3, 3), "siamlip": (3, 3), "byolip": (6, 6), "barlip": (3, 3)}
    assert {name: forward_passes(towers_of(name)) for name in expected} == expected
