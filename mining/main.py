"""The mining programs: `search` makes a PairTable, `inspect` prints its numbers, `gallery` shows it as a page."""

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mining.command_line import nearest, parse, run

PROGRAM = "python -m mining.main"
DESCRIPTION = """Find the hard pairs of a data set: for every image-text pair the pairs that are close to it in image AND in
text. Order of use: search, then inspect and gallery to look at the result. `python -m mining.main COMMAND --help` lists
the flags of a command."""


@dataclass(frozen=True)
class Search:
    """Search the k hard pairs of every pair of an EmbeddingStore and write them as a PairTable.

    score(i, j) = max(image cosine, 0) * max(text cosine, 0). Pairs with the same image or the same caption, and near
    duplicates above a ceiling, are left out and counted. Interrupted? Run the same command again, it goes on.

    Example: python -m mining.main search --embeddings embeddings/a --out pairs/a --k 50
    """

    embeddings: Path
    """EmbeddingStore folder, from train.embed."""
    out: Path
    """PairTable folder to write."""
    k: int = 50
    """Hard pairs to keep for each pair; fewer where fewer score above the floor."""
    backend: Literal["reference", "faiss"] = "reference"
    """reference: tiles of plain products, reads the embeddings from disk. faiss: flat index in memory; the same answer."""
    image_ceiling: float = 1.0
    """Pairs whose image cosine is above this are near-duplicates, never hard pairs; 1 = off. Depends on the encoder."""
    text_ceiling: float = 1.0
    """The same for the text cosine."""
    floor: float = 0.0
    """Hard pairs must score strictly above this."""
    noise_alignment_quantile: float = 0.0
    """Share of the pairs, those whose own image and text agree least, to mark as noise: not to be used as anchors."""
    block: int = 1024
    """Pairs searched and committed at a time: what a kill can lose."""
    resume: bool = True
    """Go on with an interrupted search, keep a finished one; --no-resume starts afresh."""


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
    store: Path
    """PairStore folder that the pairs come from, from train.ingest."""
    out: Path
    """HTML file to write."""
    num_anchors: int = 8
    """Anchors in each section: hardest, at random, most duplicates, noise."""
    pairs_per_anchor: int = 8
    """Hard pairs shown for each anchor."""
    seed: int = 0
    """Seed of the anchors at random."""


Command = (
    Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Gallery, tyro.conf.subcommand("gallery")]
)
COMMANDS = {"search": Search, "inspect": Inspect, "gallery": Gallery}


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
    {"search": run_search, "inspect": run_inspect, "gallery": run_gallery}[name](config)


def run_search(config: Search) -> None:
    # Heavy imports wait until the flags are known to be right.
    from mining.embedding_store import EmbeddingStore
    from mining.problem import SearchLimits
    from mining.search import search_pairs
    from mining.summary import read_summary, summary_text

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    limits = SearchLimits(config.k, config.image_ceiling, config.text_ceiling, config.floor)
    store = EmbeddingStore.open(config.embeddings)
    if rank == 0:
        store.verify_contents()
    table = search_pairs(
        store,
        config.out,
        limits,
        backend=config.backend,
        noise_alignment_quantile=config.noise_alignment_quantile,
        block=config.block,
        resume=config.resume,
        show_progress=rank == 0,
        rank=rank,
        world_size=world_size,
    )
    if table is not None and rank == 0:
        print(summary_text(read_summary(config.out)))


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
        num_anchors=config.num_anchors,
        pairs_per_anchor=config.pairs_per_anchor,
        seed=config.seed,
    )
    print(f"gallery: {config.out} ({size_mib:.1f} MiB), open it in a browser")


if __name__ == "__main__":
    run(main, sys.argv[1:])
