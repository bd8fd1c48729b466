"""What a run starts from: random weights, a run folder, a file of published weights, or an open_clip tag.

In: ModelConfig. Out: the model before training. `resolve` says which architecture it is; the other stages ask for it by that name.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from train.config import ModelConfig
from train.models.architecture import (
    CONFIG_FILE,
    architecture,
    create_model,
    differences,
    quiet_libraries,
    remember_architecture,
)
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.folder import WEIGHTS_FILE, checkpoint_folder
from train.models.pretrained import load_into, read_pretrained, summary
from train.models.pretrained.translated import Translated, grouped

DEFAULT_NAME = ModelConfig().name
# Files that open_clip reads by rules of its own: big_vision's.
OPEN_CLIP_ONLY = (".npz", ".npy")


def resolve(config: ModelConfig) -> ModelConfig:
    """The config with the name of the architecture that the model really has: that of its weights where no name was asked for.

    Raises ValueError for an unknown name, weights of another architecture, and what `read_pretrained` refuses.
    """
    if config.name.endswith(".json"):
        config = replace(config, name=name_of_json(Path(config.name)))
    path = folder_or_file(config.pretrained)
    if path is None:
        check_tag(config)
        return config
    if path.suffix in OPEN_CLIP_ONLY:
        # Raises for a name that is none.
        architecture(config.name)
        return config
    if path.is_dir():
        return replace(config, name=name_of_folder(path, config.name))
    return replace(config, name=translated(path, config.name).name)


def load_start(config: ModelConfig, device: str, say: Callable[[str], None]) -> tuple[torch.nn.Module, PreprocessCfg]:
    """The model of a resolved config with the weights that it starts from, and its preprocessing.

    device "meta": without memory and values, whatever `pretrained` says.
    """
    path = folder_or_file(config.pretrained)
    for_open_clip = path is None or path.suffix in OPEN_CLIP_ONLY
    if config.pretrained and for_open_clip and device != "meta":
        return load_by_open_clip(config)
    model = create_model(config.name, device=device, patch_dropout=config.patch_dropout or None)
    if for_open_clip:
        return model, PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    if path.is_dir():
        content = read_config(path)
        if device != "meta":
            load_folder(model, path, say)
        return model, PreprocessCfg(**content["preprocess_cfg"])
    weights = translated(path, config.name)
    if device != "meta":
        say(summary(path, weights, load_into(model, weights)))
    return model, weights.preprocess


def folder_or_file(pretrained: str) -> Path | None:
    """The folder or file that `pretrained` names; None for a tag of open_clip's, or nothing."""
    path = Path(pretrained)
    if pretrained and path.is_dir():
        return checkpoint_folder(path)
    if not (pretrained and path.is_file()):
        return None
    # A checkpoint's weights lie beside the config that says what they are.
    return path.parent if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file() else path


def translated(path: Path, name: str) -> Translated:
    return read_pretrained(path, name, is_default=name == DEFAULT_NAME)


def name_of_json(path: Path) -> str:
    """The name that an open_clip config in a file of the user's goes by from now on."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name={path} can't be read as JSON: {error}") from error
    config = config.get("model_cfg", config)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"model.name={path} is no open_clip model config: it lacks {', '.join(missing)}")
    return remember_architecture(path.stem, config)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def name_of_folder(folder: Path, wanted: str) -> str:
    """The architecture of a checkpoint folder. Raises ValueError when another one was asked for."""
    content = read_config(folder)
    name = remember_architecture(content.get("hardpair_name", folder.name), content["model_cfg"])
    found = differences(architecture(wanted), content["model_cfg"])
    if not found:
        return wanted
    if wanted == DEFAULT_NAME:
        return name
    raise ValueError(
        f"model.name={wanted} is not the architecture of {folder} ({'; '.join(found[:3])}); name the model that was trained there, {name}, "
        "or none"
    )


def load_folder(model: torch.nn.Module, folder: Path, say: Callable[[str], None]) -> None:
    """Weights that this project wrote. A bias that they were trained with comes along."""
    state_dict = load_file(folder / WEIGHTS_FILE)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state_dict:
            state_dict[scalar] = state_dict[scalar].reshape(1)
    if "logit_bias" in state_dict and model.logit_bias is None:
        model.logit_bias = torch.nn.Parameter(state_dict["logit_bias"].clone())
    model.load_state_dict(state_dict)
    say(f"weights of {folder}: all {len(state_dict)} tensors loaded ({grouped(state_dict)})")


def check_tag(config: ModelConfig) -> None:
    """Raises ValueError when a tag of open_clip's was trained with another activation than the model of that name has.

    open_clip warns, and computes something else than was trained.
    """
    found = open_clip.get_pretrained_cfg(config.name, config.pretrained) if config.pretrained else None
    if found and found.get("quick_gelu", False) != architecture(config.name).get("quick_gelu", False):
        base = config.name.removesuffix("-quickgelu")
        other = base if base != config.name else f"{base}-quickgelu"
        raise ValueError(
            f"model.pretrained={config.pretrained} was trained with another GELU than model.name={config.name} has; name {other}"
        )


def load_by_open_clip(config: ModelConfig) -> tuple[torch.nn.Module, PreprocessCfg]:
    """Weights that open_clip knows by a tag, downloaded by it, or that it alone can read."""
    try:
        with quiet_libraries():
            model = open_clip.create_model(
                config.name,
                pretrained=config.pretrained,
                precision="fp32",
                nonscalar_logit_scale=True,
                force_patch_dropout=config.patch_dropout or None,
            )
    except RuntimeError as error:
        raise ValueError(
            f"model.pretrained={config.pretrained!r} can't be loaded into {config.name}: {error}"
        ) from error
    except (AttributeError, KeyError) as error:
        if Path(config.pretrained).suffix not in OPEN_CLIP_ONLY:
            raise
        # open_clip takes big_vision's layers one by one, and looks at neither side before.
        raise ValueError(
            f"model.pretrained={config.pretrained} is not what big_vision writes for {config.name} ({error}); name the architecture "
            "that it was trained as (--model.name, --model_name), one of open_clip's SigLIP models"
        ) from error
    return model, PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
