"""`python -m mining.bench`: the search against the bare products of the same blocks, and a whole self-join, in figures.

The embeddings are made up: unit rows around a common direction and cluster centres, clusters alike in both towers as captions
make them, written block by block as an EmbeddingStore in a temporary folder.
"""

import dataclasses
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize, pad

from kernels.bench.__main__ import machine
from kernels.bench.measure import Contender, compare
from mining.backends import BackendChoice, chosen_device
from mining.command_line import parse, run
from mining.embedding_store import EmbeddingStore
from mining.fused import FusedSearch
from mining.problem import SearchBackend, SearchLimits, SearchProblem
from mining.reference import ReferenceSearch
from mining.rows import BaseStream, read_rows
from mining.search import search_pairs
from mining.verify import verify_table

PROGRAM = "python -m mining.bench"
PAIRS_PER_CLUSTER = 40
WRITE_ROWS = 32768
# The tiles of a product, as the fused search on a CPU takes them, with its two columns of bounds, padded.
QUERY_TILE, BASE_TILE, BOUND_COLUMNS = 512, 2048, 32


@dataclass(frozen=True)
class Bench:
    """Time the searches of the first pairs of a made-up data set against the bare products that they need.

    The bare products read the same blocks from the same files and multiply the same tiles of both towers, nothing else:
    in bfloat16, as the fused search does on processors that have it, and in float32.

    Example: python -m mining.bench --pairs 1000000 --queries 2048 --out results/mining-bench.json
    """

    pairs: int = 100_000
    """Pairs in the data set."""
    queries: int = 4096
    """Pairs searched, the first ones."""
    dim: int = 512
    """Width of both towers."""
    k: int = 50
    """Hard pairs of each."""
    rounds: int = 3
    """Times each contender runs, in turn; medians are shown."""
    backends: tuple[Literal["fused", "reference", "faiss"], ...] = ("fused", "reference")
    """Searches to time beside the products."""
    self_join: bool = False
    """Search all pairs instead, once, with the fused search, as `mining.main search` does, and verify 2,000 rows."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the fused search and the products run."""
    threads: int = 0
    """CPU threads; 0 = all."""
    folder: Path | None = None
    """Where to keep the data set and the table; a temporary folder when left out."""
    out: Path | None = None
    """JSON file for the results."""


def main(arguments: Sequence[str]) -> None:
    config = parse(Bench, program=PROGRAM, description=inspect.cleandoc(Bench.__doc__), arguments=arguments)
    if min(config.pairs, config.queries, config.dim, config.k, config.rounds) < 1 or config.threads < 0:
        raise ValueError("--pairs, --queries, --dim, --k and --rounds must be at least 1, --threads at least 0")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = chosen_device(BackendChoice(device=config.device))
    with tempfile.TemporaryDirectory(prefix="hardpair_bench_") as temporary:
        folder = config.folder or Path(temporary)
        store = made_up_store(folder / f"embeddings-{config.pairs}-{config.dim}", config.pairs, config.dim)
        result = self_join(config, store, folder) if config.self_join else compared(config, store, device)
    report = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        **{
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("folder", "out", "threads")
        },
        **result,
    }
    print(json.dumps(result, indent=1))
    if config.out:
        config.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {config.out}")


def compared(config: Bench, store: EmbeddingStore, device: torch.device) -> dict[str, Any]:
    """Median times of the contenders in turn, refused when their answers differ."""
    problem = SearchProblem.of(store, SearchLimits(config.k))
    query_ids_Q = np.arange(min(config.queries, len(store)))
    timings = compare(list(contenders(config, problem, query_ids_Q, device)), rounds=config.rounds, device=device)
    tera = 2e-12 * len(query_ids_Q) * len(store) * 2 * config.dim
    bare_ms = {timing.name: timing.median_ms for timing in timings if timing.name.startswith("products")}
    rows = []
    for timing in timings:
        row = dataclasses.asdict(timing) | {
            "pairs_per_s": round(len(query_ids_Q) / timing.median_ms * 1e3, 1),
            "tflop_per_s": round(tera / timing.median_ms * 1e3, 4),
        }
        rows.append(
            row | {f"of_{name.replace(' ', '_')}": round(row["median_ms"] / ms, 3) for name, ms in bare_ms.items()}
        )
    return {"queries": len(query_ids_Q), "rounds": config.rounds, "timings": rows}


def contenders(
    config: Bench, problem: SearchProblem, query_ids_Q: np.ndarray, device: torch.device
) -> Iterator[Contender]:
    for name in config.backends:
        yield Contender(name, partial(scores, searcher_of(name, problem, device), query_ids_Q))
    for dtype in (torch.bfloat16, torch.float32):
        name = f"products {str(dtype).removeprefix('torch.')}"
        yield Contender(name, partial(bare_products, problem, query_ids_Q, device, dtype))


