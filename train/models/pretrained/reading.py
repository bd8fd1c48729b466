"""Reading the tensors of a weights file from anywhere, without executing what is pickled in it.

In: a .safetensors file, a torch checkpoint or a TorchScript archive. Out: `Tensors`.
"""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# Where training programs put the weights in what they save.
WRAPPERS = ("state_dict", "model", "model_state_dict")
# Of DistributedDataParallel and torch.compile.
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Tensors:
    """What a weights file holds."""

    path: Path
    tensors: dict[str, torch.Tensor]
    """by name, without the prefixes of wrappers, as they are stored"""
    is_torchscript: bool = False
    beside: tuple[str, ...] = field(default=())
    """what else lies in the file: optimizer, epoch, ..."""


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file.

    Raises ValueError with the reason for one that is torn, that is no weights file, or that holds other objects.
    """
    if path.suffix == ".safetensors":
        try:
            return Tensors(path, _without_prefixes(load_file(path)))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if _is_torchscript(path):
        return _read_torchscript(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors")
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    tensors = content[wrapper] if wrapper else content
    named = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not named:
        raise ValueError(f"{path} holds no named tensors, only {', '.join(map(str, list(content)[:8])) or 'nothing'}")
    return Tensors(
        path, _without_prefixes(named), beside=tuple(name for name in content if wrapper and name != wrapper)
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> Tensors:
    """The tensors of an archive as torch.jit.save writes it; its code is compiled, and not run."""
    try:
        with warnings.catch_warnings():
            # TorchScript is on its way out of torch, and OpenAI's files are in it.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no whole TorchScript archive: {_first_line(error)}") from error
    return Tensors(path, _without_prefixes(dict(module.state_dict())), is_torchscript=True)


def _load(path: Path) -> Any:
    # SLIP's trainer saves its command line in the file. A Namespace holds attributes, and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            # Files of torch before 1.6 can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds other objects than tensors, and reading them could run any code: {_reason(error)}; take the weights out "
                "where the file is trusted: torch.save(torch.load(FILE, weights_only=False)['state_dict'], OTHER)"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} can't be read as weights, is it whole? {_first_line(error)}") from error


def _reason(error: Exception) -> str:
    """The sentence of torch's explanation that names the object."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines)[0].split(" was not an allowed")[0].removeprefix("WeightsUnpickler error: ")


def _first_line(error: Exception) -> str:
    # A missing key alone says nothing to people.
    text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _without_prefixes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = dict(tensors)
    while prefix := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names
