"""Many source shards at once: worker processes, progress, and what happens when something fails.

In: what to do with a shard, and the shards that are still to do. Out: the results, as they come. One shard that cannot
be read does not stop the others; it is named at the end.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from PIL import Image, ImageFile
from tqdm import tqdm

from train.ingest.samples import Report
from train.ingest.sources import Source, UnreadableShard

# Imported once in the fork server, so that a worker starts in milliseconds.
PRELOADED = ["mining.mds", "train.ingest.worker"]
MAX_UNREADABLE_SHARDS = 8
# Shards handed to the pool ahead of the workers: enough that none waits, few enough that memory does not grow with them.
AHEAD_PER_WORKER = 4
REFRESH_S = 0.5
REPORT_EVERY_SAMPLES = 16
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} shards [{elapsed}<{remaining}{postfix}]"

# What is done with one shard: (number, source, report) -> result, both picklable.
Work = Callable[[int, Source, Report], Any]

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


def run_shard(work: Work, number: int, source: Source) -> Any:
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if done - reported >= REPORT_EVERY_SAMPLES or done == total:
            with _counters.get_lock():
                _counters[0] += (done - reported) / total
                _counters[1] += done - reported
            reported = done

    result = work(number, source, report)
    if not reported:
        # A shard without keys is done as well.
        with _counters.get_lock():
            _counters[0] += 1
    return result


def run_on_shards(
    work: Work,
    jobs: Sequence[tuple[int, Source]],
    *,
    workers: int,
    num_finished: int = 0,
    on_result: Callable[[Any], None] = lambda result: None,
    description: str = "ingest",
    remedy: str = "run the same command again",
    preloaded: Sequence[str] = PRELOADED,
) -> None:
    """Call `work` for every job in worker processes, and `on_result` here with each result, in the order they come.

    `num_finished` shards of an earlier run only count in the progress bar. Raises ValueError naming the shards that could
    not be read, after all others are done, and when a worker dies.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    counters = context.Array("d", 2)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=start_worker, initargs=(counters,)
    )
    bar = tqdm(desc=description, total=num_finished + len(jobs), bar_format=BAR_FORMAT, dynamic_ncols=True)
    try:
        # The first submit starts the fork server, which takes seconds: the bar is there before.
        submitted = (pool.submit(run_shard, work, number, source) for number, source in jobs)
        unreadable = watch(submitted, AHEAD_PER_WORKER * workers, counters, num_finished, bar, on_result)
        pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process died, most often for lack of memory; {remedy} with fewer --workers"
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
            f"{unreadable[0]} ({len(unreadable)} of {bar.total} shards failed); {remedy} when it can be read"
        )


def watch(
    submitted: Iterator[Future],
    num_ahead: int,
    counters: Any,
    num_finished: int,
    bar: tqdm,
    on_result: Callable[[Any], None],
) -> list[str]:
    """Wait for all, showing progress; returns what could not be read, and gives up early when that is too much."""
    unreadable = []
    # Shards of an earlier run count as done, not as speed.
    bar.initial = bar.n = num_finished
    pending = set(itertools.islice(submitted, num_ahead))
    start_s = shown_s = time.monotonic()
    while pending and len(unreadable) < MAX_UNREADABLE_SHARDS:
        done, pending = wait(pending, timeout=REFRESH_S, return_when=FIRST_COMPLETED)
        # Before the results are looked at, so that the workers go on meanwhile.
        pending |= set(itertools.islice(submitted, len(done)))
        for future in done:
            if isinstance(future.exception(), UnreadableShard):
                unreadable.append(str(future.exception()))
            else:
                on_result(future.result())
        now_s = time.monotonic()
        # Not at every shard: a thousand small ones would fill the terminal's log.
        if now_s - shown_s >= REFRESH_S or not pending:
            shown_s = now_s
            num_samples = int(counters[1])
            bar.set_postfix_str(f"{num_samples:,} pairs, {num_samples / (now_s - start_s):,.0f} pair/s", refresh=False)
            bar.n = round(num_finished + counters[0], 3)
            bar.refresh()
    return unreadable
