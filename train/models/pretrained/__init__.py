"""Published weights as the start of a run: recognised by the names of their tensors, turned into open_clip's.

In: the file of `--model.pretrained`. Out: `Translated`, whose config and state dict are open_clip's, so that what a run writes is what
open_clip reads. Every module here knows one family: its names, and what its code does that its weights don't say.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from train.models.architecture import architecture, create_model, differences, remember_architecture
from train.models.pretrained import declip, native, timm_towers
from train.models.pretrained.reading import Tensors, read_tensors
from train.models.pretrained.translated import Translated, grouped


def read_pretrained(path: Path, wanted: str, *, is_default: bool) -> Translated:
    """The weights in `path` as open_clip has them; from now on `Translated.name` is known as an architecture.

    wanted: the architecture that they have to be of, by name; is_default: nobody asked for it, so what they are decides.
    Raises ValueError, with the reason, for a file that can't be read safely, weights of no known family, and an architecture that is not
    the wanted one.
    """
    file = read_tensors(path)
    family = recognised(file)
    if family is native:
        translated = native.translate(file, wanted, is_default)
    else:
        translated = family.translate(file)
    translated = replace(translated, name=remember_architecture(translated.name, translated.model_config))
    if not is_default and wanted != translated.name:
        check_wanted(path, translated, wanted)
    check_complete(path, translated)
    return translated


def recognised(file: Tensors) -> ModuleType:
    """The module that knows this family. Raises ValueError when none does."""
    names = file.tensors
    has_text = any("token_embedding" in name or name.startswith("text.") for name in names)
    if any(name.startswith(declip.TEXT) for name in names):
        return declip
    if has_text and ("image_projection" in names or timm_towers.ROCKET_HEADS in names):
        return timm_towers
    if any(name.startswith("vision_model.") for name in names):
        raise ValueError(
            f"{file.path} is in the names of Hugging Face's CLIPModel; give the open_clip weights that it was made from"
        )
    if any(name.startswith("visual.") for name in names) and not has_text:
        raise ValueError(
            f"{file.path} holds an image tower alone ({grouped(names)}), as SimCLR's files do and some of DeCLIP's: there is no text tower "
            "to train with"
        )
    if has_text and any(name.startswith("visual.") for name in names):
        return native
    raise ValueError(
        f"{file.path} is of no family that is known here (open_clip, OpenAI, SLIP, LaCLIP, CLIP-rocket, DeCLIP): it holds "
        f"{grouped(names)[:300]}"
    )


def check_wanted(path: Path, translated: Translated, wanted: str) -> None:
    found = differences(architecture(wanted), translated.model_config)
    if found:
        raise ValueError(
            f"model.name={wanted} is not the architecture of {path} ({translated.family}): {'; '.join(found)}; leave --model.name out, "
            f"and the weights decide ({translated.name})"
        )


def check_complete(path: Path, translated: Translated) -> None:
    """Raises ValueError unless the tensors are just those of the architecture, in number and shape."""
    model = create_model(translated.name, device="meta")
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in translated.state_dict.items()}
    # Batch norms count their batches for nothing here, a run may have its reasons for a bias, and old Hugging Face towers stored positions.
    optional = {n for n in needed | given if n.endswith((".num_batches_tracked", ".position_ids")) or n == "logit_bias"}
    other = [
        f"{name} is {given.get(name, 'missing')}, not {needed.get(name, 'there')}"
        for name in sorted((needed | given).keys() - optional)
        if needed.get(name) != given.get(name)
    ]
    if other:
        raise ValueError(
            f"{path} can't be loaded into {translated.name}: {len(other)} tensors differ, {'; '.join(other[:4])}; another --model.name, or "
            "none, so that the weights decide?"
        )


def load_into(model: torch.nn.Module, translated: Translated) -> list[str]:
    """Give a model of `translated.name` its weights. Returns the names of what stays newly initialised."""
    given = dict(translated.state_dict)
    if "logit_bias" in given and model.logit_bias is None:
        model.logit_bias = torch.nn.Parameter(given["logit_bias"].clone())
    known = model.state_dict()
    for name in [name for name in given if name not in known]:
        del given[name]
    model.load_state_dict(given, strict=False)
    return [name for name in known if name not in given and not name.endswith(".num_batches_tracked")]


def summary(path: Path, translated: Translated, new: list[str]) -> str:
    """What was loaded, what was left, what is new: lines for people."""
    millions = sum(tensor.numel() for tensor in translated.state_dict.values()) / 1e6
    lines = [
        f"weights of {path}: {translated.family}, as {translated.name}",
        f"  loaded {len(translated.state_dict)} tensors, {millions:,.1f} M numbers: {grouped(translated.state_dict)}",
        f"  left   {grouped(translated.left) or 'nothing'}",
        f"  new    {', '.join(new) or 'nothing'}",
    ]
    return "\n".join(lines + [f"  note   {note}" for note in translated.notes])
