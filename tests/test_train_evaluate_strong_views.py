"""`train.evaluate` on a checkpoint with strong embeddings: every weight against similarities worked out here, and broken heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from tests import published_weights as published
from tests.tar_shards import sample, write_tar
from tests.tiny_world import SHAPES, drawing
from train.config import ObjectiveConfig, TrainConfig
from train.evaluate.__main__ import main
from train.export import ExportConfig, export
from train.models.model import LoadedModel, ModelConfig, build_model, load_model, save_model
from train.models.trunk_features import encode_image, encode_text, tower_widths
from train.objectives import build_objective
from train.objectives.files import save_objective

NUM_PICTURES = 24
PROMPTS = ("a {}", "{} on white")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A checkpoint of the pocket model with random weights and strong heads, and a shard of drawings."""
    folder = tmp_path_factory.mktemp("strong")
    torch.manual_seed(3)
    model, preprocess = build_model(ModelConfig(name="pocket-rn"))
    (folder / "export").mkdir()
    save_model(folder / "export", "pocket-rn", model.state_dict(), preprocess)
    settings = ObjectiveConfig(name="barlip", head_width=16, head_dim=12, barlow_width=4, barlow_dim=4)
    objective = build_objective(TrainConfig(objective=settings), tower_widths(model))
    loaded = load_model(folder / "export")
    spread(model, objective, pictures_of(loaded, folder), loaded.tokenizer([caption(n) for n in range(NUM_PICTURES)]))
    save_model(folder / "export", "pocket-rn", model.state_dict(), preprocess)
    save_objective(folder / "export", settings, objective.state_dict())
    members = []
    for number in range(NUM_PICTURES):
        members += sample(f"{number:04d}", caption(number), drawing(SHAPES[number % 4], number), extension="png")
        members.append((f"{number:04d}.cls", str(number % 4).encode()))
    write_tar(folder / "data" / "00000.tar", members)
    (folder / "data" / "classnames.txt").write_text("\n".join(SHAPES), encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def spread(model: torch.nn.Module, objective: torch.nn.Module, pictures: torch.Tensor, tokens: torch.Tensor) -> None:
    """Take BatchNorm's running statistics from the pictures themselves: random weights would give all of them one embedding."""
    for layer in (*model.modules(), *objective.modules()):
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        objective.l2l_image_projector(encode_image(model.train(), pictures)[1])
        objective.l2l_text_projector(encode_text(model, tokens)[1])


def pictures_of(loaded: LoadedModel, folder: Path) -> torch.Tensor:
    pictures = []
    for number in range(NUM_PICTURES):
        path = folder / f"{number}.png"
        path.write_bytes(drawing(SHAPES[number % 4], number))
        pictures.append(loaded.preprocess(Image.open(path)))
    return torch.stack(pictures)


def caption(number: int) -> str:
    return f"a {SHAPES[number % 4]} of hue {number}"


def flags(world: Path, checkpoint: Path) -> list[str]:
    data = ["--data", str(world / "data" / "00000.tar"), "--tasks", "zeroshot", "retrieval", "--name", "drawings"]
    return ["--checkpoint", str(checkpoint), *data, "--templates", str(world / "templates.txt"), "--device", "cpu"]


@pytest.fixture(scope="module")
def result(world) -> dict:
    main([*flags(world, world / "export"), "--out", str(world / "drawings.json")])
    return json.loads((world / "drawings.json").read_text(encoding="utf-8"))


def strong_head(heads: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> torch.Tensor:
    for number in (1, 2, 3):
        rows = rows @ heads[f"{name}.layer{number}.weight"].T + heads[f"{name}.layer{number}.bias"]
        if number < 3:
            statistics = [
                heads[f"{name}.bn{number}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
            ]
            rows = F.batch_norm(rows, *statistics).relu()
    return F.normalize(rows, dim=1)


@pytest.fixture(scope="module")
def similarities(world) -> dict[str, list[torch.Tensor]]:
    """[weak, strong] of pictures with classes and with captions, from the model's own pieces."""
    loaded = load_model(world / "export")
    heads, clip = load_file(world / "export" / "objective.safetensors"), loaded.model
    pictures = pictures_of(loaded, world)
    with torch.no_grad():
        visual = clip.visual
        maps = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pictures)))))
        images = [clip.encode_image(pictures, normalize=True)]
        images.append(strong_head(heads, "l2l_image_projector", maps.mean((2, 3))))

        def texts(words: list[str]) -> list[torch.Tensor]:
            tokens = loaded.tokenizer(words)
            hidden = clip.ln_final(
                clip.transformer(clip.token_embedding(tokens) + clip.positional_embedding, attn_mask=clip.attn_mask)
            )
            ends = hidden[torch.arange(len(tokens)), tokens.argmax(1)]
            return [F.normalize(ends @ clip.text_projection, dim=1), strong_head(heads, "l2l_text_projector", ends)]

        classes = [
            F.normalize(sum(rows), dim=1)
            for rows in zip(*(texts([p.format(s) for s in SHAPES]) for p in PROMPTS), strict=True)
        ]
        captions = texts([caption(number) for number in range(NUM_PICTURES)])
    return {
        "classes": [image @ rows.T for image, rows in zip(images, classes, strict=True)],
        "captions": [image @ rows.T for image, rows in zip(images, captions, strict=True)],
    }


