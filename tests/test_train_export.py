"""Exports: plain open_clip and Hugging Face's library load them, and give our features."""

import json
import runpy
import sys

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import published_weights as published
from tests.tiny_world import TINY_VIT
from train.config import ModelConfig
from train.export import main
from train.models.architecture import remember_architecture
from train.models.model import build_model, load_model, resolve, save_model

CAPTIONS = ["a red square", "Two dogs, in the SNOW; it's cold & wet", "word " * 60]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A checkpoint folder of a tiny ViT with a cut vocabulary, ImageNet's mean and std, and heads beside it; its model."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    name = remember_architecture("tiny-vit", TINY_VIT | {"quick_gelu": True})
    model, preprocess = build_model(ModelConfig(name=name))
    for tensor in model.parameters():
        tensor.data += 0.2 * torch.randn_like(tensor) * (tensor.ndim > 1)
    preprocess.mean, preprocess.std, preprocess.interpolation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"
    save_model(folder, name, model.state_dict(), preprocess)
    (folder / "objective.safetensors").write_bytes(b"heads")
    (folder / "objective.json").write_text("{}")
    return folder, model.eval()


@pytest.fixture(scope="module")
def exported(vit, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny.v1"
    main([str(vit[0]), "--out", str(out), "--name", "tiny.v1"])
    return out


@pytest.fixture
def photo():
    # Sides that leave an even number of pixels to cut: of an odd one, the two libraries cut another half.
    return Image.effect_noise((48, 40), 90).convert("RGB")


def features(model, image, tokens):
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(tokens)


def test_plain_open_clip_loads_the_folder_and_the_file_by_name(vit, exported, photo):
    ours = load_model(exported)
    expected = features(vit[1], ours.preprocess(photo)[None], ours.tokenizer(CAPTIONS))
    open_clip.add_model_config(exported / "tiny-v1.json")
    weights = str(exported / "open_clip_model.safetensors")
    merges = {"bpe_path": str(exported / "bpe.txt.gz")}
    by_name = open_clip.create_model_and_transforms(
        "tiny-v1",
        pretrained=weights,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        image_interpolation="bilinear",
    )
    by_folder = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    for name, (model, _, preprocess) in ((f"local-dir:{exported}", by_folder), ("tiny-v1", by_name)):
        tokenizer = open_clip.get_tokenizer(name, **merges)
        found = features(model.eval(), preprocess(photo)[None], tokenizer(CAPTIONS))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_hugging_faces_library_loads_its_folder(vit, exported, photo):
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(exported / "huggingface").eval()
    processor = CLIPProcessor.from_pretrained(exported / "huggingface")
    ours = load_model(exported)
    inputs = processor(text=CAPTIONS, images=photo, return_tensors="pt", padding="max_length", truncation=True)
    torch.testing.assert_close(inputs["pixel_values"][0], ours.preprocess(photo), rtol=0, atol=0.03)
    # What pads differs (their end token, our 0), behind the end, where nobody looks.
    tokens = ours.tokenizer(CAPTIONS)
    lengths = inputs["attention_mask"].sum(1)
    assert all(torch.equal(a[:n], b[:n]) for a, b, n in zip(inputs["input_ids"], tokens, lengths, strict=True))
    image_BD, text_BD = features(vit[1], inputs["pixel_values"], tokens)
    with torch.no_grad():
        theirs = model(**inputs)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(theirs.image_embeds, unit(image_BD, dim=1), rtol=0, atol=2e-6)
    torch.testing.assert_close(theirs.text_embeds, unit(text_BD, dim=1), rtol=0, atol=2e-6)
    assert model.logit_scale.item() == vit[1].logit_scale.item()


def test_heads_are_copied_and_the_readme_says_how_to_load(exported):
    assert (exported / "objective.safetensors").read_bytes() == b"heads"
    readme = (exported / "README.md").read_text(encoding="utf-8")
    assert "objective.safetensors and objective.json: heads" in readme
    assert 'open_clip.create_model_and_transforms("local-dir:.")' in readme
    assert 'open_clip.add_model_config("tiny-v1.json")' in readme
    assert "image_mean=(0.485, 0.456, 0.406)" in readme
    assert 'CLIPModel.from_pretrained("huggingface")' in readme


def test_the_lines_of_the_readme_run(exported, monkeypatch, tmp_path):
    monkeypatch.chdir(exported)
    blocks = (exported / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    for number, block in enumerate(blocks[:2]):
        (tmp_path / f"{number}.py").write_text(block.split("```")[0], encoding="utf-8")
        names = runpy.run_path(str(tmp_path / f"{number}.py"))
        assert names["tokenizer"](["a cat"]).shape == (1, 24)
        assert names["model"].visual.image_size in (32, (32, 32))


@pytest.fixture(scope="module")
def slip_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slip")
    torch.save({"state_dict": published.prefixed("module.", published.slip())}, folder / "slip.pt")
    main([str(folder / "slip.pt"), "--out", str(folder / "out")])
    return folder


def test_published_weights_become_a_folder_that_every_stage_takes(slip_export):
    model, _ = build_model(ModelConfig(pretrained=str(slip_export / "slip.pt")))
    loaded = load_model(slip_export / "out")
    tokens, images = loaded.tokenizer(CAPTIONS), torch.randn(2, 3, 32, 32)
    for found, expected in zip(
        features(loaded.model, images, tokens), features(model.eval(), images, tokens), strict=True
    ):
        assert torch.equal(found, expected)
    heads = load_file(slip_export / "out" / "heads.safetensors")
    assert torch.equal(heads["image_mlp.layer1.weight"], published.slip()["image_mlp.layer1.weight"])
    readme = (slip_export / "out" / "README.md").read_text(encoding="utf-8")
    assert "CLIPModel can't express vision_cfg.timm_model_name" in readme


def test_plain_open_clip_loads_a_vit_that_timm_has_no_name_for(slip_export, monkeypatch):
    import timm.models

    out = slip_export / "out"
    (module,) = out.glob("hardpair_vit_*.py")
    expected = load_model(out)
    monkeypatch.delitem(timm.models._registry._model_entrypoints, module.stem)
    with pytest.raises(RuntimeError, match="Unknown model"):
        open_clip.create_model(f"local-dir:{out}")
    monkeypatch.syspath_prepend(str(out))
    __import__(module.stem)
    monkeypatch.delitem(sys.modules, module.stem)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(images), expected.model.encode_image(images))
    assert list(preprocess.transforms[-1].mean) == [0.485, 0.456, 0.406]


def test_published_heads_start_an_objective(slip_export):
    from train.models.published_heads import take_over_published_heads
    from train.objectives.heads import Head

    class Objective(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.image_mlp = Head([128, 64, width, 16])

    weights = published.slip()
    for source in ("slip.pt", "out"):
        config = resolve(ModelConfig(pretrained=str(slip_export / source)))
        objective = Objective(64)
        said = take_over_published_heads(objective, config)
        assert torch.equal(objective.image_mlp.layer3.weight, weights["image_mlp.layer3.weight"])
        assert torch.equal(objective.image_mlp.bn1.running_var, weights["image_mlp.bn1.running_var"])
        assert "new: none" in said
    other = Objective(48)
    assert "image_mlp" in take_over_published_heads(other, config).split("new:")[1]
    assert take_over_published_heads(None, config) == ""


def declip_config(config):
    config["text_cfg"]["proj_bias"] = True


def no_norm_before(config):
    config["vision_cfg"]["no_ln_pre"] = True


@pytest.mark.parametrize(
    ("change", "reason"), [(declip_config, "text_cfg.proj_bias=True"), (no_norm_before, "vision_cfg.no_ln_pre=True")]
)
def test_what_a_clip_model_can_not_express_is_refused(tmp_path, change, reason):
    config = json.loads(json.dumps(TINY_VIT))
    change(config)
    (tmp_path / "m.json").write_text(json.dumps(config), encoding="utf-8")
    name = resolve(ModelConfig(name=str(tmp_path / "m.json"))).name
    model, preprocess = build_model(ModelConfig(name=name))
    folder = tmp_path / "folder"
    folder.mkdir()
    save_model(folder, name, model.state_dict(), preprocess)
    with pytest.raises(ValueError, match=f"CLIPModel can't express {reason}"):
        main([str(folder), "--out", str(tmp_path / "out"), "--format", "hugging-face"])
    assert {path.name for path in tmp_path.iterdir()} == {"m.json", "folder"}


def test_mistakes_are_named(vit, exported, tmp_path):
    with pytest.raises(ValueError, match="is there already"):
        main([str(vit[0]), "--out", str(exported)])
    with pytest.raises(ValueError, match="nowhere is not there"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
