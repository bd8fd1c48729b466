"""The PairTable: what the search hands to training, the k hard pairs of every pair, memory-mapped.

Shape letters: N pairs, K neighbours, C causes of exclusion (`mining.duplicates.CAUSES`). One row per pair_id, so that a
rank reads only the rows it needs and all ranks of a node share the page cache.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mining.array_folder import ArrayFolderWriter, ArraySpec, open_arrays, verify_contents
from mining.problem import CAUSES, NO_PAIR
from mining.pruning import Pruning

KIND = "PairTable"
VERSION = 1
REMEDY = "make it with `python -m mining.main search --embeddings FOLDER --out FOLDER`"


class PairTable:
    """An opened PairTable; arrays are memory-mapped and read-only.

    Attributes: pair_ids_NK int32 (int64 above 2^31 pairs), descending score, ties by lower id, -1 = none, always at the
    end of a row; image_similarity_NK, text_similarity_NK float16 cosines, 0 where there is no pair (the order was
    decided on exact scores, before this rounding); certified_N bool, the row is proven exact; num_excluded_N int32,
    duplicates left out, and num_excluded_NC by cause; excluded_example_NC, the lowest excluded id of each cause or
    -1; noise_N bool, not to be used as anchor (its list is kept, and it may be somebody's hard pair); manifest with
    k, store_fingerprint, embeddings_fingerprint, parameters; fingerprint.

    A table from which false negatives or hubs were taken (`mining.pruning`) also has the lists as ranked, before that:
    ranked_ids_NK, ranked_image_similarity_NK, ranked_text_similarity_NK, and why an entry of them is out: false_negative_NK,
    hub_capped_NK bool. In other tables the ranked lists are the table's own, and the two masks are None.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.path = Path(path)
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.k: int = manifest["k"]
        self.pair_ids_NK = arrays["pair_ids"]
        self.image_similarity_NK = arrays["image_similarity"]
        self.text_similarity_NK = arrays["text_similarity"]
        self.certified_N = arrays["certified"]
        self.num_excluded_N = arrays["num_excluded"]
        self.num_excluded_NC = arrays["num_excluded_by_cause"]
        self.excluded_example_NC = arrays["excluded_example"]
        self.noise_N = arrays["noise"]
        self.ranked_ids_NK = arrays.get("ranked_ids", self.pair_ids_NK)
        self.ranked_image_similarity_NK = arrays.get("ranked_image_similarity", self.image_similarity_NK)
        self.ranked_text_similarity_NK = arrays.get("ranked_text_similarity", self.text_similarity_NK)
        self.false_negative_NK = arrays.get("false_negative")
        self.hub_capped_NK = arrays.get("hub_capped")
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.pair_ids_NK)

    @classmethod
    def open(cls, path: str | Path) -> "PairTable":
        """Open a finished table.

        Raises ValueError naming the file and the remedy when the folder is missing, unfinished, of another kind or
        format version, or when an array is missing, cut short or of another shape.
        """
        required = tuple(array_specs(1, 1))
        manifest, arrays = open_arrays(path, KIND, VERSION, required=required, remedy=REMEDY)
        return cls(path, manifest, arrays)

    def verify_contents(self) -> None:
        """Read all arrays and compare them with the checksums of the manifest; ValueError names the damaged file."""
        verify_contents(self.path, self.manifest, remedy=REMEDY)

    @classmethod
    def write(
        cls,
        path: str | Path,
        pair_ids_NK: np.ndarray,
        image_similarity_NK: np.ndarray,
        text_similarity_NK: np.ndarray,
        *,
        noise_N: np.ndarray | None = None,
        certified_N: np.ndarray | None = None,
        num_excluded_NC: np.ndarray | None = None,
        store_fingerprint: str = "",
        embeddings_fingerprint: str = "",
        parameters: dict[str, Any] | None = None,
    ) -> "PairTable":
        """Write a whole table at once and open it: for tests and for lists that come from elsewhere.

        Raises ValueError for ids outside -1..N-1, a pair that is its own hard pair, or an id after a -1.
        """
        num_pairs, k = np.shape(pair_ids_NK)
        writer = pair_table_writer(
            path,
            num_pairs,
            k,
            store_fingerprint=store_fingerprint,
            embeddings_fingerprint=embeddings_fingerprint,
            parameters=parameters or {},
            resume=False,
        )
        counts_NC = np.zeros((num_pairs, len(CAUSES)), np.int32) if num_excluded_NC is None else num_excluded_NC
        rows = {
            "pair_ids": checked_pair_ids(np.asarray(pair_ids_NK)),
            "image_similarity": image_similarity_NK,
            "text_similarity": text_similarity_NK,
            "certified": np.zeros(num_pairs, bool) if certified_N is None else certified_N,
            "num_excluded": counts_NC.sum(axis=1),
            "num_excluded_by_cause": counts_NC,
            "excluded_example": np.full((num_pairs, len(CAUSES)), NO_PAIR),
            "noise": np.asarray(pair_ids_NK)[:, 0] == NO_PAIR if noise_N is None else noise_N,
        }
        writer.write_rows(0, rows)
        writer.finish()
        return cls.open(path)


