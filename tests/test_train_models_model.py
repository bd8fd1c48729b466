"""Models and tokenizers: ours against plain open_clip."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image

from mining.manifest import read_manifest, write_manifest
from train.models.architecture import CLIP_VOCABULARY_SIZE, MODEL_CONFIG_FOLDER, architecture
from train.models.folder import FORMAT_VERSION, KIND, WEIGHTS_FILE, checkpoint_folder
from train.models.model import (
    ModelConfig,
    TwoTowers,
    build_model,
    build_tokenizer,
    load_model,
    save_model,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with one checkpoint of a random pocket model, and that model."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "step_7"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    save_model(folder, "pocket-rn", model.state_dict(), preprocess)
    write_manifest(folder, KIND, FORMAT_VERSION, files={})
    return run, folder, model.eval()


def test_plain_open_clip_loads_a_checkpoint_with_equal_features(saved):
    _, folder, model = saved
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(folder / "bpe.txt.gz"))
    image = preprocess(Image.new("RGB", (80, 70), "teal"))[None]
    tokens = tokenizer(["a red apple", "clock face"])
    with torch.no_grad():
        assert torch.equal(theirs.eval().encode_image(image), model.encode_image(image))
        assert torch.equal(theirs.encode_text(tokens), model.encode_text(tokens))
    assert theirs.logit_scale.shape == ()
    assert theirs.logit_scale.item() == model.logit_scale.item()


def test_a_run_folder_loads_its_newest_checkpoint(saved):
    run, folder, model = saved
    (run / "checkpoints" / ".step_9.tmp").mkdir(exist_ok=True)
    (run / "checkpoints" / "step_8").mkdir(exist_ok=True)
    assert checkpoint_folder(run) == folder
    loaded = load_model(run)
    assert not loaded.model.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_the_checkpoint_hash_names_the_weights(saved, tmp_path):
    _, folder, model = saved
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["logit_scale"] += 1e-3
    save_model(tmp_path, "pocket-rn", changed, PreprocessCfg(size=64))
    assert load_model(folder).checkpoint_hash == load_model(folder).checkpoint_hash
    assert load_model(folder).checkpoint_hash != load_model(tmp_path).checkpoint_hash


def test_a_small_vocabulary_is_a_prefix_of_clips():
    small, whole = build_tokenizer("pocket-rn"), open_clip.get_tokenizer("ViT-B-32")
    assert small.vocab_size == 8192
    texts = ["a photo of a cat", "flag: cote d'ivoire", "naive cafe \u00e9clair \u4eba", "unbelievably photosynthetic"]
    ids = small(texts)
    assert int(ids.max()) < 8192
    assert ids.shape == (4, 24)
    for text in texts:
        assert small.decode(small.encode(text)) == whole.decode(whole.encode(text))
    # Common words are single tokens in both, with the same number: merges are ranked by frequency.
    assert small.encode("the cat") == whole.encode("the cat")


def test_the_merge_list_has_the_size_that_the_vocabulary_asks_for(saved):
    lines = gzip.decompress((saved[1] / "bpe.txt.gz").read_bytes()).decode().split("\n")
    assert len(lines) == 1 + 8192 - 514
    assert open_clip.get_tokenizer("ViT-B-32").vocab_size == CLIP_VOCABULARY_SIZE


def test_two_towers_gives_unit_features_of_the_normalised_picture(saved):
    model = saved[2]
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = build_tokenizer("pocket-rn")(["red", "green"])
    towers = TwoTowers(model, PreprocessCfg(size=64))
    with torch.no_grad():
        image_features, text_features, scale = towers(image, tokens)
        pixels = torch.stack(
            [(image[:, c] / 255 - m) / s for c, (m, s) in enumerate(zip(towers.mean, towers.std, strict=True))], 1
        )
        expected = model.encode_image(pixels, normalize=True)
    assert torch.allclose(image_features, expected, atol=1e-5)
    assert torch.allclose(text_features.norm(dim=1), torch.ones(2), atol=1e-6)
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_an_unknown_model_names_its_neighbours():
    with pytest.raises(ValueError, match=r"model.name='ViT-B-17' .*ViT-B-16"):
        build_model(ModelConfig(name="ViT-B-17"))


def test_weights_of_another_architecture_are_refused(saved):
    with pytest.raises(ValueError, match="is not the architecture of"):
        build_model(ModelConfig(name="RN50", pretrained=str(saved[0])))


def test_pretrained_weights_come_back(saved):
    model, preprocess = build_model(ModelConfig(name="pocket-rn", pretrained=str(saved[0])))
    assert torch.equal(model.visual.conv1.weight, saved[2].visual.conv1.weight)
    assert preprocess.size in (64, (64, 64), [64, 64])
    assert model.training


@pytest.mark.parametrize(("name", "message"), [("missing", "is not there"), ("empty", "holds no complete checkpoint")])
@pytest.mark.parametrize("wanted", ["", "ViT-B-16"])
def test_a_folder_without_a_checkpoint_is_named(tmp_path, name, message, wanted):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name} {message}"):
        load_model(tmp_path / name, name=wanted)


def test_a_checkpoint_that_is_taken_away_while_it_is_looked_at_is_passed_over(saved, tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        shutil.copytree(saved[1], folder)
        write_manifest(folder, KIND, FORMAT_VERSION, files={})

    def read_while_training_goes_on(folder, *rest, **words):
        if folder.name == "step_2":
            shutil.rmtree(folder)
            (folder / "manifest.json").read_text()
        return read_manifest(folder, *rest, **words)

    monkeypatch.setattr("train.models.folder.read_manifest", read_while_training_goes_on)
    assert checkpoint_folder(tmp_path).name == "step_1"
    assert "passed over" in capsys.readouterr().err


def test_one_file_under_two_activations_has_two_hashes(saved, tmp_path):
    """Their embeddings differ, so that neither counts as those of the other."""
    config = architecture("pocket-rn")
    (tmp_path / "gelu.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "quick.json").write_text(json.dumps({**config, "quick_gelu": True}), encoding="utf-8")
    file = tmp_path / "weights.safetensors"
    shutil.copyfile(saved[1] / WEIGHTS_FILE, file)
    gelu, quick = (load_model(file, name=str(tmp_path / name)) for name in ("gelu.json", "quick.json"))
    tokens = gelu.tokenizer(["a red square"])
    assert not torch.equal(gelu.model.encode_text(tokens), quick.model.encode_text(tokens))
    assert gelu.checkpoint_hash != quick.checkpoint_hash
    assert load_model(file, name=str(tmp_path / "quick.json")).checkpoint_hash == quick.checkpoint_hash


def test_a_big_vision_file_of_another_architecture_is_refused(tmp_path):
    np.savez(tmp_path / "file.npz", params=np.zeros(3))
    for load in (
        lambda path, name: load_model(path, name=name),
        lambda path, name: build_model(ModelConfig(name, str(path))),
    ):
        with pytest.raises(ValueError, match=r"file\.npz is not what big_vision writes for pocket-rn .*--model_name"):
            load(tmp_path / "file.npz", "pocket-rn")


def test_our_model_configs_are_open_clip_configs():
    open_clip.add_model_config(MODEL_CONFIG_FOLDER)
    for path in MODEL_CONFIG_FOLDER.glob("*.json"):
        assert open_clip.get_model_config(path.stem) == json.loads(path.read_text(encoding="utf-8"))


def test_a_hugging_face_text_tower_gets_the_library_that_is_otherwise_left_out(tmp_path, monkeypatch):
    import transformers

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(bert)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    text = {"hf_model_name": str(bert), "hf_proj_type": "linear", "context_length": 8}
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "tiny-bert.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    monkeypatch.setattr("train.models.architecture.MODEL_CONFIG_FOLDER", configs)
    model, _ = build_model(ModelConfig(name="tiny-bert"))
    assert type(model.text.transformer).__name__ == "BertModel"
    assert model.encode_text(torch.ones(2, 8, dtype=torch.int64)).shape == (2, 8)


def test_programs_start_without_transformers():
    code = "import sys, train.loop, train.evaluate.__main__; print([m for m in sys.modules if m.split('.')[0] == 'transformers'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_checkpoint_of_another_format_is_passed_over_by_name(tmp_path, capsys):
    step = tmp_path / "run/checkpoints/step_3"
    step.mkdir(parents=True)
    write_manifest(step, KIND, FORMAT_VERSION - 1, files={"open_clip_model.safetensors": 11342576})
    with pytest.raises(ValueError, match="holds no complete checkpoint yet"):
        checkpoint_folder(tmp_path / "run")
    assert (
        f"format version {FORMAT_VERSION - 1}, this program reads version {FORMAT_VERSION}" in capsys.readouterr().err
    )
