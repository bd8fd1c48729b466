"""The mining programs: `search` makes a PairTable, `append` goes on from one when the data grew, `verify` recomputes rows of it,
`inspect` prints its numbers, `gallery` shows it as a page."""

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mining.command_line import nearest, parse
from mining.stopping import run_stoppable

if TYPE_CHECKING:
    from mining.pair_table import PairTable

PROGRAM = "python -m mining.main"
DESCRIPTION = """Find the hard pairs of a data set: for every image-text pair the pairs that are close to it in image AND in
text. Order of use: search (append when the data grew), then verify, inspect and gallery to look at the result.
`python -m mining.main COMMAND --help` lists the flags of a command."""


@dataclass(frozen=True)
class Search:
    """Search the k hard pairs of every pair of an EmbeddingStore and write them as a PairTable.

    score(i, j) = max(image cosine, 0) * max(text cosine, 0). Pairs with the same image or the same caption, and near
    duplicates above a ceiling, are left out and counted. Interrupted? Run the same command again, it goes on. Several
    processes share the work: `deepspeed --module mining.main search ...`, torchrun, or a job array that sets RANK and
    WORLD_SIZE; the result has the same bytes.

    Example: python -m mining.main search --embeddings embeddings/a --out pairs/a --k 50
    """

    embeddings: Path
    """EmbeddingStore folder, from train.embed."""
    out: Path
    """PairTable folder to write."""
    k: int = 50
    """Hard pairs to keep for each pair; fewer where fewer score above the floor."""
    backend: Literal["fused", "reference", "faiss"] = "fused"
    """fused: exact, streams the embeddings from disk. reference: the definition in plain products, the same answer, slower.
    faiss: candidates from an index, see --index."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one (each local rank its own)."""
    index: Literal["flat", "ivf"] = "flat"
    """faiss only. flat: brute force in blocks. ivf: clusters of pairs, written to disk beside the unfinished table (2 bytes a
    number, gone afterwards), of which each pair looks at the nearest: finds most hard pairs; how many is measured on rows searched
    exactly and printed."""
    nlist: int = 0
    """ivf: clusters; 0 = about 4 sqrt(N), at most 4096."""
    nprobe: int = 64
    """ivf: clusters looked at for each pair: more find more and take longer."""
    exact: bool = False
    """faiss: search pairs exactly whose list is not certified to be; else they are reported and marked in the table."""
    recall_sample: int = 256
    """Pairs searched exactly to measure an inexact search."""
    seed: int = 0
    """Seed of clusters, samples and subsets."""
    helip_compat: bool = False
    """Rank as HELIP's released miner does, to compare: a random subset, its thresholds, products of negatives. Not exact."""
    helip_subset: int = 3_000_000
    """Pairs of that random subset."""
    image_ceiling: float = 1.0
    """Pairs whose image cosine is above this are near-duplicates, never hard pairs; 1 = off. Depends on the encoder."""
    text_ceiling: float = 1.0
    """The same for the text cosine."""
    floor: float = 0.0
    """Hard pairs must score strictly above this."""
    false_negative_margin: float | None = None
    """Take out likely false negatives: hard pairs of which one's image fits the other's text as well as its own, or worse by at
    most this cosine (0.05, say). Needs a model whose images and texts share a space. Left out: no test."""
    hub_cap: int | None = None
    """Leave a pair in at most so many lists, those where it scores highest, and take it out of the others. Left out: no cap."""
    noise_alignment_quantile: float = 0.0
    """Share of the pairs, those whose own image and text agree least, to mark as noise: not to be used as anchors."""
    queries: str | None = None
    """Search only the pairs START:STOP and stop: to try things out, or one piece of a job array. The table is finished by
    the process that completes it."""
    block: int | None = None
    """Pairs searched and committed at a time: what a kill can lose. Left out: what suits backend and device."""
    patience_s: float = 60.0
    """Seconds without a sign of life after which the other ranks take over a rank's blocks."""
    check_embeddings: bool = True
    """Compare the embeddings with their checksums first (rank 0); if not, summary and inspect say so."""
    resume: bool = True
    """Go on with an interrupted search, keep a finished one; --no-resume starts afresh."""


