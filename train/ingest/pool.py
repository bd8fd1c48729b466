"""Fragments of many source shards at once: worker processes, progress, and what happens when something fails.

In: the shards that are still to do. Out: their fragments. One shard that cannot be read does not stop the others; it is
named at the end.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile
from tqdm import tqdm

from train.data.pair_store import SHARDS_FOLDER
from train.ingest.plan import Parameters
from train.ingest.sources import Source, UnreadableShard
from train.ingest.worker import fragment_folder, ingest_shard

# Imported once in the fork server, so that a worker starts in milliseconds.
PRELOADED = ["streaming", "webdataset", "pyarrow.parquet", "PIL.Image"]
MAX_UNREADABLE_SHARDS = 8
REFRESH_S = 0.5
REPORT_EVERY_SAMPLES = 16
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} shards [{elapsed}<{remaining}{postfix}]"

# The worker's end of the two counters (shards with fractions, samples); set by start_worker.
_counters: Any = None


def start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    # A group of its own: Ctrl-C reaches only the main process, and the worker can be ended with its `pipe:` command.
    os.setpgrp()
    # --max-pixels is the limit, checked before decoding.
    Image.MAX_IMAGE_PIXELS = None
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever, and hold the shard it writes."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def kill_group(worker: BaseProcess) -> None:
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has not come to start_worker yet, or is gone.
        worker.kill()


def run_shard(number: int, source: Source, out: Path, parameters: Parameters) -> None:
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if done - reported >= REPORT_EVERY_SAMPLES or done == total:
            with _counters.get_lock():
                _counters[0] += (done - reported) / total
                _counters[1] += done - reported
            reported = done

    ingest_shard(source, fragment_folder(out / SHARDS_FOLDER, number), parameters, report)


def ingest_shards(sources: Sequence[Source], out: Path, parameters: Parameters, workers: int) -> None:
    """Make the fragment of every shard that has none yet.

    Raises ValueError naming the shards that could not be read, after all others are done, and when a worker dies.
    """
    jobs = [job for job in enumerate(sources) if not fragment_folder(out / SHARDS_FOLDER, job[0]).is_dir()]
    if not jobs:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    counters = context.Array("d", 2)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=start_worker, initargs=(counters,)
    )
    bar = tqdm(desc="ingest", total=len(sources), bar_format=BAR_FORMAT, dynamic_ncols=True)
    try:
        # The first submit starts the fork server, which takes seconds: the bar is there before.
        futures = [pool.submit(run_shard, number, source, out, parameters) for number, source in jobs]
        unreadable = watch(futures, counters, bar)
        pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, most often for lack of memory; run the same command again with fewer --workers"
        ) from error
    except BaseException:
        # Ctrl-C, a full disk: what the workers are writing is given up, fragments are whole or absent.
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            kill_group(worker)
        raise
    finally:
        bar.close()
    if unreadable:
        raise ValueError(
            f"{unreadable[0]} ({len(unreadable)} of {len(sources)} shards failed); finished shards are kept: run the "
            "same command again when it can be read"
        )


def watch(futures: list[Future], counters: Any, bar: tqdm) -> list[str]:
    """Wait for all, showing progress; returns what could not be read, and gives up early when that is too much."""
    unreadable = []
    finished_before = bar.total - len(futures)
    # Shards of an earlier run count as done, not as speed.
    bar.initial = bar.n = finished_before
    pending = set(futures)
    start_s = time.monotonic()
    while pending and len(unreadable) < MAX_UNREADABLE_SHARDS:
        done, pending = wait(pending, timeout=REFRESH_S, return_when=FIRST_COMPLETED)
        for future in done:
            if isinstance(future.exception(), UnreadableShard):
                unreadable.append(str(future.exception()))
            else:
                future.result()
        num_samples = int(counters[1])
        rate = num_samples / (time.monotonic() - start_s)
        bar.set_postfix_str(f"{num_samples:,} pairs, {rate:,.0f} pair/s", refresh=False)
        bar.n = round(finished_before + counters[0], 3)
        bar.refresh()
    return unreadable
