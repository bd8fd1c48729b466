"""The program `python -m train.export`: a model for others. One file for plain open_clip with its config, and a Hugging Face folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mining.command_line import parse, run

PROGRAM = "python -m train.export"
DESCRIPTION = """Write a model in the forms that other programs load, with its embeddings unchanged.

  python -m train.export runs/a --out models/a                    (a run's newest checkpoint, or one of its checkpoints)
  python -m train.export slip_base_100ep.pt --out models/slip     (published weights: OpenAI, SLIP, LaCLIP, CLIP-rocket, DeCLIP)

OUT holds open_clip_model.safetensors and open_clip_config.json, which open_clip.create_model_and_transforms("local-dir:OUT") loads;
NAME.json for open_clip.add_model_config; huggingface/ for transformers' CLIPModel where that can express the model; and the heads of
the method that trained it, which no other program knows. README.md there has the lines to load each. OUT is itself what train.embed,
train.evaluate and --model.pretrained take."""
README, HUGGING_FACE = "README.md", "huggingface"


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and where to."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """run folder, checkpoint folder, export folder, or a file of published weights"""
    out: str
    """folder to write; it must not be there"""
    name: str = ""
    """name of the architecture in open_clip; empty: as it is called here"""
    model_name: str = ""
    """of a file of published weights: its architecture, where the weights alone don't say (as --model.name in training)"""
    format: Literal["auto", "open-clip", "hugging-face"] = "auto"
    """open-clip: leave Hugging Face's folder out; hugging-face: refuse a model that has none; auto: write it when there is one"""


def main(arguments: Sequence[str]) -> None:
    config = parse(ExportConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    if Path(config.out).exists():
        raise ValueError(f"--out {config.out} is there already; give another folder")
    if not Path(config.checkpoint).exists():
        raise ValueError(f"{config.checkpoint} is not there; give a run folder, a checkpoint or a file of weights")
    print(export(config))


def export(config: ExportConfig) -> str:
    """Write the folder whole or not at all. Returns what was written and how to load it.

    Raises ValueError for what can't be read or, with --format hugging-face, expressed.
    """
    # Imported here: torch and open_clip take seconds, which a mistake in a flag need not wait for.
    from mining.manifest import commit_folder
    from train.models.model import save_model

    out = Path(config.out)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        name, state_dict, preprocess = _source(config)
        model_config = save_model(temporary, name, state_dict, preprocess)
        heads = _write_heads(temporary, config.checkpoint, name)
        name = _write_open_clip(temporary, model_config, config.name or name)
        refused = _write_hugging_face(temporary, config.format, model_config, state_dict, preprocess)
        text = _how_to_load(out, name, model_config, preprocess, refused, heads=heads)
        (temporary / README).write_text(text, encoding="utf-8")
        commit_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return text


def _source(config: ExportConfig) -> tuple:
    """Name, state dict and preprocessing of what is exported."""
    from train.config import ModelConfig
    from train.models.model import build_model, resolve

    wanted = config.model_name or ModelConfig().name
    started = resolve(ModelConfig(name=wanted, pretrained=config.checkpoint))
    model, preprocess = build_model(started, say=print)
    return started.name, model.state_dict(), preprocess


def _write_heads(folder: Path, checkpoint: str, name: str) -> list[str]:
    """Names of the files with what open_clip has no place for: an objective's, or published heads as `heads_of` calls them."""
    from train.checkpoints.tensor_files import write_tensors
    from train.models.folder import checkpoint_folder
    from train.models.published_heads import PUBLISHED_HEADS, heads_of
    from train.objectives.files import OBJECTIVE_FILES

    written = []
    if Path(checkpoint).is_dir():
        for file in OBJECTIVE_FILES:
            if (path := checkpoint_folder(checkpoint) / file).is_file():
                shutil.copyfile(path, folder / file)
                written.append(file)
    heads = heads_of(checkpoint, name)
    if heads:
        write_tensors(folder / PUBLISHED_HEADS, heads, {"format": "pt"})
        written.append(PUBLISHED_HEADS)
    return written


def _write_open_clip(folder: Path, model_config: dict, name: str) -> str:
    """NAME.json, and the Python file that timm needs for a ViT that it has no name for."""
    from train.models.timm_vit import geometry_of, registration_source

    # open_clip cuts file names at their last dot, and takes slashes for dashes.
    name = name.replace("/", "-").replace(".", "-")
    (folder / f"{name}.json").write_text(json.dumps(model_config, indent=2), encoding="utf-8")
    timm_name = model_config["vision_cfg"].get("timm_model_name") or ""
    if geometry_of(timm_name):
        (folder / f"{timm_name}.py").write_text(registration_source(timm_name), encoding="utf-8")
    return name


def _write_hugging_face(folder: Path, wanted: str, model_config: dict, state_dict, preprocess) -> str:
    """Returns why there is no such folder; "" when there is one, or none was asked for."""
    from train.models.architecture import tokenizer_of
    from train.models.huggingface import not_a_clip_model, write_folder

    reasons = not_a_clip_model(model_config, preprocess, state_dict)
    if wanted == "open-clip" or (wanted == "auto" and reasons):
        return "; ".join(reasons)
    # Raises for a model that is none.
    tokenizer = None if reasons else tokenizer_of(model_config, "")
    write_folder(folder / HUGGING_FACE, model_config, state_dict, preprocess, tokenizer)
    return ""


def _how_to_load(out: Path, name: str, model_config: dict, preprocess, refused: str, *, heads: list[str]) -> str:
    """README.md of the folder: the lines that load each form, to be run in it."""
    from train.models.architecture import has_own_merges
    from train.models.timm_vit import geometry_of

    timm_name = model_config["vision_cfg"].get("timm_model_name") or ""
    first = f"import {timm_name}  # timm has no name for this ViT\n" if geometry_of(timm_name) else ""
    merges = ', bpe_path="bpe.txt.gz"' if has_own_merges(model_config) else ""
    keywords = (
        f"    image_mean={tuple(preprocess.mean)}, image_std={tuple(preprocess.std)},\n"
        f'    image_interpolation="{preprocess.interpolation}", image_resize_mode="{preprocess.resize_mode}",\n'
    )
    parts = [
        f"# {out.name}: {name}\n",
        "open_clip, from this folder:\n",
        f'```python\nimport open_clip\n{first}model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:."{merges})\n```\n',
        "open_clip, by name (a name says nothing about pictures, so that is said beside it):\n",
        f'```python\nimport open_clip\n{first}open_clip.add_model_config("{name}.json")\n'
        f'model, _, preprocess = open_clip.create_model_and_transforms(\n    "{name}", pretrained="open_clip_model.safetensors",\n'
        f'{keywords})\ntokenizer = open_clip.get_tokenizer("{name}"{merges})\n```\n',
    ]
    if refused:
        parts.append(f"No folder for Hugging Face: its CLIPModel can't express {refused}.\n")
    elif (out.with_name(f".{out.name}.tmp") / HUGGING_FACE).is_dir():
        parts.append(
            "Hugging Face:\n\n```python\nfrom transformers import CLIPModel, CLIPProcessor\n"
            f'model = CLIPModel.from_pretrained("{HUGGING_FACE}")\nprocessor = CLIPProcessor.from_pretrained("{HUGGING_FACE}")\n```\n'
        )
    if heads:
        parts.append(f"{' and '.join(heads)}: heads of the method that trained it, which neither library has.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    run(main)
