"""Ranks of a search: real processes that meet in files, killed for real, one or all, at many moments; stray environments."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mining.array_folder
import mining.search
import mining.share
from mining import EmbeddingStore, PairTable
from mining.problem import SearchLimits
from mining.pruning import Pruning
from mining.ranks import Meeting, RankPlace, Wait, finishing_alone
from mining.reference import ReferenceSearch
from mining.search import search_pairs
from mining.summary import read_summary
from tests.embeddings import array_bytes, random_store
from tests.tiny_world import deepspeed, program

ROOT = Path(__file__).resolve().parent.parent
LIMITS = SearchLimits(k=4)
# So that there is something to do at the end, too.
PRUNING = Pruning(hub_cap=6)
NUM_PAIRS = 200


class SlowSearch(ReferenceSearch):
    def search(self, query_ids_Q):
        time.sleep(0.02)
        return super().search(query_ids_Q)


def search_slowly(store: Path, out: Path, place: RankPlace, patience_s: float) -> None:
    mining.search.make_backend = lambda choice, problem, *_, **__: SlowSearch(problem)
    search_pairs(EmbeddingStore.open(store), out, LIMITS, pruning=PRUNING, block=5, place=place, patience_s=patience_s)


def start(function, *arguments):
    # Forked from a server that has imported torch and run nothing (tests/conftest.py).
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def start_rank(folder: Path, place: RankPlace, patience_s: float = 60.0):
    return start(search_slowly, folder / "store", folder / "pairs", place, patience_s)


def blocks_done(folder: Path) -> int:
    return len(list(folder.glob(".pairs.partial-*/blocks/*.json")))


def wait_for_blocks(folder: Path, number: int, process) -> None:
    while blocks_done(folder) < number:
        assert process.is_alive(), "the search ended before it could be killed"
        time.sleep(0.002)


@pytest.fixture
def folder(tmp_path):
    """With an EmbeddingStore `store`, and `whole`, the table that one process makes in one go."""
    search_pairs(random_store(tmp_path / "store", NUM_PAIRS), tmp_path / "whole", LIMITS, pruning=PRUNING)
    return tmp_path


def assert_same_table(folder: Path) -> None:
    assert array_bytes(folder / "pairs") == array_bytes(folder / "whole")
    assert PairTable.open(folder / "pairs").fingerprint == PairTable.open(folder / "whole").fingerprint
    assert list(folder.glob(".*")) == []
    others = [path.name for path in (folder / "pairs").iterdir() if not path.name.endswith((".npy", ".json"))]
    assert others == ["excluded.parquet"]
    for name in others:
        assert (folder / "pairs" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_give_the_bytes_of_one_process(folder, world_size):
    ranks = [start_rank(folder, RankPlace(rank, world_size)) for rank in range(world_size)]
    for process in ranks:
        process.join()
    # Every rank waits for the whole table, so that exit code 0 means that it is there.
    assert [process.exitcode for process in ranks] == [0] * world_size
    assert_same_table(folder)


@pytest.mark.slow
def test_all_ranks_killed_at_any_moment_lose_at_most_a_block_each(folder):
    for blocks_before_kill in (3, 14, 27):
        ranks = [start_rank(folder, RankPlace(rank, 2)) for rank in range(2)]
        wait_for_blocks(folder, blocks_before_kill, ranks[0])
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert not (folder / "pairs").exists()
        assert blocks_done(folder) >= blocks_before_kill
    # On another number of ranks than before.
    last = start_rank(folder, RankPlace())
    last.join()
    assert last.exitcode == 0
    assert_same_table(folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_blocks_of_a_killed_rank_are_taken_over_by_the_others(folder, killed):
    ranks = [start_rank(folder, RankPlace(rank, 3), patience_s=1.5) for rank in range(3)]
    wait_for_blocks(folder, 6, ranks[killed])
    ranks[killed].kill()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0 if rank != killed else -signal.SIGKILL for rank in range(3)]
    assert_same_table(folder)


def search_with_long_pauses(store: Path, out: Path, place: RankPlace) -> None:
    mining.share.POLL_S = 2.0
    search_pairs(EmbeddingStore.open(store), out, LIMITS, pruning=PRUNING, place=place, patience_s=3600)


def test_a_rank_without_blocks_ends_with_the_table_though_it_is_finished_between_two_looks(folder):
    idle = start(search_with_long_pauses, folder / "store", folder / "pairs", RankPlace(1, 2))
    while not list(folder.glob(".pairs.partial-*/ranks/rank-00001.json")):
        assert idle.is_alive()
        time.sleep(0.01)
    search_pairs(
        EmbeddingStore.open(folder / "store"), folder / "pairs", LIMITS, pruning=PRUNING, place=RankPlace(0, 2)
    )
    idle.join(60)
    code = idle.exitcode
    idle.kill()
    assert code == 0
    assert_same_table(folder)


def finish_slowly(store: Path, out: Path, place: RankPlace, dies: bool) -> None:
    """A rank that takes its time, or ends, between clearing the folder and renaming it."""
    commit = mining.array_folder.commit_folder

    def slow_commit(temporary: Path, final: Path) -> None:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5)
        commit(temporary, final)

    mining.array_folder.commit_folder = slow_commit
    search_slowly(store, out, place, 60.0)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_rank_that_comes_while_another_finishes_waits_for_the_table_or_completes_it(folder, dies):
    first = start(finish_slowly, folder / "store", folder / "pairs", RankPlace(0, 1), dies)
    while not list(folder.glob(".pairs.partial-*/manifest.json")):
        assert first.is_alive()
        time.sleep(0.002)
    late = start_rank(folder, RankPlace(1, 2), patience_s=3.0)
    first.join()
    late.join()
    assert [first.exitcode, late.exitcode] == [-signal.SIGKILL if dies else 0, 0]
    assert_same_table(folder)


def count_and_kill(store: Path, out: Path, kill_at: int, calls_file: Path) -> None:
    """A search that ends by SIGKILL just before its kill_at-th call that changes a folder."""
    calls = 0

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    for module, name in ((os, "replace"), (os, "link"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    search_pairs(EmbeddingStore.open(store), out, LIMITS, pruning=PRUNING, block=100)
    calls_file.write_text(str(calls))


@pytest.mark.slow
def test_search_killed_before_any_change_of_a_folder_finishes_with_the_same_bytes(folder):
    def run(kill_at: int) -> int:
        process = start(count_and_kill, folder / "store", folder / "pairs", kill_at, folder / "calls")
        process.join()
        return process.exitcode

    assert run(0) == 0
    num_calls = int((folder / "calls").read_text())
    assert num_calls > 20
    # The last steps are those that finish the table: each of them, and some of the earlier ones.
    moments = [num_calls // 4, num_calls // 2, *range(num_calls - 8, num_calls + 1)]
    for kill_at in moments:
        shutil.rmtree(folder / "pairs")
        assert run(kill_at) == -signal.SIGKILL
        assert run(0) == 0
        assert_same_table_but_litter(folder)


def assert_same_table_but_litter(folder: Path) -> None:
    assert array_bytes(folder / "pairs") == array_bytes(folder / "whole")
    assert list(folder.glob(".*partial*")) == []
    # At most the empty lock file of a process that was killed between two steps.
    assert {path.name for path in (folder / "pairs").glob("*.lock")} <= {"finish.lock"}


@pytest.mark.slow
def test_deepspeed_and_torchrun_and_one_process_give_the_same_bytes(folder):
    def flags(out: str) -> list[str]:
        arguments = [
            "--embeddings",
            folder / "store",
            "--out",
            folder / out,
            "--k",
            "4",
            "--hub-cap",
            "6",
            "--block",
            "16",
        ]
        return ["search", *map(str, arguments)]

    program(*deepspeed(2, "--module", "mining.main", *flags("deepspeed")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    shown = program(*torchrun, "--module", "mining.main", *flags("torchrun"))
    # Rank 0 alone speaks.
    assert shown.stdout.count("pair table") == 1
    for out in ("deepspeed", "torchrun"):
        assert array_bytes(folder / out) == array_bytes(folder / "whole")


@pytest.mark.slow
def test_stray_rank_of_a_world_that_does_not_exist_names_the_missing_ranks_and_finishes(folder):
    environment = {**os.environ, "RANK": "2", "WORLD_SIZE": "3"}
    arguments = [
        "--embeddings",
        folder / "store",
        "--out",
        folder / "pairs",
        "--k",
        "4",
        "--hub-cap",
        "6",
        "--patience-s",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mining.main", "search", *map(str, arguments), "--block", "20"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 2 of 3 has waited: no sign of life from rank 0, 1 for 1 s" in done.stderr
    assert_same_table(folder)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set in the environment without its companion"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set in the environment without its companion"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 WORLD_SIZE=4 in the environment do not fit"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK=one WORLD_SIZE=4 in the environment are not numbers"),
    ],
)
def test_half_an_environment_is_an_error_with_its_remedy(environment, message):
    with pytest.raises(ValueError, match=re.escape(message) + ".*unset both for one process"):
        RankPlace.from_environment(environment)


def test_environment_of_a_launcher_gives_the_place():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert RankPlace.from_environment(environment) == RankPlace(5, 8, 1, 4)
    assert RankPlace.from_environment({}) == RankPlace(0, 1, 0, 1)


def test_a_rank_is_at_work_until_it_says_otherwise_or_falls_silent(tmp_path):
    with Meeting(tmp_path, RankPlace(0, 3), 0.6) as mine:
        with Meeting(tmp_path, RankPlace(1, 3), 0.6) as other:
            assert mine.silent_ranks() == []
            # Rank 2 may be starting.
            assert mine.ranks_at_work() == {1, 2}
            assert not other.should_finish()
            other.tell(is_working=False)
            assert mine.ranks_at_work() == {2}
            time.sleep(1.0)
            # Signs of life go on by themselves; rank 2 never came.
            assert mine.silent_ranks() == [2]
        time.sleep(1.0)
        assert mine.silent_ranks() == [1, 2]
        assert mine.ranks_at_work() == set()
        assert mine.should_finish()


def test_a_rank_that_waits_says_for_whom_and_again_only_after_twice_as_long(tmp_path, caplog):
    with Meeting(tmp_path, RankPlace(0, 3), 0.1), Meeting(tmp_path, RankPlace(2, 3), 0.1) as mine:
        wait = Wait(mine, "to be done")
        wait.tell({0, 1}, state=7)
        assert caplog.messages == []
        for _ in range(3):
            time.sleep(0.11)
            wait.tell({0, 1}, state=7)
        assert len(caplog.messages) == 2
        assert re.fullmatch(
            rf"rank 2 of 3 has waited for 0 s: it needs rank 0 \(process {os.getpid()} on .*\), rank 1 \(not seen yet\) to be done; .*",
            caplog.messages[0],
        )
        # Progress.
        wait.tell({0, 1}, state=6)
        assert len(caplog.messages) == 2


def test_who_waits_for_the_lock_says_who_holds_it(tmp_path, caplog):
    holds, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with finishing_alone(tmp_path, 60.0):
            holds.set()
            let_go.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(30)
    threading.Timer(1.0, let_go.set).start()
    with finishing_alone(tmp_path, 0.1):
        assert f"process {os.getpid()} on " in caplog.messages[0]
        assert "finishes this table and holds" in caplog.messages[0]
    holder.join()


def test_a_rank_that_finishes_in_place_of_one_that_never_came_checks_the_embeddings(tmp_path):
    store = random_store(tmp_path / "store", 40)
    with open(tmp_path / "store" / "text.npy", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\0")
    keywords = {"place": RankPlace(1, 2), "patience_s": 0.2}
    with pytest.raises(ValueError, match=r"text\.npy does not have the bytes"):
        search_pairs(store, tmp_path / "pairs", LIMITS, **keywords)
    assert not (tmp_path / "pairs").exists()
    # Its rows are there, so that somebody who knows better may have the table.
    search_pairs(store, tmp_path / "pairs", LIMITS, **keywords, check_embeddings=False)
    assert not read_summary(tmp_path / "pairs")["embeddings_checked"]


def test_signs_of_an_earlier_run_say_nothing_about_a_rank_that_is_starting(tmp_path):
    with Meeting(tmp_path, RankPlace(1, 2), 5.0):
        pass
    long_ago = time.time() - 1000
    os.utime(tmp_path / "ranks" / "rank-00001.json", (long_ago, long_ago))
    with Meeting(tmp_path, RankPlace(0, 2), 5.0) as mine:
        assert mine.silent_ranks() == []
