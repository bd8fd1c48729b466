"""The EmbeddingStore: what `train.embed` hands to the search, an image and a text row per pair, in pair_id order.

Shape letters: N pairs, B rows of one block, D embedding width (image and text may differ). The folder holds `image.npy`
and `text.npy` [N, D] float16 unit rows, `valid.npy` [N] bool, optionally `alignment.npy` [N] float32 and the duplicate
groups `image_group.npy`, `caption_group.npy` [N] int32, and `manifest.json`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mining.array_folder import ArrayFolderWriter, ArraySpec, open_arrays, verify_contents

KIND = "EmbeddingStore"
VERSION = 1
REMEDY = "make it with `deepspeed --module train.embed --checkpoint RUN --store PAIRSTORE --out FOLDER`"
# A unit row rounded to bfloat16 has a norm within 2^-9 of one; float16 within 2^-12.
UNIT_NORM_TOLERANCE = 5e-3
WRITE_BLOCK_ROWS = 65536


class EmbeddingStore:
    """An opened EmbeddingStore; arrays are memory-mapped and read-only.

    Attributes: image_ND, text_ND float16 unit rows (zeros where invalid); valid_N bool, False for pairs whose encoder
    output was not finite; alignment_N float32 own image-text cosine, or None; image_group_N, caption_group_N int32,
    equal numbers for equal image bytes or equal normalised captions, or None; manifest; fingerprint (over all
    contents).
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.path = Path(path)
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.image_ND = arrays["image"]
        self.text_ND = arrays["text"]
        self.valid_N = arrays["valid"]
        self.alignment_N = arrays.get("alignment")
        self.image_group_N = arrays.get("image_group")
        self.caption_group_N = arrays.get("caption_group")

    def __len__(self) -> int:
        return len(self.image_ND)

    @classmethod
    def open(cls, path: str | Path) -> "EmbeddingStore":
        """Open a finished store.

        Raises ValueError naming the file and the remedy when the folder is missing, unfinished, of another kind or
        format version, or when an array is missing, cut short or of another shape.
        """
        required = ("image", "text", "valid")
        manifest, arrays = open_arrays(path, KIND, VERSION, required=required, remedy=REMEDY)
        return cls(path, manifest, arrays)

    def verify_contents(self, *, tell: Callable[[int], Any] | None = None) -> None:
        """Read all arrays and compare them with the checksums of the manifest; ValueError names the damaged file.

        `tell` is called with the number of bytes read since its last call.
        """
        verify_contents(self.path, self.manifest, remedy=REMEDY, tell=tell)

    @classmethod
    def write(
        cls,
        path: str | Path,
        image_ND: np.ndarray | torch.Tensor,
        text_ND: np.ndarray | torch.Tensor,
        *,
        alignment_N: np.ndarray | torch.Tensor | None = None,
        image_group_N: np.ndarray | None = None,
        caption_group_N: np.ndarray | None = None,
        **manifest: Any,
    ) -> "EmbeddingStore":
        """Write a whole store at once and open it; arguments and errors as in `writer` and `write_rows`."""
        for name, rows in (("image_ND", image_ND), ("text_ND", text_ND)):
            if rows.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(rows.shape)}, it must be [N, D]")
        if len(image_ND) != len(text_ND):
            raise ValueError(f"{len(image_ND)} image rows but {len(text_ND)} text rows; each pair needs one of each")
        writer = cls.writer(
            path,
            len(image_ND),
            image_ND.shape[1],
            text_ND.shape[1],
            has_alignment=alignment_N is not None,
            image_group_N=image_group_N,
            caption_group_N=caption_group_N,
            resume=False,
            **manifest,
        )
        for start in range(0, len(image_ND), WRITE_BLOCK_ROWS):
            stop = start + WRITE_BLOCK_ROWS
            alignment_B = None if alignment_N is None else alignment_N[start:stop]
            writer.write_rows(start, image_ND[start:stop], text_ND[start:stop], alignment_B)
        return writer.finish()

    @classmethod
    def writer(
        cls,
        path: str | Path,
        num_pairs: int,
        image_dim: int,
        text_dim: int,
        *,
        has_alignment: bool,
        image_group_N: np.ndarray | None = None,
        caption_group_N: np.ndarray | None = None,
        resume: bool = True,
        **manifest: Any,
    ) -> "EmbeddingWriter":
        """Start a store, or go on with an interrupted one that has the same shape, groups and `manifest` entries.

        image_group_N, caption_group_N: integers [N] >= 0. `manifest`: JSON values; embed passes encoder (str),
        checkpoint_hash (str) and store_fingerprint (str). `resume=False` drops rows of an interrupted run. Raises
        ValueError for widths below 1, groups of another length, or an existing `path` that is not an EmbeddingStore.
        """
        return EmbeddingWriter(
            path, num_pairs, image_dim, text_dim, has_alignment, image_group_N, caption_group_N, resume, manifest
        )


