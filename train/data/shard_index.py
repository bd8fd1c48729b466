"""Where every sample of a list of tars lies, so that training reads tars at any place without ingesting them.

In: local, uncompressed tars. Out: a `ShardIndex`, memory-mapped, 24 bytes a sample (0.3 GB for 12 million) however many
processes read it. One pass over the headers, captions and JSON makes it, dealt to ranks and their workers shard by shard;
a killed pass goes on with the shards that are missing. Samples that ingest would reject without looking at the picture are
left out and counted; a torn tar is refused by name.

A folder:
    DIGEST/manifest.json    per shard name, path, size, mtime, number of samples; left_out (counts by reason); fingerprint
    DIGEST/samples.npy      SAMPLE [N], ordered by shard name, then by place in the tar
    .DIGEST.parts/*.npz     one a shard, while the index is being made
DIGEST names paths, sizes and modification times: a tar that was written again has another index.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mining.manifest import MANIFEST_NAME, commit_folder, fingerprint, read_manifest, write_manifest
from train.distributed import Ranks, barrier, max_over_ranks
from train.ingest.decode import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    JSON_EXTENSION,
    MAX_MEMBER_MIB,
    Rejected,
    check_json,
    check_key,
    decode_caption,
    read_once,
)
from train.ingest.samples import reason_category
from train.ingest.sources import DECOMPRESSORS, Source, expand_shards
from train.ingest.tar_index import Member, index_tar, read_member

KIND, FORMAT_VERSION = "ShardIndex", 1
SAMPLES_NAME = "samples.npy"
SAMPLE = np.dtype([("image_offset", "<i8"), ("caption_offset", "<i8"), ("image_size", "<i4"), ("caption_size", "<i4")])
INGEST = "`python -m train.ingest --shards ... --out FOLDER` and --data.store FOLDER"


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
        write_parts(sources[ranks.rank :: ranks.world_size], parts_of(final), workers, show_progress=ranks.is_main)
        barrier()
        if ranks.is_main:
            combine(sources, final)
    barrier()
    return ShardIndex.open(final)


def build_index(sources: Sequence[Source], folder: Path, workers: int) -> ShardIndex:
    """The same in one process without a process group."""
    final = folder / digest_of(sources)
    if not (final / MANIFEST_NAME).is_file():
        write_parts(sources, parts_of(final), workers, show_progress=True)
        combine(sources, final)
    return ShardIndex.open(final)


def digest_of(sources: Sequence[Source]) -> str:
    return fingerprint([identity(source) for source in sources])[:16]


def identity(source: Source) -> list[Any]:
    status = os.stat(source.url)
    return [source.name, source.url, status.st_size, status.st_mtime_ns]


def parts_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.parts")


def part_path(parts: Path, source: Source) -> Path:
    return parts / f"{fingerprint(source.name)[:16]}.npz"


class _Parts(Dataset[int]):
    """Item i indexes shard i, so that the loader's workers share the shards."""

    def __init__(self, sources: Sequence[Source], parts: Path) -> None:
        self.sources, self.parts = sources, parts

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: int) -> int:
        write_part(self.sources[number], part_path(self.parts, self.sources[number]))
        return number


def write_parts(sources: Sequence[Source], parts: Path, workers: int, *, show_progress: bool) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    missing = [source for source in sources if not part_path(parts, source).exists()]
    # Its own generator: torch's would give other numbers afterwards than in a run that finds the index made.
    loader = DataLoader(
        _Parts(missing, parts), batch_size=None, num_workers=min(workers, len(missing)), generator=torch.Generator()
    )
    for _ in tqdm(loader, desc="index of the tars", unit="shard", dynamic_ncols=True, disable=not show_progress):
        pass


