"""Published weights: every family gives the features that its own code gives, and what can't be represented is refused."""

import argparse
import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests import published_weights as published
from tests.tiny_world import tiny_store, train_here, training_flags
from train.config import ModelConfig, ObjectiveConfig, TrainConfig
from train.models.model import build_model, build_tokenizer, load_model, resolve, save_model
from train.models.pretrained import declip, native, read_pretrained
from train.models.pretrained.reading import Tensors, read_tensors
from train.models.pretrained.translated import IMAGENET_MEAN, OPENAI_MEAN
from train.models.published_heads import take_over_published_heads
from train.models.timm_vit import VitGeometry
from train.objectives import TowerWidths, build_objective

CAPTIONS = ["a red square", "two dogs in the snow, seen from above, running after a ball that is not there", ""]
SIZE = 32


def started(path: Path, name: str = ModelConfig().name):
    """Double-precision model of a weights file, its preprocessing, its tokenizer, and what was said."""
    said = []
    config = resolve(ModelConfig(name=name, pretrained=str(path)))
    model, preprocess = build_model(config, say=said.append)
    return model.double().eval(), preprocess, build_tokenizer(config.name), "\n".join(said)


def pictures(size: int = SIZE) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_features(model, images, image_BD, tokens, text_BD):
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(images.double()), image_BD, rtol=0, atol=1e-9 * float(image_BD.abs().max())
        )
        torch.testing.assert_close(model.encode_text(tokens), text_BD, rtol=0, atol=1e-9 * float(text_BD.abs().max()))


def ends(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens == 49407).int().argmax(1)


@pytest.fixture(scope="module")
def slip_file(tmp_path_factory):
    """A SLIP checkpoint as its trainer writes it: prefix, optimizer, and the command line in a Namespace."""
    path = tmp_path_factory.mktemp("slip") / "slip_tiny.pt"
    weights = published.slip()
    args = argparse.Namespace(model="SLIP_VITT16", lr=3e-3, betas=(0.9, 0.98))
    content = {"epoch": 25, "state_dict": published.prefixed("module.", weights), "optimizer": {}, "args": args}
    torch.save(content, path)
    return path, weights


def test_slip_gives_its_own_features(slip_file):
    path, weights = slip_file
    model, preprocess, tokenizer, said = started(path)
    tokens, images = tokenizer(CAPTIONS), pictures()
    image_BD = published.timm_vit_features(weights, images, 2) @ weights["image_projection"].double()
    text_BD = published.text_features(weights, tokens, ends(tokens), weights["text_projection"])
    assert_same_features(model, images, image_BD, tokens, text_BD)
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(3.1)
    assert tuple(preprocess.mean) == IMAGENET_MEAN
    assert preprocess.size == SIZE
    assert "left   image_mlp (16)" in said
    assert "new    nothing" in said
    assert "SLIP / LaCLIP" in said


def test_slips_small_vit_has_12_heads(tmp_path):
    weights = {n: t for n, t in published.slip(width=384, layers=1).items() if not n.startswith("image_mlp")}
    torch.save({"state_dict": weights}, tmp_path / "small.pt")
    model, *_, said = started(tmp_path / "small.pt")
    images = pictures()
    of_heads = {
        heads: published.timm_vit_features(weights, images, heads) @ weights["image_projection"].double()
        for heads in (6, 12)
    }
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images.double()), of_heads[12], rtol=0, atol=1e-9)
    assert (of_heads[6] - of_heads[12]).abs().max() > 1e-3
    assert "12 heads" in said