def searcher_of(name: str, problem: SearchProblem, device: torch.device) -> SearchBackend:
    if name == "fused":
        return FusedSearch(problem, device=device)
    if name == "reference":
        return ReferenceSearch(problem)
    from mining.candidates import CandidateSearch
    from mining.index import FlatLists

    return CandidateSearch(problem, FlatLists(problem, torch.device("cpu")), exact=FusedSearch(problem, device=device))


def scores(searcher: SearchBackend, query_ids_Q: np.ndarray) -> list[torch.Tensor]:
    parts = [
        searcher.search(query_ids_Q[start : start + searcher.queries_together])
        for start in range(0, len(query_ids_Q), searcher.queries_together)
    ]
    return [torch.from_numpy(np.concatenate([top.image_similarity_QK * top.text_similarity_QK for top in parts]))]


def bare_products(problem: SearchProblem, query_ids_Q: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
    """Both towers' products of all tiles, into one buffer each."""
    columns = BOUND_COLUMNS if dtype == torch.bfloat16 else 0
    query = [
        pad(torch.from_numpy(read_rows(rows_ND, query_ids_Q)).to(device, dtype), (0, columns))
        for rows_ND in (problem.image_ND, problem.text_ND)
    ]
    buffer = torch.empty(QUERY_TILE * BASE_TILE, dtype=dtype, device=device)
    for block in BaseStream(problem, device).blocks():
        for start in range(0, len(block.image_BD), BASE_TILE):
            for query_QD, base_BD in zip(query, (block.image_BD, block.text_BD), strict=True):
                tile_BD = pad(base_BD[start : start + BASE_TILE].to(dtype), (0, columns))
                for first in range(0, len(query_QD), QUERY_TILE):
                    rows_QD = query_QD[first : first + QUERY_TILE]
                    out = buffer[: len(rows_QD) * len(tile_BD)].view(len(rows_QD), len(tile_BD))
                    torch.mm(rows_QD, tile_BD.T, out=out)


def self_join(config: Bench, store: EmbeddingStore, folder: Path) -> dict[str, Any]:
    started_s = time.monotonic()
    table = search_pairs(
        store,
        folder / "pairs",
        SearchLimits(config.k),
        choice=BackendChoice(device=config.device),
        resume=False,
        show_progress=True,
    )
    seconds = time.monotonic() - started_s
    peak_mib = peak_resident_mib()
    report = verify_table(table, store, sample=2000, show_progress=True)
    return {
        "seconds": round(seconds, 2),
        "pairs_per_s": round(len(store) / seconds, 1),
        "tflop_per_s": round(2e-12 * len(store) ** 2 * 2 * config.dim / seconds, 4),
        "peak_resident_mib": round(peak_mib),
        "certified_rows": int(table.certified_N.sum()),
        "rows_with_k": int((table.pair_ids_NK[:, -1] >= 0).sum()),
        "verified_rows": report.num_rows,
        "wrong_rows": report.num_wrong,
        "table_fingerprint": table.fingerprint,
    }


def peak_resident_mib() -> float:
    """Of this process so far, shared libraries and touched pages of files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def made_up_store(path: Path, num_pairs: int, dim: int, *, seed: int = 0) -> EmbeddingStore:
    """Written block by block; the same for the same arguments, and kept when it is there already."""
    if (path / "manifest.json").exists():
        return EmbeddingStore.open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_clusters = max(1, num_pairs // PAIRS_PER_CLUSTER)
    generator = torch.Generator().manual_seed(seed)
    towers = [
        (torch.randn(1, dim, generator=generator), torch.randn(num_clusters, dim, generator=generator)) for _ in "IT"
    ]
    writer = EmbeddingStore.writer(path, num_pairs, dim, dim, has_alignment=False, encoder="made up", seed=seed)
    for start in range(0, num_pairs, WRITE_ROWS):
        generator = torch.Generator().manual_seed(seed + 1 + start)
        num_rows = min(WRITE_ROWS, num_pairs - start)
        cluster_B = torch.randint(num_clusters, (num_rows,), generator=generator)
        rows = [
            normalize(0.7 * common + 0.8 * centres[cluster_B] + torch.randn(num_rows, dim, generator=generator), dim=1)
            for common, centres in towers
        ]
        writer.write_rows(start, *(rows_BD.half() for rows_BD in rows))
    return writer.finish()


if __name__ == "__main__":
    run(main, sys.argv[1:])
