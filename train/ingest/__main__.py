"""The program `python -m train.ingest`: tar shards of image-text pairs into a PairStore."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mining.command_line import parse, run
from mining.manifest import MANIFEST_NAME
from train.data.pair_store import REJECTED_NAME, SHARDS_FOLDER, PairStore
from train.ingest.commits import NUM_THREADS, Commits
from train.ingest.config import IngestConfig, check_config, parameters_of
from train.ingest.finish import describe_rejected, finish_store, in_order_of_frequency, remove_fragment_files
from train.ingest.numbering import Numbering, fragment_at
from train.ingest.parts import Part, begin_part, check_parts, end_part, parse_part, remove_parts
from train.ingest.plan import (
    PLAN_NAME,
    Plan,
    check_same_parameters,
    locked_folder,
    make_plan,
    prepare_folder,
    read_plan,
    remove_leftovers,
    remove_private,
)
from train.ingest.pool import run_on_shards
from train.ingest.source_table import describe
from train.ingest.sources import Source, expand_shards
from train.ingest.survey import describe_survey, survey_shards
from train.ingest.worker import fragment_folder, make_fragment

PROGRAM = "python -m train.ingest"
DESCRIPTION = """Turn tar shards of image-text pairs (as img2dataset writes CC3M, CC12M, YFCC15M) into a PairStore.

A sample is KEY.jpg (or .jpeg, .png, .webp) with its caption in KEY.txt and, if you have it, KEY.json. Image bytes and
captions are kept as found unless you ask for --reencode. Samples that cannot be used are left out and listed in
OUT/rejected.parquet with the reason. Killed or interrupted? Run the same command again: finished shards are not done again.

  python -m train.ingest --shards 'cc12m/{00000..01242}.tar' --out data/cc12m --workers 16

What would be kept, and how large would it be? Add --dry-run.