class EmbeddingWriter:
    """Writes an EmbeddingStore by blocks of rows; several ranks may write disjoint rows of the same path.

    `rows_done` is bool [N]: rows already on disk, from an interrupted run or written by this process.
    """

    def __init__(
        self,
        path: str | Path,
        num_pairs: int,
        image_dim: int,
        text_dim: int,
        has_alignment: bool,
        image_group_N: np.ndarray | None,
        caption_group_N: np.ndarray | None,
        resume: bool,
        manifest: dict[str, Any],
    ):
        for name, width in (("image_dim", image_dim), ("text_dim", text_dim)):
            if width < 1:
                raise ValueError(f"{name}={width}, but an embedding needs at least 1 column")
        specs = {
            "image": ArraySpec((image_dim,), "float16"),
            "text": ArraySpec((text_dim,), "float16"),
            "valid": ArraySpec((), "bool"),
        }
        if has_alignment:
            specs["alignment"] = ArraySpec((), "float32")
        groups = {"image_group": image_group_N, "caption_group": caption_group_N}
        whole = {name: checked_groups(name, group, num_pairs) for name, group in groups.items() if group is not None}
        self._folder = ArrayFolderWriter(
            path, KIND, VERSION, num_pairs, specs, whole=whole, fields=manifest, resume=resume
        )
        self.has_alignment = has_alignment

    @property
    def rows_done(self) -> np.ndarray:
        return self._folder.rows_done

    def write_rows(
        self,
        start: int,
        image_BD: np.ndarray | torch.Tensor,
        text_BD: np.ndarray | torch.Tensor,
        alignment_B: np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Store pairs start..start+B; durable on return.

        image_BD, text_BD: float (any width of float, tensor or array) unit rows, stored as float16. A pair with a NaN
        or an infinity in either row is stored as invalid: zeros, never an anchor and never a hard pair. alignment_B:
        float [B], given exactly when the store was started with has_alignment. Raises ValueError naming the pair
        whose row is not of unit length, and for wrong shapes.
        """
        if (alignment_B is not None) != self.has_alignment:
            state = "with" if self.has_alignment else "without"
            raise ValueError(
                f"this EmbeddingStore was started {state} alignment, but rows from {start} differ from that"
            )
        image_BD, text_BD = as_float_array(image_BD), as_float_array(text_BD)
        for name, rows in (("image_BD", image_BD), ("text_BD", text_BD)):
            if rows.ndim != 2:
                raise ValueError(f"{name} at row {start} has shape {rows.shape}, it must be [B, D]")
        if len(image_BD) != len(text_BD):
            raise ValueError(f"{len(image_BD)} image rows but {len(text_BD)} text rows at row {start}")
        valid_B = np.isfinite(image_BD).all(axis=1) & np.isfinite(text_BD).all(axis=1)
        rows = {
            "image": checked_unit_rows("image", start, image_BD, valid_B),
            "text": checked_unit_rows("text", start, text_BD, valid_B),
            "valid": valid_B,
        }
        if alignment_B is not None:
            rows["alignment"] = checked_alignment(start, as_float_array(alignment_B), valid_B)
        self._folder.write_rows(start, rows)

    def finish(self) -> EmbeddingStore:
        """Seal the store and open it; one rank calls it after all ranks have written (a barrier is the caller's).

        Raises ValueError naming the first row that nobody wrote.
        """
        self._folder.finish()
        return EmbeddingStore.open(self._folder.path)


def as_float_array(rows: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(rows, torch.Tensor):
        # numpy has no bfloat16.
        rows = rows.detach().to("cpu", torch.float32).numpy()
    rows = np.asarray(rows)
    if rows.dtype.kind != "f":
        raise ValueError(f"embeddings must be floating point, got {rows.dtype}")
    return rows


def checked_unit_rows(name: str, start: int, rows_BD: np.ndarray, valid_B: np.ndarray) -> np.ndarray:
    """float16 rows, zeros where invalid; ValueError naming the first valid row that is not of unit length."""
    rows_BD = np.where(valid_B[:, None], rows_BD, 0.0)
    # numpy is several times slower on sixteen bits.
    norm_B = torch.linalg.vector_norm(torch.from_numpy(rows_BD).float(), dim=1).numpy()
    wrong_B = valid_B & (np.abs(norm_B - 1.0) > UNIT_NORM_TOLERANCE)
    if wrong_B.any():
        row = int(np.argmax(wrong_B))
        raise ValueError(
            f"{name} embedding of pair {start + row} has length {norm_B[row]:.4g}, rows must have length 1 (within "
            f"{UNIT_NORM_TOLERANCE}); normalise the features before writing them"
        )
    return rows_BD.astype(np.float16)


def checked_alignment(start: int, alignment_B: np.ndarray, valid_B: np.ndarray) -> np.ndarray:
    if alignment_B.shape != valid_B.shape:
        raise ValueError(f"alignment at row {start} has shape {alignment_B.shape}, the block has {len(valid_B)} rows")
    wrong_B = valid_B & ~np.isfinite(alignment_B)
    if wrong_B.any():
        raise ValueError(f"alignment of pair {start + int(np.argmax(wrong_B))} is not finite although its rows are")
    return np.where(valid_B, alignment_B, 0.0).astype(np.float32)


def checked_groups(name: str, group_N: np.ndarray, num_pairs: int) -> np.ndarray:
    group_N = np.asarray(group_N)
    if group_N.shape != (num_pairs,) or group_N.dtype.kind not in "iu":
        raise ValueError(
            f"{name} is {group_N.dtype} {group_N.shape}, it must be one integer for each of {num_pairs} pairs"
        )
    if group_N.min() < 0 or group_N.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{name} has numbers outside 0..2^31-1; use dense group numbers")
    return group_N.astype(np.int32)
