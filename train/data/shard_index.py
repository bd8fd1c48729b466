"""Where every sample of a list of tars lies, so that training reads tars at any place without ingesting them.

In: local, uncompressed tars. Out: a `ShardIndex`, memory-mapped, 24 bytes a sample (0.3 GB for 12 million) however many
processes read it. One pass over the headers, captions and JSON makes it, dealt to ranks and their workers shard by shard;
a killed pass goes on with the shards that are missing. Samples that ingest would reject without looking at the picture are
left out and counted; a torn tar is refused by name.

A folder:
    DIGEST/manifest.json    per shard name, path, size, mtime, number of samples; left_out (counts by reason); fingerprint
    DIGEST/samples.npy      SAMPLE [N], ordered by shard name, then by place in the tar
    parts/*.npz             one a tar, by `tar_scan`; another list of tars that has some in common makes use of them
DIGEST names paths, sizes and modification times: a tar that was written again has another index.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mining.manifest import MANIFEST_NAME, commit_folder, fingerprint, read_manifest, write_manifest
from train.data.tar_scan import INGEST, SAMPLE, identity, read_part, write_part
from train.distributed import Ranks, barrier, max_over_ranks
from train.ingest.sources import Source, expand_shards

KIND, FORMAT_VERSION = "ShardIndex", 1
SAMPLES_NAME = "samples.npy"
PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class Shard:
    """One tar as it was when the index was made."""

    name: str
    path: str
    size: int
    mtime_ns: int
    num_samples: int


class ShardIndex:
    """An opened index: `samples_N` (SAMPLE [N], memory-mapped), `shards`, `fingerprint`, `left_out` (counts by reason)."""

    def __init__(self, folder: Path, manifest: dict[str, Any], samples_N: np.ndarray) -> None:
        self.folder, self.samples_N = folder, samples_N
        self.fingerprint: str = manifest["fingerprint"]
        self.left_out: dict[str, int] = manifest["left_out"]
        self.shard_sizes = np.array([shard["num_samples"] for shard in manifest["shards"]], np.int64)
        self.shards = [Shard(**shard) for shard in manifest["shards"]]
        self._ends = np.cumsum(self.shard_sizes)

    @classmethod
    def open(cls, folder: Path) -> "ShardIndex":
        """Raises ValueError naming the folder when it is no complete index of this version."""
        remedy = f"delete {folder} and run the same command again"
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, remedy=remedy)
        path = folder / SAMPLES_NAME
        try:
            samples_N = np.load(path, mmap_mode="r", allow_pickle=False)
            index = cls(folder, manifest, samples_N)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
        if samples_N.dtype != SAMPLE or len(samples_N) != index.shard_sizes.sum():
            raise ValueError(f"{path} is damaged (other rows than its manifest says); {remedy}")
        return index

    def __len__(self) -> int:
        return len(self.samples_N)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled, a memory-mapped array is a copy of its content.
        return ShardIndex.open, (self.folder,)

    def shard_number(self, sample_id: int) -> int:
        """Which of `shards` holds the sample."""
        return int(np.searchsorted(self._ends, sample_id, side="right"))


def local_tars(patterns: Sequence[str]) -> list[Source]:
    """The tars that --data.shards stands for, ordered by name.

    Raises ValueError for a pattern without a match, a missing file, and whatever is no local file: training reads tars at
    many places at once, which a stream does not allow.
    """
    try:
        sources = expand_shards(patterns)
    except ValueError as error:
        # These messages speak of ingest's flag.
        raise ValueError(str(error).replace("--shards", "--data.shards")) from error
    remote = next((source.url for source in sources if not source.local), None)
    if remote is not None:
        raise ValueError(
            f"--data.shards {remote} is no local file, and training reads tars at many places at once; "
            f"copy the tars to a file system that all ranks see, or ingest them: {INGEST}"
        )
    return sources


def prepare_index(sources: Sequence[Source], folder: Path, ranks: Ranks, workers: int) -> ShardIndex:
    """The index of these tars in `folder`, made by all ranks when it is not there. Collective: every rank calls.

    Raises ValueError naming the first tar that is torn, compressed or unreadable.
    """
    final = folder / digest_of(sources)
    # Rank 0 alone looks: a network file system may go on saying "missing" for a while where it was asked too early.
    missing = ranks.is_main and not (final / MANIFEST_NAME).is_file()
    if max_over_ranks(float(missing)):
        write_parts(sources[ranks.rank :: ranks.world_size], final, workers, show_progress=ranks.is_main)
        barrier()
        if ranks.is_main:
            combine(sources, final)
    barrier()
    return ShardIndex.open(final)


def build_index(sources: Sequence[Source], folder: Path, workers: int) -> ShardIndex:
    """The same in one process without a process group."""
    final = folder / digest_of(sources)
    if not (final / MANIFEST_NAME).is_file():
        write_parts(sources, final, workers, show_progress=True)
        combine(sources, final)
    return ShardIndex.open(final)


def digest_of(sources: Sequence[Source]) -> str:
    return fingerprint([identity(source) for source in sources])[:16]


def part_path(final: Path, source: Source) -> Path:
    """Named by the tar alone, so that a longer list of tars finds those that were scanned for a shorter one."""
    return final.parent / PARTS_FOLDER / f"{fingerprint(identity(source))[:16]}.npz"


class _Scan(Dataset[int]):
    """Item i scans tar i, so that the loader's workers share the tars."""

    def __init__(self, sources: Sequence[Source], paths: Sequence[Path]) -> None:
        self.sources, self.paths = sources, paths

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: int) -> int:
        write_part(self.sources[number], self.paths[number])
        return number


