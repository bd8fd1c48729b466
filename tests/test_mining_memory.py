"""Memory of a search, measured on a real process: a base of two gigabytes may pass, it may not stay."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mining.array_folder import ArrayFolderWriter, ArraySpec
from mining.embedding_store import KIND, VERSION
from mining.pair_table import array_specs
from mining.problem import SearchProblem
from mining.pruning import Pruning, finish_lists
from mining.rows import BaseStream, drop_pages, read_rows
from mining.summary import count_rows

ROOT = Path(__file__).resolve().parent.parent
NUM_PAIRS, DIM, NUM_QUERIES = 1_000_000, 512, 2048
PARTNER_OF_FIRST = 917_331
LIMIT_KIB = 1.5 * 2**20
# Pages of libraries that come in while a test runs; the arrays have ten times as many.
SLACK_KIB = 6_000
# The program as `python -m mining.main` runs it, and what it took.
PROGRAM = """
import sys
from mining.main import main
main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def unit_rows(seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((65536, DIM), dtype=np.float32) + 0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_store(path: Path) -> None:
    """A million pairs: the columns of 65,536 rows, shifted by another number in every block, so that no two are alike."""
    # Past the store's own writer, whose checks would take as long as the writing.
    specs = {
        "image": ArraySpec((DIM,), "float16"),
        "text": ArraySpec((DIM,), "float16"),
        "valid": ArraySpec((), "bool"),
    }
    writer = ArrayFolderWriter(path, KIND, VERSION, NUM_PAIRS, specs)
    towers = [unit_rows(0), unit_rows(1)]
    for number, start in enumerate(range(0, NUM_PAIRS, 65536)):
        rows = [
            np.roll(tower, shift * number, axis=1)[: NUM_PAIRS - start]
            for tower, shift in zip(towers, (7, 31), strict=True)
        ]
        if start <= PARTNER_OF_FIRST < start + len(rows[0]):
            for tower, block in zip(towers, rows, strict=True):
                # Nearly the first pair, in another block than its own.
                near = tower[0].astype(np.float32) + 0.02 * tower[1]
                block[PARTNER_OF_FIRST - start] = near / np.linalg.norm(near)
        writer.write_rows(start, {"image": rows[0], "text": rows[1], "valid": np.ones(len(rows[0]), bool)})
    writer.finish()


@pytest.mark.slow
def test_search_over_a_million_pairs_stays_below_one_and_a_half_gibibytes(tmp_path):
    write_store(tmp_path / "store")
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "store").glob("*.npy")) > 2.04e9
    flags = ["search", "--embeddings", tmp_path / "store", "--out", tmp_path / "pairs"]
    flags += ["--queries", f"0:{NUM_QUERIES}", "--no-check-embeddings"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak_kib = int(done.stdout.split("VmHWM:")[1].split()[0])
    print(f"peak resident memory: {peak_kib / 2**20:.2f} GiB")
    assert peak_kib < LIMIT_KIB
    assert "pair/s" in done.stderr
    (partial,) = tmp_path.glob(".pairs.partial-*")
    pair_ids_NK = np.load(partial / "pair_ids.npy", mmap_mode="r")
    assert pair_ids_NK[0, 0] == PARTNER_OF_FIRST
    assert (pair_ids_NK[:NUM_QUERIES] >= 0).all()
    assert np.load(partial / "certified.npy", mmap_mode="r")[:NUM_QUERIES].all()


@pytest.fixture
def mapped(tmp_path):
    """A memory-mapped array of 64 MiB that counts its rows."""
    rows = np.arange(16384)[:, None] * np.ones((1, 1024))
    writer = ArrayFolderWriter(tmp_path / "folder", "Rows", 1, 16384, {"rows": ArraySpec((1024,), "float32")})
    writer.write_rows(0, {"rows": rows})
    return writer.read_rows("rows")


def resident_file_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1])


def test_pages_of_rows_that_were_read_are_dropped(mapped):
    before_kib = resident_file_kib()
    assert np.asarray(mapped).sum() > 0
    assert resident_file_kib() > before_kib + 60_000
    drop_pages(mapped)
    assert resident_file_kib() < before_kib + SLACK_KIB
    rows = read_rows(mapped, slice(None))
    some = read_rows(mapped, np.random.default_rng(0).permutation(16384))
    assert resident_file_kib() < before_kib + SLACK_KIB
    assert rows[9000, 3] == 9000
    assert np.sort(some[:, 0]).tolist() == list(range(16384))


def test_final_lists_and_summary_of_a_mapped_table_leave_no_pages_behind(tmp_path):
    # Equal rows, and a cap that nothing reaches: what costs here is reading alone.
    specs = Pruning(hub_cap=10**6).searched_specs(array_specs(131_072, 50))
    writer = ArrayFolderWriter(tmp_path / "folder", "Rows", 1, 131_072, specs)
    rows = {name: np.zeros((131_072, *spec.row_shape), spec.dtype) for name, spec in specs.items()}
    rows["ranked_ids"] += np.arange(1, 51, dtype=np.int32)
    writer.write_rows(0, rows)
    before_kib = resident_file_kib()
    finish_lists(writer, Pruning(hub_cap=10**6), array_specs(131_072, 50))
    tables = {name: writer.read_rows(name) for name in [*writer.specs, *writer.derived_specs]}
    assert sum(array.nbytes for array in tables.values()) > 100 << 20
    counted = count_rows(tables)
    assert counted["in_degree_N"][:52].tolist() == [0, *[131_072] * 50, 0]
    assert resident_file_kib() < before_kib + 20_000


def test_rows_are_read_as_indexing_reads_them(mapped):
    for ids in (slice(3, 9), slice(16380, 99999), slice(7, 7), np.array([5, 5, 0, 16383]), np.zeros(0, np.int64)):
        np.testing.assert_array_equal(read_rows(mapped, ids), mapped[ids])
        np.testing.assert_array_equal(read_rows(np.array(mapped), ids), mapped[ids])


@pytest.mark.parametrize("block_rows", [1, 7, 50, 64, 1000])
def test_blocks_of_the_base_hold_every_row_once_in_order(tmp_path, block_rows):
    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((50, width)).astype(np.float16) for width in (3, 5))
    problem = SearchProblem(image, text, np.ones(50, bool), None, None, limits=None)
    stream = BaseStream(problem, torch.device("cpu"), block_rows=block_rows)
    for within, first, last in ((None, 0, 50), (slice(11, 38), 11, 38), (slice(40, 400), 40, 50)):
        blocks = [(block.rows, block.image_BD.clone(), block.text_BD.clone()) for block in stream.blocks(within)]
        assert [row for rows, _, _ in blocks for row in range(rows.start, rows.stop)] == list(range(first, last))
        np.testing.assert_array_equal(torch.cat([images for _, images, _ in blocks]), image[first:last])
        np.testing.assert_array_equal(torch.cat([texts for _, _, texts in blocks]), text[first:last])
