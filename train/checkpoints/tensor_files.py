"""Files of named tensors in the safetensors format: written in one pass with their checksum, read by element range across files.

A training state is cut into pieces, each a range of a flattened tensor, under the key `KIND/START/NAME`; which rank wrote which piece does
not matter to a reader. Nothing here runs code from a file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# As the format spells them: https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HASH_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileSum:
    """What a file must be: its size, and the sha256 of its bytes in hex."""

    num_bytes: int
    sha256: str

    def mismatch(self, path: Path) -> str:
        """Why `path` is not this file, or "" when it is."""
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != self.num_bytes:
            return f"{path.name} has {path.stat().st_size} bytes instead of {self.num_bytes}"
        return "" if file_sum(path) == self else f"{path.name} is damaged: its sha256 is not that of what was written"


def file_sum(path: Path) -> FileSum:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
        return FileSum(file.tell(), digest.hexdigest())


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> FileSum:
    """Write CPU tensors as safetensors, durably. A mapping that makes its tensors when asked is held one tensor at a time."""
    layout: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end, item_bytes = 0, {}
    for key in tensors:
        item_bytes[key] = tensors[key].element_size()
    # Wide types first: then every tensor lies at a multiple of its element's size.
    keys = sorted(item_bytes, key=lambda key: -item_bytes[key])
    for key in keys:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        layout[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (len(header).to_bytes(8, "little"), header):
            file.write(data)
            digest.update(data)
        for key in keys:
            data = memoryview(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy())
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
        return FileSum(file.tell(), digest.hexdigest())


def piece_key(kind: str, start: int, name: str) -> str:
    return f"{kind}/{start}/{name}"


class PieceFiles:
    """The pieces of several files as whole tensors. Files are opened when the ones before did not hold all that was asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.unopened = list(paths)
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Callable[[], Any]]]] = {}

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements start .. start + length - 1 of the flattened tensor, 1-d, as they were stored.

        Raises ValueError when the files do not hold them all.
        """
        while self._num_held(kind, name, start, length) < length:
            if not self.unopened:
                raise ValueError(f"{kind} of {name}: elements {start} to {start + length - 1} are not all there")
            self._open(self.unopened.pop(0))
        found = []
        for first, size, piece in sorted(self.pieces.get((kind, name), []), key=lambda entry: entry[:2]):
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                found.append(piece()[low - first : high - first])
        return torch.cat(found) if found else torch.empty(0)

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """Of the first file that has it. Raises ValueError when none has."""
        while (kind, name) not in self.pieces:
            if not self.unopened:
                raise ValueError(f"{kind} {name} is in none of the files")
            self._open(self.unopened.pop(0))
        return self.pieces[kind, name][0][2]()[:]

    def _num_held(self, kind: str, name: str, start: int, length: int) -> int:
        overlaps = (
            min(start + length, first + size) - max(start, first)
            for first, size, _ in self.pieces.get((kind, name), [])
        )
        return sum(max(0, overlap) for overlap in overlaps)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, start, name = key.split("/", 2)
            size = file.get_slice(key).get_shape()[0]
            self.pieces.setdefault((kind, name), []).append((int(start), size, lambda key=key: file.get_slice(key)))