@dataclass(frozen=True)
class Append:
    """Make the PairTable of a data set that grew from the table of its first pairs, with the work that the new pairs need.

    The old pairs must have kept their ids, 0 to M-1, and their embeddings, to the byte, with the new ones behind them; this is
    checked. All limits are those of the old table. The result has the bytes of a search of all pairs. Interrupted? Run the same
    command again. Ranks share the work as in search.

    Example: python -m mining.main append --pairs pairs/a --embeddings embeddings/grown --out pairs/grown
    """

    pairs: Path
    """PairTable folder of the first pairs, from an exact search; it stays as it is."""
    embeddings: Path
    """EmbeddingStore folder of all pairs."""
    out: Path
    """PairTable folder to write."""
    backend: Literal["fused", "reference"] = "fused"
    """fused: streams the embeddings from disk. reference: the definition in plain products, the same answer, slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one (each local rank its own)."""
    queries: str | None = None
    """Do only the pairs START:STOP and stop: one piece of a job array."""
    block: int | None = None
    """Pairs committed at a time: what a kill can lose. Left out: what suits backend and device."""
    patience_s: float = 60.0
    """Seconds without a sign of life after which the other ranks take over a rank's blocks."""
    check_embeddings: bool = True
    """Compare all embeddings with their checksums first (rank 0); if not, summary and inspect say so. Those of the old pairs are
    compared in any case."""
    resume: bool = True
    """Go on with an interrupted run, keep a finished table; --no-resume starts afresh."""


@dataclass(frozen=True)
class Verify:
    """Recompute rows of a PairTable in float64 from the embeddings; exit code 1 when any is not what the definition says.

    Checks ids, order, cosines, exclusions, counts and noise marks of rows drawn at random, by another path than the search; marks
    of false negatives and what is left of those rows; every hub over its cap; rows of excluded.parquet drawn at random. Rows that
    are not certified may lack hard pairs: those are counted, not an error. A table from train.reorder is checked against the
    embeddings of the store before it was reordered, under the ids that the pairs had there.

    Example: python -m mining.main verify --pairs pairs/a --embeddings embeddings/a --sample 10000
    """

    pairs: Path
    """PairTable folder, from search."""
    embeddings: Path
    """EmbeddingStore folder that it was made from."""
    sample: int = 10000
    """Rows to recompute; all of them when the table has no more."""
    seed: int = 0
    """Seed of the rows drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""


@dataclass(frozen=True)
class Inspect:
    """Print the numbers of a PairTable: coverage, what was left out and why, scores, hubs.

    Example: python -m mining.main inspect --pairs pairs/a
    """

    pairs: Path
    """PairTable folder, from search."""


@dataclass(frozen=True)
class Gallery:
    """Write one HTML page, images inside, of anchors with their hard pairs and of what was left out as duplicate.

    Example: python -m mining.main gallery --pairs pairs/a --store data/cc12m --out pairs/a/gallery.html
    """

    pairs: Path
    """PairTable folder, from search."""
    store: str
    """PairStore that the pairs come from, from train.ingest: a folder, or a URL of remote storage (s3://, sftp://, ...) with --cache."""
    out: Path
    """HTML file to write."""
    cache: Path | None = None
    """Local folder for what is fetched of a remote store, new, empty or of an earlier run; training may use the same."""
    num_anchors: int = 8
    """Anchors in each section: hardest, at random, most duplicates, noise."""
    pairs_per_anchor: int = 8
    """Hard pairs shown for each anchor."""
    seed: int = 0
    """Seed of the anchors at random."""


Command = (
    Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Append, tyro.conf.subcommand("append")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Gallery, tyro.conf.subcommand("gallery")]
)
COMMANDS = {"search": Search, "append": Append, "verify": Verify, "inspect": Inspect, "gallery": Gallery}