@pytest.mark.parametrize(
    ("geometry", "name"),
    [
        (VitGeometry(768, 12, 12, 3072, 16, 224), "vit_base_patch16_224"),
        (VitGeometry(1024, 24, 16, 4096, 16, 224), "vit_large_patch16_224"),
        (VitGeometry(384, 12, 6, 1536, 16, 224), "vit_small_patch16_224"),
        (VitGeometry(384, 12, 12, 1536, 16, 224), "hardpair_vit_w384_d12_h12_m1536_p16_i224"),
        (VitGeometry(768, 12, 12, 3072, 16, 240), "hardpair_vit_w768_d12_h12_m3072_p16_i240"),
    ],
)
def test_a_vit_goes_by_timms_name_where_there_is_one(geometry, name):
    assert geometry.timm_name() == name


def test_clip_rockets_linear_heads_are_the_other_way_round(tmp_path):
    visual = published.timm_vit(torch.Generator().manual_seed(2), 128, 2, 8, SIZE)
    weights = published.rocket(visual, 128)
    torch.save(
        {"state_dict": published.prefixed("module.", weights), "momentum_state_dict": {}}, tmp_path / "rocket.pt"
    )
    model, preprocess, tokenizer, said = started(tmp_path / "rocket.pt")
    tokens, images = tokenizer(CAPTIONS), pictures()
    image_BD = published.timm_vit_features(weights, images, 2) @ weights["image_projector.weight"].double().T
    text_BD = published.text_features(weights, tokens, ends(tokens), weights["text_projector.weight"].T)
    assert_same_features(model, images, image_BD, tokens, text_BD)
    assert tuple(preprocess.mean) == IMAGENET_MEAN
    assert "CLIP-rocket" in said
    assert "l2l_logit_scale, l2l_image_projector (16), l2l_text_projector (16)" in said


def test_clip_rockets_resnet_is_timms(tmp_path):
    visual = published.timm_resnet(torch.Generator().manual_seed(3), 64, (3, 4, 6, 3))
    weights = published.rocket(visual, 2048)
    save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / "rocket.safetensors")
    model, preprocess, *_ = started(tmp_path / "rocket.safetensors")
    images = pictures(64)
    expected = published.timm_resnet_features(weights, images) @ weights["image_projector.weight"].double().T
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images.double()), expected, rtol=1e-8, atol=1e-9)
    assert preprocess.size == 224


def test_declips_tokens_projection_bias_and_mask(tmp_path):
    weights = published.declip(published.openai_vit(torch.Generator().manual_seed(4), 128, 2, 8, SIZE, 32))
    torch.save(
        {"model": published.prefixed("module.", weights), "optimizer": {}, "last_iter": 3}, tmp_path / "declip.pth.tar"
    )
    model, preprocess, tokenizer, said = started(tmp_path / "declip.pth.tar")
    images, tokens = pictures(), tokenizer(CAPTIONS)
    # A masked word: DeCLIP's mask is 49406, and lower than its end token; ours is 49408, and higher.
    tokens[0, 2] = declip.MASK_ID
    to_declip = {49406: 49407, 49407: 49408, 49408: 49406}
    theirs = tokens.clone().apply_(lambda token: to_declip.get(token, token))
    text = published.below(weights, "encode_text.")
    text_BD = published.text_features(text, theirs, theirs.argmax(1), text["text_projection.weight"].T)
    image_BD = published.openai_vit_features(weights, images)
    assert_same_features(model, images, image_BD, tokens, text_BD + text["text_projection.bias"])
    assert model.logit_scale.item() == pytest.approx(2.9)
    assert tuple(preprocess.mean) == IMAGENET_MEAN
    assert "predictor" in said