def write_parts(sources: Sequence[Source], final: Path, workers: int, *, show_progress: bool) -> None:
    """Scan the tars that have no part yet."""
    parts = {source: part_path(final, source) for source in sources}
    missing = [source for source in sources if not parts[source].exists()]
    (final.parent / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    loader = DataLoader(
        _Scan(missing, [parts[source] for source in missing]),
        batch_size=None,
        num_workers=min(workers, len(missing)),
        # torch's own generator would give other numbers afterwards than in a run that finds the index made.
        generator=torch.Generator(),
    )
    for _ in tqdm(loader, desc="index of the tars", unit="shard", dynamic_ncols=True, disable=not show_progress):
        pass


def combine(sources: Sequence[Source], final: Path) -> None:
    """Put the parts together under the final name, in bounded memory. Raises ValueError for tars that can't be used."""
    paths = [part_path(final, source) for source in sources]
    sizes, facts = [], []
    for path in paths:
        rows, fact = read_part(path)
        sizes.append(len(rows))
        facts.append(fact)
    refuse_problems(paths, facts)
    if not sum(sizes):
        left_out = dict(sum((Counter(fact["left_out"]) for fact in facts), Counter()))
        raise ValueError(f"the tars of --data.shards hold no sample that can be used; left out: {left_out}")
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    digests = write_samples(paths, sizes, temporary / SAMPLES_NAME)
    write_manifest(temporary, KIND, FORMAT_VERSION, **manifest_fields(sizes, facts, digests))
    commit_folder(temporary, final)


def refuse_problems(paths: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError naming the first tar with a problem, and some others."""
    bad = [(path, fact) for path, fact in zip(paths, facts, strict=True) if fact["problem"]]
    if not bad:
        return
    for path, _ in bad:
        # Scanned again next time: a disk that could not be read may be back.
        path.unlink()
    (_, tar, *_), problem = bad[0][1]["identity"], bad[0][1]["problem"]
    others = ", ".join(fact["identity"][0] for _, fact in bad[1:9])
    more = f" ({len(bad)} of {len(paths)} tars cannot be used, also {others})" if others else ""
    raise ValueError(f"shard {tar} {problem}{more}")


def write_samples(paths: Sequence[Path], sizes: Sequence[int], path: Path) -> list[str]:
    """samples.npy from the parts; returns a digest of each shard's rows."""
    digests, start = [], 0
    samples_N = np.lib.format.open_memmap(path, "w+", SAMPLE, (sum(sizes),))
    for part in paths:
        rows, _ = read_part(part)
        samples_N[start : start + len(rows)] = rows
        start += len(rows)
        digests.append(sha256(rows.tobytes()).hexdigest())
    samples_N.flush()
    return digests


def manifest_fields(sizes: Sequence[int], facts: Sequence[dict[str, Any]], digests: Sequence[str]) -> dict[str, Any]:
    shards, left_out = [], Counter()
    for num_samples, fact in zip(sizes, facts, strict=True):
        name, path, size, mtime_ns = fact["identity"]
        shards.append({"name": name, "path": path, "size": size, "mtime_ns": mtime_ns, "num_samples": num_samples})
        left_out.update(fact["left_out"])
    # Paths and times are no part of it: the same tars elsewhere are the same data.
    names = [[shard["name"], shard["size"]] for shard in shards]
    return {
        "num_samples": sum(sizes),
        "left_out": dict(sorted(left_out.items())),
        "fingerprint": fingerprint(FORMAT_VERSION, names, list(digests)),
        "shards": shards,
    }
