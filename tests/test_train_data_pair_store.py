import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

from mining.mds_files import sample_checksum
from tests.tar_shards import image_bytes, ingest, sample, write_tar
from train.data.pair_store import MDS_COLUMNS, PairStore, caption_hash, normalise_caption

CAPTIONS = ["a cat", "A  cat\n", "ein Haus", "\u00c5ngstr\u00f6m", "A\u030angstro\u0308m", "a dog", "a dog"]
IMAGES = [0, 1, 0, 3, 4, 3, 6]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of seven pairs in two shards: images and captions of some are equal."""
    folder = tmp_path_factory.mktemp("pairs")
    keys = [f"{number:03d}" for number in range(len(CAPTIONS))]
    pairs = [
        sample(key, caption, image_bytes(image)) for key, caption, image in zip(keys, CAPTIONS, IMAGES, strict=True)
    ]
    write_tar(folder / "0.tar", [member for pair in pairs[:3] for member in pair])
    write_tar(folder / "1.tar", [member for pair in pairs[3:] for member in pair])
    ingest(folder / "*.tar", folder / "store")
    return folder / "store"


@pytest.fixture
def store_folder(made, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "store")
    return tmp_path / "store"


class Pairs(Dataset):
    def __init__(self, store: PairStore, order: list[int]) -> None:
        self.store, self.order = store, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple:
        return tuple(self.store[self.order[index]])


def test_pairs_come_back_as_they_went_in(made):
    store = PairStore.open(made)
    assert len(store) == 7
    for pair_id, (caption, image) in enumerate(zip(CAPTIONS, IMAGES, strict=True)):
        assert store[pair_id] == (image_bytes(image), caption, pair_id, f"{pair_id:03d}")


def test_ledger_has_the_documented_columns_and_values(made):
    ledger = PairStore.open(made).ledger
    assert ledger.column_names == ["pair_id", "key", "shard", "image_sha256", "caption_hash", "width", "height"]
    assert ledger["pair_id"].to_pylist() == list(range(7))
    assert ledger["shard"].to_pylist() == ["0.tar"] * 3 + ["1.tar"] * 4
    assert ledger["image_sha256"].to_pylist() == [hashlib.sha256(image_bytes(image)).hexdigest() for image in IMAGES]
    assert set(zip(ledger["width"].to_pylist(), ledger["height"].to_pylist(), strict=True)) == {(24, 16)}


def test_groups_join_equal_images_and_equal_captions(made):
    store = PairStore.open(made)
    for groups, expected in ((store.image_group_N, IMAGES), (store.caption_group_N, [0, 0, 1, 2, 2, 3, 3])):
        assert groups.dtype == np.int32
        assert set(groups.tolist()) == set(range(len(set(expected))))
        equal = np.equal.outer(np.array(expected), np.array(expected))
        np.testing.assert_array_equal(np.equal.outer(groups, groups), equal)


def test_caption_hash_is_sha256_of_the_nfc_casefolded_collapsed_caption():
    assert caption_hash("  The \t STRASSE\n") == hashlib.sha256(b"the strasse").hexdigest()
    assert caption_hash("the stra\u00dfe") == hashlib.sha256(b"the strasse").hexdigest()
    assert normalise_caption("e\u0301t\u00e9\u00a0x") == "\u00e9t\u00e9 x"
    assert caption_hash("a cat") != caption_hash("a bat")


def test_streaming_reads_the_store_by_its_own_readers(made):
    from streaming import LocalDataset, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    expected = [
        {"image": s.image, "caption": s.caption, "pair_id": s.pair_id, "key": s.key} for s in PairStore.open(made)
    ]
    local = LocalDataset(str(made))
    assert [local[number] for number in range(len(local))] == expected
    clean_stale_shared_memory()
    streamed = StreamingDataset(local=str(made), shuffle=False, batch_size=1)
    assert [streamed[number] for number in range(len(streamed))] == expected
    assert [row["pair_id"] for row in streamed] == list(range(7))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_store_travels_into_dataloader_workers(made, start):
    store = PairStore.open(made)
    order = [6, 0, 3, 3, 1]
    loader = DataLoader(Pairs(store, order), batch_size=None, num_workers=1, multiprocessing_context=start)
    assert [tuple(row) for row in loader] == [tuple(store[pair_id]) for pair_id in order]


def test_pickle_leaves_out_what_was_loaded(made):
    store = PairStore.open(made)
    assert store.ledger.num_rows == len(store) == 7
    assert store[0].pair_id == 0
    assert len(pickle.dumps(store)) < 5_000
    assert pickle.loads(pickle.dumps(store))[4] == store[4]


def test_opening_does_not_import_streaming(made):
    code = "import sys; from train.data.pair_store import PairStore; s = PairStore.open(sys.argv[1]); s.image_group_N; "
    code += "print(len(s), 'streaming' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(made)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["7", "False"]


@pytest.mark.parametrize("pair_id", [-1, 7, 10**12])
def test_id_outside_the_store_is_an_index_error(made, pair_id):
    with pytest.raises(IndexError, match=r"0\.\.6"):
        PairStore.open(made)[pair_id]


def test_id_that_is_no_integer_is_a_type_error(made):
    with pytest.raises(TypeError):
        PairStore.open(made)["0"]


def test_path_that_is_no_store_is_refused(tmp_path, store_folder):
    with pytest.raises(ValueError, match=r"nowhere is not a folder.*train\.ingest"):
        PairStore.open(tmp_path / "nowhere")
    (store_folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json.*no complete PairStore.*train\.ingest"):
        PairStore.open(store_folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 99, "format version 99, this program reads version 1"),
        ("kind", "PairTable", "holds a 'PairTable', a PairStore was expected"),
        ("num_pairs", 8, "index.json holds 7 pairs, the manifest says 8"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(store_folder, field, value, message):
    path = store_folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message):
        PairStore.open(store_folder)


FILES = [
    "index.json",
    "ledger.parquet",
    "rejected.parquet",
    "checksums.npy",
    "shards/00001/shard.00000.mds",
]


@pytest.mark.parametrize("name", FILES)
def test_missing_or_truncated_file_is_refused_by_name(store_folder, name):
    path = store_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, \d+ were written; .*train\.ingest"):
        PairStore.open(store_folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing; .*train\.ingest"):
        PairStore.open(store_folder)


@pytest.mark.parametrize("name", ["index.json", "ledger.parquet", "checksums.npy"])
def test_garbage_of_the_right_size_is_refused_by_name(store_folder, name):
    path = store_folder / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        PairStore.open(store_folder)


def test_ledger_of_another_length_is_refused(store_folder):
    path = store_folder / "ledger.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    manifest = json.loads((store_folder / "manifest.json").read_text())
    manifest["files"]["ledger.parquet"] = path.stat().st_size
    (store_folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"ledger\.parquet holds 6 pairs, the manifest says 7"):
        PairStore.open(store_folder)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_any_flipped_bit_of_a_sample_is_found_and_the_shard_named(store_folder):
    """Every byte of the second sample of the first shard, its offsets in the file's head included."""
    path = store_folder / "shards/00000/shard.00000.mds"
    whole = path.read_bytes()
    begin, end = np.frombuffer(whole[8:16], np.uint32).tolist()
    store = PairStore.open(store_folder)
    good = store[1]
    for position in [*range(8, 16), *range(begin, end)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shards/00000/shard\.00000\.mds is damaged at pair_id 1 .*train\.ingest"):
            store[1]
    path.write_bytes(whole)
    assert store[1] == good


@pytest.mark.parametrize("keep", [0, 10, 700])
def test_shard_that_shrinks_after_opening_is_named(store_folder, keep):
    path = store_folder / "shards/00001/shard.00000.mds"
    store = PairStore.open(store_folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shards/00001/shard\.00000\.mds is damaged at pair_id 6"):
        store[6]
    path.unlink()
    with pytest.raises(ValueError, match=r"shards/00001/shard\.00000\.mds is damaged at pair_id 6"):
        store[6]


def test_stored_sample_ends_in_its_pair_id(made):
    """The layout that ingest relies on when it fills in ids, read here by hand from the file."""
    assert sorted(MDS_COLUMNS)[-1] == "pair_id"
    data = Path(made / "shards/00001/shard.00000.mds").read_bytes()
    count = int.from_bytes(data[:4], "little")
    ends = np.frombuffer(data[8 : 8 + 4 * count], np.uint32)
    assert [int.from_bytes(data[end - 8 : end], "little") for end in ends] == [3, 4, 5, 6]
    assert sample_checksum(b"abc" + bytes(8)) == 0x352441C2