def test_declips_heads_are_taken_over_whole_with_the_masks_embedding(tmp_path):
    weights = published.declip(published.openai_vit(torch.Generator().manual_seed(4), 128, 1, 8, SIZE, 32))
    torch.save({"model": weights}, tmp_path / "declip.pth.tar")
    settings = ObjectiveConfig(name="declip", num_strong_views=1, declip_dim=32, declip_width=24, queue_length=4)
    objective = build_objective(TrainConfig(objective=settings), TowerWidths(128, 64, 32, vocabulary=49409))
    said = take_over_published_heads(objective, resolve(ModelConfig(pretrained=str(tmp_path / "declip.pth.tar"))))
    assert said.endswith("new: text_queue, queue_place")
    rows, theirs = objective.text_label_predictor.weight, weights["text_label_predictor.weight"]
    assert torch.equal(rows[[5, 49406, 49407, 49408]], theirs[[5, 49407, 49408, 49406]])
    assert torch.equal(objective.word_mask.weight[0], weights["encode_text.token_embedding.weight"][49406])
    rows_BD = torch.randn(3, 32, dtype=torch.float64)
    hidden = rows_BD
    for number in (1, 2, 3):
        layer, norm = (published.below(weights, f"projector.{kind}{number}.") for kind in ("linear", "bn"))
        hidden = hidden @ layer["weight"].T + layer["bias"]
        hidden = (hidden - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        hidden = hidden.relu() if number < 3 else hidden
    with torch.no_grad():
        torch.testing.assert_close(objective.double().eval().projector(rows_BD), hidden, rtol=1e-9, atol=1e-9)


def test_declips_resnet_leaves_the_layer_that_it_does_not_use(tmp_path):
    visual = published.modified_resnet(torch.Generator().manual_seed(4), 16, (1, 1, 1, 1), 2, 32)
    weights = published.declip(visual) | {"visual.fc.weight": torch.ones(32, 512), "visual.fc.bias": torch.ones(32)}
    torch.save({"model": weights}, tmp_path / "declip.pt")
    model, preprocess, _, said = started(tmp_path / "declip.pt")
    images = pictures(64)
    with torch.no_grad():
        expected = published.modified_resnet_features(weights, images)
        torch.testing.assert_close(model.encode_image(images.double()), expected, rtol=1e-8, atol=1e-9)
    assert "visual (2)" in said
    assert preprocess.size == 64


def openai_tensors(visual):
    """OpenAI's mixture: half-precision products, fp32 norms, and three numbers beside them."""
    weights = published.openai(visual)
    half = (
        ".in_proj_weight",
        ".in_proj_bias",
        "out_proj.weight",
        "c_fc.weight",
        "c_proj.weight",
        "conv1.weight",
        "text_projection",
    )
    mixed = {name: tensor.half() if name.endswith(half) else tensor for name, tensor in weights.items()}
    numbers = {
        "input_resolution": torch.tensor(SIZE),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(49408),
    }
    return mixed, numbers


class Holder(torch.nn.Module):
    """Parameters under dotted names, in a module that TorchScript takes."""

    def __init__(self, tensors, buffers=()):
        super().__init__()
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if not rest:
                self.register_parameter(name, torch.nn.Parameter(tensor))
            elif not hasattr(self, first):
                inner = {n.removeprefix(f"{first}."): t for n, t in tensors.items() if n.startswith(f"{first}.")}
                self.add_module(first, Holder(inner))
        for name, tensor in dict(buffers).items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["vit archive", "vit state dict", "resnet state dict"])
def test_openais_weights_have_quick_gelu_in_both_towers(tmp_path, kind):
    generator = torch.Generator().manual_seed(7)
    if kind.startswith("vit"):
        visual, forward, size = (
            published.openai_vit(generator, 128, 2, 8, SIZE, 32),
            published.openai_vit_features,
            SIZE,
        )
    else:
        visual, forward, size = (
            published.modified_resnet(generator, 16, (1, 1, 1, 1), 2, 32),
            published.modified_resnet_features,
            64,
        )
    mixed, numbers = openai_tensors(visual)
    path = tmp_path / "openai.pt"
    if kind == "vit archive":
        torch.jit.save(torch.jit.script(Holder(mixed, numbers.items())), path)
    else:
        torch.save({**mixed, **numbers}, path)
    model, preprocess, tokenizer, said = started(path)
    weights = {name: tensor.float() for name, tensor in mixed.items()}
    tokens, images = tokenizer(CAPTIONS), pictures(size)
    text_BD = published.text_features(weights, tokens, ends(tokens), weights["text_projection"])
    assert_same_features(model, images, forward(weights, images), tokens, text_BD)
    assert tuple(preprocess.mean) == OPENAI_MEAN
    assert preprocess.size == size
    assert "OpenAI, as openai-" in said