def write_part(source: Source, path: Path) -> None:
    """Index one tar into `path`: its samples and, as JSON, what else there is to say about it."""
    facts: dict[str, Any] = {"identity": identity(source), "problem": None, "left_out": {}}
    rows_N = np.empty(0, SAMPLE)
    try:
        with open(source.url, "rb") as file:
            facts["problem"] = compression(file)
            if facts["problem"] is None:
                rows_N, facts["left_out"], facts["problem"] = scan_tar(file)
    except OSError as error:
        facts["problem"] = f"cannot be read ({error})"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, samples=rows_N, facts=np.array(json.dumps(facts)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def compression(file: BinaryIO) -> str | None:
    packed = any(file.read(8).startswith(magic) for magic in DECOMPRESSORS if file.seek(0) == 0)
    file.seek(0)
    return f"is compressed, so it cannot be read in any order; unpack it, or ingest it: {INGEST}" if packed else None


def scan_tar(file: BinaryIO) -> tuple[np.ndarray, dict[str, int], str | None]:
    """Samples in the order of the tar, the number left out by reason, and what is wrong with the tar as a whole."""
    index = index_tar(file)
    if index.torn is not None:
        remedy = f"download it again, leave it out of --data.shards, or ingest what is before the tear: {INGEST}"
        return np.empty(0, SAMPLE), {}, f"is torn ({index.torn}); {remedy}"
    rows, left_out = [], Counter()
    for key, members in index.members.items():
        try:
            rows.append(sample_row(key, members, lambda member: read_member(file, member)))
        except Rejected as reason:
            left_out[reason_category(str(reason))] += 1
    return np.sort(np.array(rows, SAMPLE), order="image_offset"), dict(sorted(left_out.items())), None


def sample_row(
    key: str, members: dict[str, list[Member]], read: Callable[[Member], bytes]
) -> tuple[int, int, int, int]:
    """Where picture and caption of a key lie. Raises Rejected by ingest's rules, but for what only decoding can tell."""
    check_key(key)
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        raise Rejected("missing image")
    if CAPTION_EXTENSION not in members:
        raise Rejected("missing caption")
    if JSON_EXTENSION in members:
        check_json(read_once(members[JSON_EXTENSION], JSON_EXTENSION, read))
    decode_caption(read_once(members[CAPTION_EXTENSION], CAPTION_EXTENSION, read))
    if len(members[extension]) > 1 or members[extension][0].size > MAX_MEMBER_MIB << 20:
        read_once(members[extension], extension, read)
    image, caption = members[extension][0], members[CAPTION_EXTENSION][0]
    return image.offset, caption.offset, image.size, caption.size


def combine(sources: Sequence[Source], final: Path) -> None:
    """Put the parts together under the final name, in bounded memory. Raises ValueError for a tar that can't be used."""
    parts = parts_of(final)
    try:
        facts = [read_facts(parts, source) for source in sources]
        refuse_problems(sources, parts, facts)
        if not any(fact["num_samples"] for fact in facts):
            left_out = sum((Counter(fact["left_out"]) for fact in facts), Counter())
            raise ValueError(
                f"the {len(sources)} tars of --data.shards hold no sample that can be used; left out: {dict(left_out)}"
            )
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        digests = write_samples(sources, parts, [fact["num_samples"] for fact in facts], temporary / SAMPLES_NAME)
    except FileNotFoundError:
        # Another run that shares the folder was quicker and has removed the parts.
        if (final / MANIFEST_NAME).is_file():
            return
        raise
    write_manifest(temporary, KIND, FORMAT_VERSION, **manifest_fields(sources, facts, digests))
    commit_folder(temporary, final)
    shutil.rmtree(parts)


def read_facts(parts: Path, source: Source) -> dict[str, Any]:
    with np.load(part_path(parts, source), allow_pickle=False) as part:
        return {**json.loads(str(part["facts"])), "num_samples": len(part["samples"])}


def refuse_problems(sources: Sequence[Source], parts: Path, facts: Sequence[dict[str, Any]]) -> None:
    bad = [(source, fact["problem"]) for source, fact in zip(sources, facts, strict=True) if fact["problem"]]
    if not bad:
        return
    for source, _ in bad:
        # Looked at again next time: it may have been replaced by a file of the same size and time.
        part_path(parts, source).unlink()
    others = ", ".join(source.name for source, _ in bad[1:9])
    more = f" ({len(bad)} of {len(sources)} tars cannot be used, also {others})" if others else ""
    raise ValueError(f"shard {bad[0][0].url} {bad[0][1]}{more}")


def write_samples(sources: Sequence[Source], parts: Path, sizes: Sequence[int], path: Path) -> list[str]:
    """samples.npy from the parts; returns a digest of each shard's rows."""
    digests, start = [], 0
    samples_N = np.lib.format.open_memmap(path, "w+", SAMPLE, (sum(sizes),))
    for source in sources:
        with np.load(part_path(parts, source), allow_pickle=False) as part:
            rows = part["samples"]
        samples_N[start : start + len(rows)] = rows
        start += len(rows)
        digests.append(sha256(rows.tobytes()).hexdigest())
    samples_N.flush()
    return digests


def manifest_fields(
    sources: Sequence[Source], facts: Sequence[dict[str, Any]], digests: Sequence[str]
) -> dict[str, Any]:
    shards, left_out = [], Counter()
    for fact in facts:
        name, path, size, mtime_ns = fact["identity"]
        shards.append(
            {"name": name, "path": path, "size": size, "mtime_ns": mtime_ns, "num_samples": fact["num_samples"]}
        )
        left_out.update(fact["left_out"])
    # Paths and times are no part of it: the same tars elsewhere are the same data.
    names = [[source.name, shard["size"]] for source, shard in zip(sources, shards, strict=True)]
    return {
        "num_samples": sum(fact["num_samples"] for fact in facts),
        "left_out": dict(sorted(left_out.items())),
        "fingerprint": fingerprint(FORMAT_VERSION, names, list(digests)),
        "shards": shards,
    }