def test_every_weight_gives_the_accuracy_of_the_mixed_similarities(result, similarities):
    mixed = result["details"]["zeroshot/class"]["interpolation"]
    assert list(mixed) == [f"0.{tenth}" for tenth in range(1, 10)]
    labels, found, wanted = torch.arange(NUM_PICTURES) % 4, [], []
    weak, strong = similarities["classes"]
    for weight, metrics in mixed.items():
        found.append(metrics["top1"]["value"])
        similarity = float(weight) * weak + (1 - float(weight)) * strong
        wanted.append((similarity.argmax(1) == labels).double().mean().item())
    assert found == pytest.approx(wanted, abs=1e-12)
    assert len(set(found)) > 1, "weights that all say the same would prove nothing"
    assert result["metrics"]["zeroshot/class/top1"]["value"] == (weak.argmax(1) == labels).double().mean().item()


def test_retrieval_is_mixed_as_well(result, similarities):
    weak, strong = similarities["captions"]
    own = torch.arange(NUM_PICTURES)
    for weight, metrics in result["details"]["retrieval/txt"]["interpolation"].items():
        similarity = float(weight) * weak + (1 - float(weight)) * strong
        top5 = (similarity.topk(5).indices == own[:, None]).any(1).double().mean().item()
        assert metrics["image_to_text_r5"]["value"] == pytest.approx(top5, abs=1e-12)


def test_the_table_has_a_column_for_each_weight(world, result, capsys):
    from train.evaluate.results import table

    lines = table(result).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("with strong embeddings"))
    assert lines[place + 1].split()[-9:] == [f"0.{tenth}" for tenth in range(1, 10)]
    row = next(line for line in lines[place:] if line.startswith("zeroshot/class/top1"))
    values = [
        100 * metrics["top1"]["value"] for metrics in result["details"]["zeroshot/class"]["interpolation"].values()
    ]
    assert [float(cell) for cell in row.split()[1:]] == pytest.approx(values, abs=0.006)


def test_a_checkpoint_without_strong_heads_is_measured_as_before(world, result):
    plain = world / "plain"
    shutil.copytree(world / "export", plain)
    (plain / "objective.json").unlink()
    main([*flags(world, plain), "--out", str(world / "plain.json")])
    found = json.loads((world / "plain.json").read_text(encoding="utf-8"))
    assert found["details"] == {}
    assert found["metrics"] == result["metrics"]


def test_heads_that_do_not_fit_their_settings_are_refused(world):
    broken = world / "broken"
    shutil.copytree(world / "export", broken)
    settings = json.loads((broken / "objective.json").read_text(encoding="utf-8"))
    (broken / "objective.json").write_text(json.dumps({**settings, "head_dim": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"objective\.safetensors does not hold the heads"):
        main(flags(world, broken))


@pytest.fixture(scope="module")
def rocket(world) -> dict[str, torch.Tensor]:
    """CLIP-rocket's state dict at tiny size, in a file as its code writes it; normalisations that spread the drawings."""
    visual = published.timm_vit(torch.Generator().manual_seed(2), 128, 1, 8, 32)
    weights = published.rocket(visual, 128)
    for name in (
        "visual.pos_embed",
        "visual.patch_embed.proj.weight",
        "positional_embedding",
        "token_embedding.weight",
    ):
        weights[name] = weights[name] * 50
    torch.save({"state_dict": published.prefixed("module.", weights)}, world / "rocket.pt")
    return weights


def published_similarities(weights: dict[str, torch.Tensor], checkpoint: Path, world: Path) -> list[torch.Tensor]:
    """[weak, strong] of the pictures and the captions, by the documented architecture in float64."""
    loaded = load_model(checkpoint)
    tokens = loaded.tokenizer([caption(number) for number in range(NUM_PICTURES)])
    trunks = {
        "image": published.timm_vit_features(weights, pictures_of(loaded, world), 2),
        "text": published.text_features(weights, tokens, tokens.argmax(1), torch.eye(64)),
    }
    double = {name: tensor.double() for name, tensor in weights.items()}
    weak = [F.normalize(rows @ double[f"{tower}_projector.weight"].T, dim=1) for tower, rows in trunks.items()]
    strong = [strong_head(double, f"l2l_{tower}_projector", rows) for tower, rows in trunks.items()]
    return [image @ text.T for image, text in (weak, strong)]


@pytest.mark.parametrize("form", ["file", "export"])
def test_published_weights_are_measured_with_their_strong_heads(world, rocket, form, capsys):
    checkpoint, out = world / "rocket.pt", world / "evaluations" / "drawings_rocket.json"
    if form == "export":
        export(ExportConfig(checkpoint=str(checkpoint), out=str(world / "rocket")))
        checkpoint, out = world / "rocket", world / "rocket" / "evaluations" / "drawings.json"
    main(flags(world, checkpoint))
    assert "weight of the weak" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    weak, strong = published_similarities(rocket, checkpoint, world)
    own = torch.arange(NUM_PICTURES)[:, None]
    mixed = result["details"]["retrieval/txt"]["interpolation"]
    found = [metrics["image_to_text_r5"]["value"] for metrics in mixed.values()]
    wanted = [
        ((tenth * weak + (10 - tenth) * strong).topk(5).indices == own).any(1).double().mean().item()
        for tenth in range(1, 10)
    ]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert len(set(found)) > 2, "weights that all say the same would prove nothing"


def test_published_heads_of_other_layers_are_refused(world, rocket):
    fewer = {name: tensor for name, tensor in rocket.items() if not name.startswith("l2l_text_projector.bn2")}
    torch.save({"state_dict": fewer}, world / "fewer.pt")
    with pytest.raises(ValueError, match=r"fewer\.pt: its l2l_text_projector is not the three layers"):
        main(flags(world, world / "fewer.pt"))


def test_a_folders_architecture_is_not_for_the_command_line(world):
    with pytest.raises(ValueError, match="model_name=ViT-B-16 is for a file of published weights"):
        main([*flags(world, world / "export"), "--model_name", "ViT-B-16"])
