"""A folder of numpy arrays that share their first dimension, written block by block and finished atomically.

Owns the crash safety of the EmbeddingStore and of the PairTable: rows go into a hidden sibling (`.NAME.partial-...`), a
block counts once its rows are on disk and its marker is renamed into place, and `finish` renames the whole folder. A
kill at any moment loses at most the block being written. Several processes may write disjoint rows of the same
folder.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mining.manifest import (
    MANIFEST_NAME,
    commit_folder,
    fingerprint,
    read_manifest,
    with_article,
    write_json_atomically,
    write_manifest,
)

logger = logging.getLogger(__name__)

HASH_CHUNK_BYTES = 1 << 24
MANIFEST_FIELDS_OF_THE_FOLDER = ("kind", "format_version", "num_pairs", "arrays", "fingerprint", "facts")


@dataclass(frozen=True)
class ArraySpec:
    """Shape of one row (without the leading N) and dtype of one array of the folder."""

    row_shape: tuple[int, ...]
    dtype: str


class ArrayFolderWriter:
    """Writes the arrays of `specs` (N rows each, by blocks) and the ready-made `whole` arrays into one folder.

    `fields` are the manifest's own entries. Together with the specs they name the partial folder, so that a rerun
    with the same fields goes on where it stopped and one with other fields starts afresh. Raises ValueError for
    num_pairs < 1, a reserved manifest key, or an existing `path` that is not a folder of this kind (it would be
    replaced).
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        version: int,
        num_pairs: int,
        specs: Mapping[str, ArraySpec],
        *,
        whole: Mapping[str, np.ndarray] | None = None,
        fields: Mapping[str, Any] | None = None,
        resume: bool = True,
    ):
        self.path = Path(path)
        self.kind = kind
        self.version = version
        self.num_pairs = num_pairs
        self.specs = dict(specs)
        self.whole = dict(whole or {})
        self.fields = dict(fields or {})
        self.derived_specs: dict[str, ArraySpec] = {}
        if num_pairs < 1:
            raise ValueError(
                f"num_pairs={num_pairs}, but {with_article(kind)} needs at least 1 pair; check that its input is not empty"
            )
        reserved = sorted(set(self.fields) & set(MANIFEST_FIELDS_OF_THE_FOLDER))
        if reserved:
            raise ValueError(
                f"{reserved[0]!r} is written by the {kind} itself; pass that manifest entry by another name"
            )
        refuse_to_replace_another_folder(self.path, kind)
        self.partial = self.path.parent / f".{self.path.name}.partial-{self._identity()[:16]}"
        if not resume and self.partial.exists():
            shutil.rmtree(self.partial)
        (self.partial / "blocks").mkdir(parents=True, exist_ok=True)
        self._create_files()
        self.rows_done = self._read_rows_done(verify=True)

    def _identity(self) -> str:
        shapes = {name: [list(spec.row_shape), spec.dtype] for name, spec in self.specs.items()}
        whole = {name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for name, array in self.whole.items()}
        return fingerprint(self.kind, self.version, self.num_pairs, shapes, whole, self.fields)

    def _create_files(self) -> None:
        for name, spec in self.specs.items():
            target = self.partial / f"{name}.npy"
            if not target.exists():
                shape = (self.num_pairs, *spec.row_shape)
                create_once(target, lambda path, spec=spec, shape=shape: create_zeros(path, spec.dtype, shape))
        for name, array in self.whole.items():
            target = self.partial / f"{name}.npy"
            if not target.exists():
                create_once(target, lambda path, array=array: save_array(path, array))

    def write_rows(self, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write rows start..start+B of every array of the specs; durable on return.

        Raises ValueError when an array is missing, has another row shape, or reaches past the last row.
        """
        missing = sorted(set(self.specs) - set(rows))
        if missing:
            raise ValueError(f"write_rows at row {start} lacks the array {missing[0]!r} of this {self.kind}")
        lengths = {name: len(rows[name]) for name in self.specs}
        num_rows = next(iter(lengths.values()))
        if len(set(lengths.values())) != 1:
            raise ValueError(f"write_rows at row {start} got arrays of different lengths: {lengths}")
        stop = start + num_rows
        if not 0 <= start < stop <= self.num_pairs:
            raise ValueError(f"rows {start}..{stop} do not lie in this {self.kind} of {self.num_pairs} pairs")
        checksums = {}
        for name, spec in self.specs.items():
            block = np.ascontiguousarray(rows[name], dtype=spec.dtype)
            if block.shape[1:] != spec.row_shape:
                raise ValueError(f"rows of {name} have shape {block.shape[1:]}, this {self.kind} has {spec.row_shape}")
            write_block(self.partial / f"{name}.npy", start, block)
            checksums[name] = zlib.crc32(block)
        write_json_atomically(self._marker(start, stop), {"start": start, "stop": stop, "crc32": checksums})
        self.rows_done[start:stop] = True

    def _marker(self, start: int, stop: int) -> Path:
        return self.partial / "blocks" / f"{start:012d}-{stop:012d}.json"

    def refresh(self) -> np.ndarray:
        """Look again at what all processes have written; returns `rows_done`."""
        self.rows_done = self._read_rows_done(verify=False)
        return self.rows_done

    def _read_rows_done(self, *, verify: bool) -> np.ndarray:
        """bool [N]: the rows whose block marker exists and, with `verify`, whose bytes still have its checksums."""
        # The manifest is the last file of all, so that its presence in the partial folder means: every row is there.
        rows_done = np.full(self.num_pairs, (self.partial / MANIFEST_NAME).exists())
        if rows_done.all():
            return rows_done
        for marker in sorted((self.partial / "blocks").glob("*-*.json")):
            start, stop = (int(number) for number in marker.stem.split("-"))
            if verify and not self._is_intact(marker, start, stop):
                logger.warning("%s: rows %d..%d are damaged, they are written again", self.path, start, stop)
                marker.unlink(missing_ok=True)
                continue
            rows_done[start:stop] = True
        return rows_done

    def _is_intact(self, marker: Path, start: int, stop: int) -> bool:
        checksums = read_json(marker).get("crc32", {})
        return all(
            crc32_of_rows(self.partial / f"{name}.npy", start, stop) == checksums.get(name) for name in self.specs
        )

    def read_rows(self, name: str) -> np.ndarray:
        """Memory-mapped view [N, ...] of an array as written so far."""
        return np.load(self.partial / f"{name}.npy", mmap_mode="r")

    @contextmanager
    def derived(self, specs: Mapping[str, ArraySpec]) -> Iterator[dict[str, np.ndarray]]:
        """Arrays of N rows, zeros at first, that the caller fills from the rows written; the folder's once the block ends.

        For the one process that finishes: after a kill they are made anew, while the rows that they come from stay as they are.
        """
        temporaries = {name: self.partial / f".{name}.{uuid.uuid4().hex}.tmp" for name in specs}
        arrays = {}
        for name, spec in specs.items():
            create_zeros(temporaries[name], spec.dtype, (self.num_pairs, *spec.row_shape))
            arrays[name] = np.load(temporaries[name], mmap_mode="r+")
        yield arrays
        for name, array in arrays.items():
            array.flush()
            os.replace(temporaries[name], self.partial / f"{name}.npy")
        self.derived_specs |= specs

    def finish(
        self,
        *,
        files: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        scratch: Sequence[str] = (),
    ) -> None:
        """Check that every row was written, hash the arrays, write manifest and `files` (name: JSON content), rename.

        `facts`: what the manifest says about the content beside its fingerprint. `scratch`: folders in it to leave behind.
        Exactly one process calls it, after all
        others have written their rows. Raises ValueError naming the first rows that nobody wrote.
        """
        rows_done = self.refresh()
        if not rows_done.all():
            first = int(np.argmin(rows_done))
            raise ValueError(
                f"{self.kind} {self.path} is not complete: {int((~rows_done).sum())} of {self.num_pairs} rows are "
                f"missing, the first is row {first}; run the stage that writes it again, it goes on from there"
            )
        arrays = {
            name: describe_array(self.partial / f"{name}.npy")
            for name in [*self.specs, *self.derived_specs, *self.whole]
        }
        for name, content in (files or {}).items():
            write_json_atomically(self.partial / name, content)
        content_fingerprint = fingerprint(self.kind, self.version, self.fields, arrays)
        write_manifest(
            self.partial,
            self.kind,
            self.version,
            num_pairs=self.num_pairs,
            **self.fields,
            arrays=arrays,
            fingerprint=content_fingerprint,
            facts=dict(facts or {}),
        )
        self._remove_scratch(self.partial, scratch)
        for leftover in self.partial.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        commit_folder(self.partial, self.path)
        # Another process may have committed a block once more in the meantime; now it finds the folder no longer.
        self._remove_scratch(self.path, scratch)
        # Blocks of an abandoned run with other parameters would stay for ever.
        for stale in self.path.parent.glob(f".{self.path.name}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)

    @staticmethod
    def _remove_scratch(folder: Path, scratch: Sequence[str]) -> None:
        for name in ("blocks", *scratch):
            shutil.rmtree(folder / name, ignore_errors=True)


def open_arrays(
    path: str | Path, kind: str, version: int, *, required: tuple[str, ...], remedy: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest and the memory-mapped arrays by name.

    Raises ValueError naming the file and `remedy` when the folder is of another kind or version, an array is missing,
    cut short, or has another shape or dtype than the manifest says.
    """
    manifest = read_manifest(path, kind, version, remedy=remedy)
    described = manifest.get("arrays", {})
    missing = [name for name in required if name not in described]
    if missing or "fingerprint" not in manifest:
        what = f"the array {missing[0]!r}" if missing else "a fingerprint"
        raise ValueError(f"{Path(path) / MANIFEST_NAME} does not list {what}, so it is no {kind}; {remedy}")
    arrays = {}
    for name, description in described.items():
        file = Path(path) / f"{name}.npy"
        if not file.is_file():
            raise ValueError(f"{file} is missing; {remedy}")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); {remedy}") from error
        if list(array.shape) != description["shape"] or str(array.dtype) != description["dtype"]:
            raise ValueError(
                f"{file} holds {array.dtype} {list(array.shape)}, its manifest says {description['dtype']} "
                f"{description['shape']}; {remedy}"
            )
        arrays[name] = array
    return manifest, arrays