@pytest.fixture(scope="module")
def pocket():
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    return model.eval(), preprocess


@pytest.mark.parametrize(("suffix", "name"), [("pt", "pocket-rn"), ("safetensors", ModelConfig().name)])
def test_an_open_clip_file_loads_by_name_or_by_its_shapes(tmp_path, pocket, suffix, name):
    path, state_dict = tmp_path / f"epoch_3.{suffix}", pocket[0].state_dict()
    if suffix == "pt":
        torch.save({"epoch": 3, "name": "a", "state_dict": published.prefixed("module.", state_dict)}, path)
    else:
        save_file(state_dict, path)
    config = resolve(ModelConfig(name=name, pretrained=str(path)))
    assert config.name == "pocket-rn"
    model, _ = build_model(config)
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())


def meta_tensors(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(open_clip.create_model(name, device="meta").state_dict())


def test_weights_that_fit_two_activations_need_a_name():
    file = Tensors(Path("b32.pt"), meta_tensors("ViT-B-32"))
    with pytest.raises(ValueError, match=r"fits ViT-B-32, ViT-B-32-quickgelu, .*--model.name"):
        native.translate(file, "ViT-B-16", is_default=True)
    assert native.translate(file, "ViT-B-32", is_default=False).name == "ViT-B-32"
    openais = Tensors(file.path, {**file.tensors, "input_resolution": torch.tensor(224)})
    assert native.translate(openais, "ViT-B-16", is_default=True).name == "ViT-B-32-quickgelu"
    with pytest.raises(ValueError, match="QuickGELU, which ViT-B-32 has not"):
        native.translate(openais, "ViT-B-32", is_default=False)


def test_the_default_architecture_is_taken_at_its_word_and_says_so():
    taken = native.translate(Tensors(Path("b16.pt"), meta_tensors("ViT-B-16")), "ViT-B-16", is_default=True)
    assert taken.name == "ViT-B-16"
    assert "ViT-B-16-quickgelu" in taken.notes[0]


def test_a_timm_trunk_is_found_by_its_shapes(monkeypatch):
    name = "vit_medium_patch16_gap_256"
    few = {
        known: open_clip.get_model_config(known) for known in (name, "vit_relpos_medium_patch16_cls_224", "ViT-B-16")
    }
    monkeypatch.setattr("train.models.pretrained.native.known_architectures", lambda: few)
    assert native.translate(Tensors(Path("m.pt"), meta_tensors(name)), "ViT-B-16", is_default=True).name == name


def test_a_tag_of_another_activation_is_refused():
    with pytest.raises(ValueError, match="name ViT-B-32-quickgelu"):
        resolve(ModelConfig(name="ViT-B-32", pretrained="openai"))


class Opens:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    torch.save({"state_dict": published.slip(), "args": Opens(str(tmp_path / "ran"))}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt holds other objects than tensors.*open"):
        read_tensors(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_torn_file_is_named(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({"logit_scale": torch.ones(5000)}, whole)
    torn = tmp_path / f"torn.{suffix}"
    torn.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(ValueError, match=rf"torn.{suffix}.* whole"):
        read_tensors(torn)


def without(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def bert_declip():
    return {
        "encode_text.text_transformer.bert.x": torch.ones(2),
        "visual.proj": torch.ones(2),
        "logit_scale": torch.ones(1),
    }


def narrow_slip():
    weights = published.slip()
    return weights | {"visual.patch_embed.proj.weight": torch.ones(96, 3, 8, 8)}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            lambda: without(published.slip(), "token_", "trans", "ln_", "text_", "image_projection"),
            "an image tower alone",
        ),
        (bert_declip, "another library's"),
        (narrow_slip, "image tower is 96 wide"),
        (lambda: {"vision_model.embeddings.x": torch.ones(2)}, "Hugging Face's CLIPModel"),
        (lambda: {"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, "of no family .* conv1, fc"),
        (lambda: published.slip() | {"visual.blocks.0.ls1.gamma": torch.ones(128)}, "ls1.gamma is .*128.*, not there"),
        (lambda: without(published.slip(), "visual.norm.bias"), "norm.bias is missing"),
        (lambda: {"a": 3}, "no named tensors"),
    ],
)
def test_what_can_not_be_represented_is_refused_with_the_reason(tmp_path, tensors, reason):
    torch.save({"state_dict": tensors()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=reason):
        read_pretrained(tmp_path / "file.pt", "ViT-B-16", is_default=True)


def test_weights_are_checked_against_a_name_that_was_asked_for(slip_file):
    with pytest.raises(
        ValueError, match=r"model.name=ViT-B-32 is not the architecture of .*vision_cfg.timm_model_name"
    ):
        resolve(ModelConfig(name="ViT-B-32", pretrained=str(slip_file[0])))


def test_a_json_config_of_ones_own_is_an_architecture(tmp_path):
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"]["layers"] = 1
    (tmp_path / "mine.json").write_text(json.dumps(config), encoding="utf-8")
    assert resolve(ModelConfig(name=str(tmp_path / "mine.json"))).name == "mine"
    model, _ = build_model(ModelConfig(name=str(tmp_path / "mine.json")), device="meta")
    assert len(model.transformer.resblocks) == 1
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks embed_dim"):
        resolve(ModelConfig(name=str(tmp_path / "other.json")))


def test_a_folder_of_published_weights_keeps_everything(slip_file, tmp_path):
    config = resolve(ModelConfig(pretrained=str(slip_file[0])))
    model, preprocess = build_model(config)
    save_model(tmp_path, config.name, model.state_dict(), preprocess)
    loaded = load_model(tmp_path)
    tokens, images = loaded.tokenizer(CAPTIONS), pictures()
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(images), model.eval().encode_image(images))
        assert torch.equal(loaded.model.encode_text(tokens), model.encode_text(tokens))
    assert loaded.preprocess.transforms[-1].mean == IMAGENET_MEAN or list(
        loaded.preprocess.transforms[-1].mean
    ) == list(IMAGENET_MEAN)
    again = resolve(ModelConfig(pretrained=str(tmp_path)))
    assert again.name == config.name


@pytest.mark.slow
def test_a_run_starts_from_slip_and_its_folder_goes_on(slip_file, tmp_path, capsys, monkeypatch):
    from tests.ranks import run_on_ranks

    store = tiny_store(tmp_path)
    run = tmp_path / "run"
    flags = training_flags(
        store.path, run, model__name=ModelConfig().name, model__pretrained=slip_file[0], max_steps=2, optim__lr=1e-4
    )
    run_on_ranks(train_here, 1, flags)
    loaded = load_model(run)
    assert loaded.name.startswith("slip-hardpair_vit_w128")
    weights = slip_file[1]
    moved = loaded.model.visual.head.proj.weight - weights["image_projection"].T
    assert 0 < moved.abs().max() < 1e-3
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["model"]["name"] == loaded.name
    # What is refined from it knows what it is.
    model, preprocess = build_model(ModelConfig(pretrained=str(run)))
    tokens, images = loaded.tokenizer(CAPTIONS), pictures()
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_text(tokens), model.eval().encode_text(tokens))
        assert torch.equal(loaded.model.encode_image(images), model.encode_image(images))
    assert tuple(preprocess.mean) == IMAGENET_MEAN