On 8 nodes, all into the same --out, for example as a Slurm array 0-7:
  python -m train.ingest --shards 'cc12m/{00000..01242}.tar' --out data/cc12m --part $SLURM_ARRAY_TASK_ID/8
  python -m train.ingest --out data/cc12m --merge          (once, when all parts are done)"""
INTERRUPTED_EXIT_CODE = 130


def main(arguments: Sequence[str]) -> None:
    start_s = time.monotonic()
    config = parse(IngestConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    check_config(config)
    part = None if config.part is None else parse_part(config.part)
    if config.dry_run:
        print(dry_run(config, part, start_s))
    elif part is not None:
        print(ingest_part(config, part, start_s))
    elif config.merge:
        print(merge(config, start_s))
    else:
        print(ingest_all(config, start_s))


def ingest_all(config: IngestConfig, start_s: float) -> str:
    sources = expand_shards(config.shards)
    plan = make_plan(sources, parameters_of(config))
    with locked_folder(config.out):
        prepare_folder(config.out, plan)
        if is_complete(config.out):
            return finished(config.out, plan, None)
        jobs = list(enumerate(sources))
        make_fragments(config, plan, jobs, Numbering(config.out, plan))
        return make_store(config, plan, start_s)


def ingest_part(config: IngestConfig, part: Part, start_s: float) -> str:
    sources = expand_shards(config.shards)
    plan = make_plan(sources, parameters_of(config))
    with locked_folder(config.out, str(part)):
        prepare_folder(config.out, plan)
        if is_complete(config.out):
            return f"{config.out} is already complete: all parts are merged"
        begin_part(config.out, part, plan)
        numbers = part.numbers(len(sources))
        make_fragments(config, plan, [(number, sources[number]) for number in numbers], None)
        end_part(config.out, part, plan)
        return part_summary(config.out, part, plan, time.monotonic() - start_s)


def merge(config: IngestConfig, start_s: float) -> str:
    if not (config.out / PLAN_NAME).is_file():
        raise ValueError(f"--out {config.out} holds no parts; run --part 0/n ... --part n-1/n into it first")
    with locked_folder(config.out):
        plan = read_plan(config.out)
        if config.shards:
            prepare_folder(config.out, make_plan(expand_shards(config.shards), parameters_of(config)))
        elif parameters_of(config) != parameters_of(IngestConfig()):
            check_same_parameters(config.out, plan.parameters, parameters_of(config))
        if is_complete(config.out):
            return finished(config.out, plan, None)
        check_parts(config.out, plan)
        return make_store(config, plan, start_s)


def dry_run(config: IngestConfig, part: Part | None, start_s: float) -> str:
    jobs = list(enumerate(expand_shards(config.shards)))
    if part is not None:
        jobs = [jobs[number] for number in part.numbers(len(jobs))]
    survey = survey_shards(jobs, parameters_of(config), config.workers)
    return describe_survey(survey, [source for _, source in jobs], time.monotonic() - start_s)


def make_fragments(
    config: IngestConfig, plan: Plan, jobs: Sequence[tuple[int, Source]], numbering: Numbering | None
) -> None:
    """The fragment of every shard of `jobs` that has none yet; `numbering` gives ids on the way."""
    remove_leftovers(config.out, [number for number, _ in jobs])
    shards = config.out / SHARDS_FOLDER
    missing = [job for job in jobs if not fragment_folder(shards, job[0]).is_dir()]
    number_on = numbering.advance if numbering else lambda: None
    with disk_errors_explained(config.out), Commits(NUM_THREADS, number_on) as commits:
        number_on()
        run_on_shards(
            # Not the plan itself: it would travel to the workers with every shard.
            partial(make_fragment, shards=shards, parameters=plan.parameters, plan_digest=plan.digest),
            missing,
            workers=config.workers,
            num_finished=len(jobs) - len(missing),
            on_result=commits.add,
            remedy="finished shards are kept: run the same command again",
        )


def make_store(config: IngestConfig, plan: Plan, start_s: float) -> str:
    with disk_errors_explained(config.out):
        finish_store(config.out, plan, config.workers)
    return finished(config.out, plan, time.monotonic() - start_s)


@contextmanager
def disk_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"writing to {out} failed ({error}); free space or mend the disk, then run the same command again"
        ) from error


def is_complete(out: Path) -> bool:
    return (out / MANIFEST_NAME).exists()


def finished(out: Path, plan: Plan, seconds: float | None) -> str:
    """Remove what a complete store does not need, open it, and say what is in it."""
    remove_fragment_files(out, len(plan.shards))
    remove_parts(out)
    remove_private(out)
    return summary(PairStore.open(out), seconds)


def summary(store: PairStore, seconds: float | None) -> str:
    rejected = store.manifest["num_rejected"]
    reasons = f" ({describe_rejected(rejected)})" if rejected else ""
    num_shrunk = store.manifest.get("num_shrunk")
    shrunk = f" ({num_shrunk:,} of them shrunk)" if num_shrunk else ""
    when = "already complete" if seconds is None else f"in {seconds:.1f} s"
    tables = store.manifest.get("source_tables")
    return ("" if tables is None else describe(tables) + "\n") + (
        f"{store.path}: kept {len(store):,} pairs{shrunk}, rejected {sum(rejected.values()):,}{reasons}, {when}; "
        f"rejected rows are in {store.path / REJECTED_NAME}"
    )


def part_summary(out: Path, part: Part, plan: Plan, seconds: float) -> str:
    numbers = part.numbers(len(plan.shards))
    fragments = [fragment_at(out, plan, number)[1] for number in numbers]
    rejected = in_order_of_frequency(sum((Counter(fragment["num_rejected"]) for fragment in fragments), Counter()))
    reasons = f" ({describe_rejected(rejected)})" if rejected else ""
    return (
        f"{out}: part {part} is done, {len(numbers):,} shards: kept {sum(fragment['num_pairs'] for fragment in fragments):,} "
        f"pairs, rejected {sum(rejected.values()):,}{reasons}, in {seconds:.1f} s; "
        f"when all {part.count} parts are: {PROGRAM} --out {out} --merge"
    )


def main_or_interrupted() -> None:
    try:
        run(main)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main_or_interrupted()