def verify_contents(
    path: str | Path, manifest: Mapping[str, Any], *, remedy: str, tell: Callable[[int], Any] | None = None
) -> None:
    """Read every array whole and compare its sha256 with the manifest; ValueError names the file that differs.

    `tell` is called with the number of bytes read since its last call.
    """
    for name, description in manifest["arrays"].items():
        file = Path(path) / f"{name}.npy"
        if describe_array(file, tell=tell)["sha256"] != description["sha256"]:
            raise ValueError(f"{file} does not have the bytes that its manifest was written for; {remedy}")


def refuse_to_replace_another_folder(path: Path, kind: str) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} exists and is a file; {with_article(kind)} is a folder, choose another output path")
    if any(path.iterdir()) and not (path / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{path} exists and is not {with_article(kind)}, it will not be replaced; choose another output path"
        )
    if (path / MANIFEST_NAME).is_file() and read_json(path / MANIFEST_NAME).get("kind") != kind:
        raise ValueError(
            f"{path} holds something other than {with_article(kind)}, it will not be replaced; choose another path"
        )


def create_once(target: Path, create: Any) -> None:
    """Make `target` with `create(temporary path)` unless another process was first: a link never replaces its file."""
    # Not the process id: ranks of several nodes may have the same one.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    create(temporary)
    try:
        os.link(temporary, target)
    except FileExistsError:
        logger.debug("%s was created by another process", target)
    finally:
        temporary.unlink()