def main(arguments: Sequence[str]) -> None:
    """Run one command; ValueError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        # Without a command tyro lists them all.
        parse(Command, program=PROGRAM, description=DESCRIPTION, arguments=["--help"])
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(
            f"{PROGRAM} has no command {name!r}; {nearest(name, COMMANDS)} `{PROGRAM} --help` explains them"
        )
    config_type = COMMANDS[name]
    config = parse(
        config_type, program=f"{PROGRAM} {name}", description=inspect.cleandoc(config_type.__doc__), arguments=rest
    )
    programs = {"search": run_search, "append": run_append, "verify": run_verify, "inspect": run_inspect}
    (programs | {"gallery": run_gallery})[name](config)


def run_search(config: Search) -> None:
    # Heavy imports wait until the flags are known to be right.
    from mining.backends import BackendChoice
    from mining.embedding_store import EmbeddingStore
    from mining.problem import SearchLimits
    from mining.pruning import Pruning
    from mining.ranks import RankPlace
    from mining.search import search_pairs

    place = RankPlace.from_environment()
    share_cores(place.local_world_size)
    names = ("backend", "device", "index", "nlist", "nprobe", "exact", "seed", "helip_compat", "helip_subset")
    choice = BackendChoice(**{name: getattr(config, name) for name in names})
    limits = SearchLimits(config.k, config.image_ceiling, config.text_ceiling, config.floor)
    pruning = Pruning(config.false_negative_margin, config.hub_cap)
    table = search_pairs(
        EmbeddingStore.open(config.embeddings),
        config.out,
        limits,
        choice=choice,
        pruning=pruning,
        noise_alignment_quantile=config.noise_alignment_quantile,
        queries=parsed_range(config.queries),
        block=config.block,
        resume=config.resume,
        show_progress=place.rank == 0,
        place=place,
        patience_s=config.patience_s,
        recall_rows=config.recall_sample,
        check_embeddings=config.check_embeddings,
    )
    if place.rank == 0:
        print_result(table, config)


def run_append(config: Append) -> None:
    from mining.backends import BackendChoice
    from mining.embedding_store import EmbeddingStore
    from mining.pair_table import PairTable
    from mining.ranks import RankPlace
    from mining.search import append_pairs

    place = RankPlace.from_environment()
    share_cores(place.local_world_size)
    table = append_pairs(
        PairTable.open(config.pairs),
        EmbeddingStore.open(config.embeddings),
        config.out,
        choice=BackendChoice(backend=config.backend, device=config.device),
        queries=parsed_range(config.queries),
        block=config.block,
        resume=config.resume,
        show_progress=place.rank == 0,
        place=place,
        patience_s=config.patience_s,
        check_embeddings=config.check_embeddings,
    )
    if place.rank == 0:
        print_result(table, config)


def print_result(table: "PairTable | None", config: Search | Append) -> None:
    from mining.summary import read_summary, summary_text

    if table is None:
        print(f"pairs {config.queries} are searched; {config.out} is finished by the search that completes the others")
        return
    print(summary_text(read_summary(config.out)))
    if "recall" in table.manifest["facts"]:
        from mining.recall import recall_text

        print(f"recall           {recall_text(table.manifest['facts']['recall'])}")


def share_cores(local_world_size: int) -> None:
    """The node's processor cores among its ranks, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))


def parsed_range(text: str | None) -> range | None:
    """START:STOP; ValueError for anything else, None for none."""
    if text is None:
        return None
    try:
        start, stop = (int(number) for number in text.split(":"))
    except ValueError:
        raise ValueError(f"--queries {text} must be two whole numbers START:STOP, such as 0:2048") from None
    return range(start, stop)


def run_verify(config: Verify) -> None:
    from mining.backends import torch_device
    from mining.embedding_store import EmbeddingStore
    from mining.pair_table import PairTable
    from mining.verify import verify_table

    report = verify_table(
        PairTable.open(config.pairs),
        EmbeddingStore.open(config.embeddings),
        sample=config.sample,
        seed=config.seed,
        device=torch_device(config.device),
        show_progress=True,
    )
    print(report.text())
    if not report.is_correct:
        sys.exit(1)


def run_inspect(config: Inspect) -> None:
    from mining.pair_table import PairTable
    from mining.summary import read_summary, summary_text

    PairTable.open(config.pairs)
    print(summary_text(read_summary(config.pairs), with_details=True))


def run_gallery(config: Gallery) -> None:
    from mining.gallery import write_gallery

    size_mib = write_gallery(
        config.pairs,
        config.store,
        config.out,
        cache=config.cache,
        num_anchors=config.num_anchors,
        pairs_per_anchor=config.pairs_per_anchor,
        seed=config.seed,
    )
    print(f"gallery: {config.out} ({size_mib:.1f} MiB), open it in a browser")


if __name__ == "__main__":
    run_stoppable(main, sys.argv[1:])
