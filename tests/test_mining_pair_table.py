"""The PairTable: what it holds, its dtypes, and what is refused."""

import json

import numpy as np
import pytest

from mining import PairTable
from mining.pair_table import array_specs


def write_small(path, pair_ids_NK=((1, 2), (0, -1), (-1, -1)), **keywords):
    ids = np.array(pair_ids_NK)
    return PairTable.write(path, ids, np.full(ids.shape, 0.5), np.full(ids.shape, 0.25), **keywords)


def test_table_returns_what_was_written(tmp_path):
    write_small(tmp_path / "pairs", store_fingerprint="s", embeddings_fingerprint="e", parameters={"floor": 0.1})
    table = PairTable.open(tmp_path / "pairs")
    assert len(table) == 3
    assert table.k == 2
    assert table.pair_ids_NK.tolist() == [[1, 2], [0, -1], [-1, -1]]
    assert table.pair_ids_NK.dtype == np.int32
    assert table.image_similarity_NK.dtype == table.text_similarity_NK.dtype == np.float16
    assert table.noise_N.tolist() == [False, False, True]
    assert isinstance(table.pair_ids_NK, np.memmap)
    assert table.manifest["store_fingerprint"] == "s"
    assert table.manifest["embeddings_fingerprint"] == "e"
    assert table.manifest["parameters"] == {"floor": 0.1}


def test_ids_take_eight_bytes_above_two_to_the_31_pairs():
    assert array_specs(2**31 - 1, 3)["pair_ids"].dtype == "int32"
    assert array_specs(2**31, 3)["pair_ids"].dtype == "int64"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (((1, 3), (0, 2), (0, 1)), r"pair 0 lists the id 3"),
        (((1, 2), (0, 1), (0, 1)), "pair 1 lists itself"),
        (((1, 2), (-1, 0), (0, 1)), "pair 1 has an id after a -1"),
    ],
)
def test_lists_that_cannot_be_are_refused(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        write_small(tmp_path / "pairs", ids)


def test_table_of_another_version_or_cut_short_is_refused(tmp_path):
    write_small(tmp_path / "pairs")
    file = tmp_path / "pairs" / "noise.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"noise\.npy is damaged or cut short.*mining\.main search"):
        PairTable.open(tmp_path / "pairs")
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    (tmp_path / "pairs" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(ValueError, match="format version 2"):
        PairTable.open(tmp_path / "pairs")
    (tmp_path / "pairs" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PairTable.open(tmp_path / "pairs")
    (tmp_path / "pairs" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        PairTable.open(tmp_path / "pairs")
    with pytest.raises(ValueError, match="is not a folder"):
        PairTable.open(tmp_path / "nowhere")