def pair_table_writer(
    path: str | Path,
    num_pairs: int,
    k: int,
    *,
    store_fingerprint: str,
    embeddings_fingerprint: str,
    parameters: dict[str, Any],
    more: Mapping[str, ArraySpec] | None = None,
    resume: bool = True,
) -> ArrayFolderWriter:
    """Writer of a PairTable by blocks of rows, resuming one with the same parameters.

    Its arrays are those of `array_specs`, or the ranked lists where `parameters` ask for pruning (`mining.pruning`), and `more`.
    """
    if k < 1:
        raise ValueError(f"k={k}, but a PairTable keeps at least 1 hard pair a row")
    fields = {
        "k": k,
        "store_fingerprint": store_fingerprint,
        "embeddings_fingerprint": embeddings_fingerprint,
        "parameters": parameters,
        "causes": list(CAUSES),
    }
    specs = {**Pruning.of(parameters).searched_specs(array_specs(num_pairs, k)), **(more or {})}
    return ArrayFolderWriter(path, KIND, VERSION, num_pairs, specs, fields=fields, resume=resume)


def array_specs(num_pairs: int, k: int) -> dict[str, ArraySpec]:
    id_dtype = "int32" if num_pairs <= np.iinfo(np.int32).max else "int64"
    return {
        "pair_ids": ArraySpec((k,), id_dtype),
        "image_similarity": ArraySpec((k,), "float16"),
        "text_similarity": ArraySpec((k,), "float16"),
        "certified": ArraySpec((), "bool"),
        "num_excluded": ArraySpec((), "int32"),
        "num_excluded_by_cause": ArraySpec((len(CAUSES),), "int32"),
        "excluded_example": ArraySpec((len(CAUSES),), id_dtype),
        "noise": ArraySpec((), "bool"),
    }


def checked_pair_ids(pair_ids_NK: np.ndarray) -> np.ndarray:
    num_pairs = len(pair_ids_NK)
    outside_NK = (pair_ids_NK < NO_PAIR) | (pair_ids_NK >= num_pairs)
    if outside_NK.any():
        row, column = np.argwhere(outside_NK)[0]
        raise ValueError(f"pair {row} lists the id {pair_ids_NK[row, column]}, ids must lie in -1..{num_pairs - 1}")
    own_N = (pair_ids_NK == np.arange(num_pairs)[:, None]).any(axis=1)
    if own_N.any():
        raise ValueError(f"pair {int(np.argmax(own_N))} lists itself as a hard pair")
    late_N = ((pair_ids_NK[:, 1:] != NO_PAIR) & (pair_ids_NK[:, :-1] == NO_PAIR)).any(axis=1)
    if late_N.any():
        raise ValueError(f"pair {int(np.argmax(late_N))} has an id after a -1; -1 may only fill the end of a row")
    return pair_ids_NK
