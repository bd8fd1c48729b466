"""Hard-pair lists of ten million pairs, four gigabytes: eight ranks of a node map one copy and plan from it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch.distributed

from mining.array_folder import create_zeros
from mining.manifest import write_manifest
from mining.pair_table import KIND, VERSION, PairTable, array_specs
from tests.ranks import run_on_ranks
from train.data.plan import EpochPlan

NUM_PAIRS, K, NUM_RANKS = 10_000_000, 50, 8
# Stretches of anchors all over the table.
ANCHORS = (np.arange(0, NUM_PAIRS, 250_000)[:, None] + np.arange(200)).ravel()
MIB = 1 << 20


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory) -> Path:
    """Sparse files: only the lists of the anchors take room on the disk."""
    folder = tmp_path_factory.mktemp("table")
    specs = array_specs(NUM_PAIRS, K)
    shapes = {name: (NUM_PAIRS, *spec.row_shape) for name, spec in specs.items()}
    for name, spec in specs.items():
        create_zeros(folder / f"{name}.npy", spec.dtype, shapes[name])
    lists = np.load(folder / "pair_ids.npy", mmap_mode="r+")
    lists[ANCHORS] = (ANCHORS[:, None] + 1 + np.arange(K)) % NUM_PAIRS
    lists.flush()
    arrays = {name: {"shape": list(shapes[name]), "dtype": spec.dtype} for name, spec in specs.items()}
    write_manifest(folder, KIND, VERSION, k=K, fingerprint="", arrays=arrays)
    return folder


def memory() -> dict[str, float]:
    """Of this process, in MiB: `anonymous` is its own; `files` are pages of mapped files, `files_share` after division by their users."""
    rollup = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {
        "anonymous": rollup["Anonymous"],
        "files": status["RssFile"],
        "files_share": rollup["Pss_File"],
        "peak": status["VmHWM"],
    }
    return {name: int(value.split()[0]) / 1024 for name, value in kib.items()}


def plan_on_rank(rank: int, world_size: int, folder: Path) -> dict[str, object]:
    """One epoch's draw over the anchors, as a rank's data set does it, weighed by score, which reads all three large arrays."""
    before = memory()
    table = PairTable.open(folder)
    plan = EpochPlan(
        seed=0,
        epoch=0,
        conflict_group_N=np.arange(len(table), dtype=np.int32),
        batch_size=4096,
        hard_per_anchor=1,
        pair_ids_NK=table.pair_ids_NK[:, :K],
        similarities_NK=(table.image_similarity_NK[:, :K], table.text_similarity_NK[:, :K]),
        is_anchor_N=np.isin(np.arange(len(table)), ANCHORS, assume_unique=True, kind="table"),
    )
    drawn = hashlib.sha256()
    num_listed = 0
    for step in range(plan.num_steps):
        groups_AP = plan.batch(step).groups_AP
        drawn.update(groups_AP)
        num_listed += int((groups_AP[:, 1] - groups_AP[:, 0] <= K).sum())
    # All ranks have read everything, and none has let go of it.
    torch.distributed.barrier()
    after = memory()
    torch.distributed.barrier()
    growth = {name: after[name] - before[name] for name in after}
    return {"growth": growth, "drawn": drawn.hexdigest(), "listed": num_listed}


@pytest.mark.slow
def test_eight_ranks_on_one_node_hold_one_copy_of_the_hard_pair_lists(table_folder):
    table_mib = sum(file.stat().st_size for file in table_folder.glob("*.npy")) / MIB
    assert table_mib > 4000
    ranks = run_on_ranks(plan_on_rank, NUM_RANKS, table_folder)
    for number, rank in enumerate(ranks):
        growth = rank["growth"]
        print(number, {name: f"{value:.0f} MiB" for name, value in growth.items()})
        # Of its own: the groups (4 bytes a pair), the anchors, and what a batch is made of; nothing that grows with K.
        assert growth["anonymous"] < 80
        # While it was built: some arrays of one number a pair.
        assert growth["peak"] < growth["files"] + 300
        # It did read: 200 bytes of ids and twice 100 of similarities for every anchor.
        assert growth["files"] > 400 * len(ANCHORS) / MIB
        # And the others read the same pages.
        assert growth["files_share"] < growth["files"] / NUM_RANKS * 1.5
    assert len({rank["drawn"] for rank in ranks}) == 1
    assert all(rank["listed"] == len(ANCHORS) for rank in ranks)