def create_zeros(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """A .npy file of zeros; sparse, so that it costs no disk until its rows are written."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()


def save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def write_block(path: Path, start: int, block: np.ndarray) -> None:
    offset, row_bytes = row_layout(path)
    with open(path, "r+b") as file:
        file.seek(offset + start * row_bytes)
        file.write(block.data)
        file.flush()
        os.fsync(file.fileno())


def crc32_of_rows(path: Path, start: int, stop: int) -> int:
    """Read through the file, not a memory map, whose pages would stay with the process."""
    offset, row_bytes = row_layout(path)
    checksum, left = 0, (stop - start) * row_bytes
    with open(path, "rb") as file:
        file.seek(offset + start * row_bytes)
        while left and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
            checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return checksum


def row_layout(path: Path) -> tuple[int, int]:
    """Where the first row of a .npy file begins, and the bytes of a row."""
    array = np.load(path, mmap_mode="r")
    return array.offset, array.nbytes // len(array)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an empty one when it is damaged, which then matches nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def describe_array(
    path: Path, num_rows: int | None = None, *, tell: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Shape, dtype and sha256 of a .npy file; with `num_rows` those of a file that holds only its first rows."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = array.shape if num_rows is None else (num_rows, *array.shape[1:])
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if num_rows is None:
            left = path.stat().st_size
        else:
            digest.update(npy_header(array.dtype, shape))
            file.seek(array.offset)
            left = num_rows * (array.nbytes // len(array))
        while left and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
            if tell is not None:
                tell(len(chunk))
    return {"shape": list(shape), "dtype": str(array.dtype), "sha256": digest.hexdigest()}


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
