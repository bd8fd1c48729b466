"""PairStore: image-text pairs with dense ids 0..N-1, written once by `train.ingest`, read by id everywhere else.

Ids follow the order of (source shard name, key), both compared as strings: the same input has the same ids wherever and
with however many workers it is ingested.

A folder:
    index.json         MDS index over every shard file; sample i of the whole is pair_id i. Streaming reads it as it is.
    shards/*/*.mds     columns caption (str), image (bytes as found, or smaller by --reencode), key (str), pair_id (int)
    ledger.parquet     row i = pair_id i: pair_id, key, shard, image_sha256 (of the bytes as found), caption_hash,
                       width, height (as stored)
    rejected.parquet   shard, key, reason of everything that was left out
    checksums.npy      uint32 [N], CRC-32 of each sample as stored (without its pair_id): finds a damaged shard on read
    ingest.json        what the store was made from (train.ingest.plan)
    manifest.json      written last: counts, parameters, fingerprint, sizes of the files above

The folder may lie in remote storage (s3://, gs://, sftp://, ...): then a cache folder holds what was fetched of it, the small
files when the store is opened, each MDS file when a pair of it is first asked for (mining.remote_folder).

In: such a folder. Out: pairs by id, the ledger, and the groups of equal images and equal captions.
"""

import json
import operator
import unicodedata
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mining.manifest import MANIFEST_NAME, read_manifest
from mining.mds_files import (
    CHECKSUMS_NAME,
    INDEX_NAME,
    check_fetched_size,
    check_is_json,
    check_shard,
    check_size,
    open_remote,
    sample_checksum,
)
from mining.remote_folder import RemoteFolder, RetryPolicy

KIND = "PairStore"
FORMAT_VERSION = 1
LEDGER_NAME = "ledger.parquet"
REJECTED_NAME = "rejected.parquet"
SHARDS_FOLDER = "shards"
MDS_COLUMNS = {"caption": "str", "image": "bytes", "key": "str", "pair_id": "int"}
REMEDY = "make it again with `python -m train.ingest --shards ... --out FOLDER`"


class PairSample(NamedTuple):
    image: bytes
    caption: str
    pair_id: int
    key: str


class PairStore:
    """Random access to the pairs of a folder made by `train.ingest`, here or in remote storage.

    Opening reads the manifest and the MDS index and compares the size of every file; ledger, checksums and Streaming's
    readers are loaded when first used. A store pickles into DataLoader workers without what it has loaded. Importing
    Streaming takes seconds: read one pair before forking workers, and they inherit it.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        shard_infos: list[dict[str, Any]],
        remote: RemoteFolder | None = None,
    ) -> None:
        self.path = path
        self.remote = remote
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.shard_infos = shard_infos
        self._first_ids = np.concatenate([[0], np.cumsum([info["samples"] for info in shard_infos], dtype=np.int64)])
        self._loaded: dict[str, Any] = {}

    @classmethod
    def open(
        cls, path: str | Path, *, cache: str | Path | None = None, retry: RetryPolicy | None = None
    ) -> "PairStore":
        """Open and check a store.

        `path` is a folder, or a URL of remote storage that Streaming reads; then `cache` is the local folder of what is
        fetched of it, a new or empty one or the one of an earlier run, which any number of processes may share. `path` of
        the opened store is that folder. `retry` says how long an absent remote is waited for.

        Raises ValueError, naming the file and the remedy, for a folder that is no finished PairStore, a store of another
        format version, a missing file, a file of another size than was written, and counts that disagree; and for a remote
        that stays away or lacks a file, a URL without cache, and a cache folder that holds anything else.
        """
        remote = open_remote(path, cache, retry)
        folder = Path(path) if remote is None else remote.cache
        if remote:
            remote.fetch(MANIFEST_NAME, check_is_json)
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, remedy=REMEDY)
        for name, size in manifest["files"].items():
            if remote:
                remote.fetch(name, partial(check_fetched_size, size=size))
            check_size(folder / name, size, REMEDY)
        index_path = folder / INDEX_NAME
        try:
            shard_infos = json.loads(index_path.read_text(encoding="utf-8"))["shards"]
            for info in shard_infos:
                file = folder / info["raw_data"]["basename"]
                if remote is None or file.exists():
                    check_size(file, info["raw_data"]["bytes"], REMEDY)
            store = cls(folder, manifest, shard_infos, remote)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index_path} is damaged ({error!r}); {REMEDY}") from error
        store._check_counts()
        return store

    def _check_counts(self) -> None:
        num_pairs = self.manifest["num_pairs"]
        counts = {INDEX_NAME: len(self), LEDGER_NAME: self._ledger_rows(), CHECKSUMS_NAME: len(self.checksums_N)}
        for name, count in counts.items():
            if count != num_pairs:
                raise ValueError(f"{self.path / name} holds {count} pairs, the manifest says {num_pairs}; {REMEDY}")

    def _ledger_rows(self) -> int:
        try:
            return pq.read_metadata(self.path / LEDGER_NAME).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path / LEDGER_NAME} is damaged ({error}); {REMEDY}") from error

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def __getitem__(self, pair_id: int) -> PairSample:
        """The pair with this id, 0 <= pair_id < N; waits while its shard is fetched from a remote.

        Raises IndexError outside the range, and ValueError naming the shard file when what it holds is not what was
        written there, or when it can't be fetched.
        """
        pair_id = operator.index(pair_id)
        if not 0 <= pair_id < len(self):
            raise IndexError(f"pair_id={pair_id} is outside 0..{len(self) - 1} of {self.path}")
        shard = self._shard_of(pair_id)
        sample = self._readers()[shard].decode_sample(self.stored_sample(pair_id))
        if sample["pair_id"] != pair_id:
            raise self._damaged(shard, pair_id, f"it holds pair_id {sample['pair_id']} there")
        return PairSample(sample["image"], sample["caption"], pair_id, sample["key"])

    def stored_sample(self, pair_id: int) -> bytes:
        """The pair as its shard holds it, in Streaming's encoding of `MDS_COLUMNS`; its checksum is right. Raises as `store[pair_id]`."""
        shard = self._shard_of(pair_id)
        self._fetch_shard(shard)
        place = pair_id - int(self._first_ids[shard])
        try:
            with open(self.shard_file(shard), "rb", buffering=0) as file:
                # MDS: uint32 count, then count + 1 uint32 offsets.
                file.seek(4 + 4 * place)
                begin, end = np.frombuffer(file.read(8), "<u4").tolist()
                file.seek(begin)
                data = file.read(max(0, end - begin))
        except (OSError, ValueError) as error:
            raise self._damaged(shard, pair_id, str(error)) from error
        if sample_checksum(data) != self.checksums_N[pair_id]:
            raise self._damaged(shard, pair_id, "its checksum differs")
        return data

    def stored_sizes(self) -> np.ndarray:
        """Bytes of every pair as stored, uint32 [N], from the heads of all shards."""
        sizes = []
        for shard, info in enumerate(self.shard_infos):
            self._fetch_shard(shard)
            with open(self.shard_file(shard), "rb") as file:
                offsets = np.frombuffer(file.read(8 + 4 * info["samples"])[4:], "<u4")
            if len(offsets) != 1 + info["samples"] or (offsets[1:] < offsets[:-1]).any():
                raise self._damaged(shard, int(self._first_ids[shard]), "its offsets are no offsets")
            sizes.append(np.diff(offsets))
        return np.concatenate(sizes)

    def shard_file(self, shard: int) -> Path:
        """Where the file of a shard lies, or will once it is fetched."""
        return self.path / self.shard_infos[shard]["raw_data"]["basename"]

    def place_of(self, pair_id: int) -> str:
        """The file that holds a pair, for messages."""
        return str(self.shard_file(self._shard_of(pair_id)))

    def _shard_of(self, pair_id: int) -> int:
        return int(np.searchsorted(self._first_ids, pair_id, side="right")) - 1

    def prefetch(self, pair_ids: np.ndarray) -> None:
        """Bring the shards of these pairs, int [any], into the cache, those first that no other process is fetching.

        For a batch that is about to be read. Returns at once for a local store, and raises what `store[pair_id]` raises.
        """
        if self.remote is None:
            return
        shards = np.unique(np.searchsorted(self._first_ids, pair_ids, side="right") - 1).tolist()
        for shard in [shard for shard in shards if not self._fetch_shard(shard, wait=False)]:
            self._fetch_shard(shard)

    def _fetch_shard(self, shard: int, *, wait: bool = True) -> bool:
        """Whether the file of this shard is there now."""
        if self.remote is None or self._is_here()[shard]:
            return True
        name = self.shard_infos[shard]["raw_data"]["basename"]
        self._is_here()[shard] = self.remote.fetch(name, partial(self._check_shard, shard=shard), wait=wait) is not None
        return bool(self._is_here()[shard])

    def _is_here(self) -> np.ndarray:
        return self._load("is_here", lambda: np.zeros(len(self.shard_infos), bool))

    def _check_shard(self, file: Path, shard: int) -> None:
        info, first_id = self.shard_infos[shard], int(self._first_ids[shard])
        check_shard(file, info, first_id, self.checksums_N[first_id : first_id + info["samples"]])

    @property
    def ledger(self) -> pa.Table:
        """pair_id int64, key, shard, image_sha256, caption_hash (str), width, height int32; row i is pair_id i."""
        return self._load("ledger", lambda: self._read_ledger(None))

    @property
    def image_group_N(self) -> np.ndarray:
        """int32 [N], dense from 0: equal numbers mean that the image files, as found, have the same bytes."""
        return self._load("image_group_N", lambda: self._groups("image_sha256"))

    @property
    def caption_group_N(self) -> np.ndarray:
        """int32 [N], dense from 0: equal numbers mean that the captions are equal after `normalise_caption`."""
        return self._load("caption_group_N", lambda: self._groups("caption_hash"))

    def _groups(self, column: str) -> np.ndarray:
        # large_string: the dictionary of 64 hex digits a pair passes 2 GiB at 33 million pairs.
        hashes = self._read_ledger([column])[column].cast(pa.large_string()).combine_chunks()
        return hashes.dictionary_encode().indices.to_numpy().astype(np.int32, copy=False)

    def _read_ledger(self, columns: list[str] | None) -> pa.Table:
        try:
            return pq.read_table(self.path / LEDGER_NAME, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path / LEDGER_NAME} is damaged ({error}); {REMEDY}") from error

    @property
    def checksums_N(self) -> np.ndarray:
        """uint32 [N], memory-mapped: `sample_checksum` of each stored sample."""
        return self._load("checksums", self._read_checksums)

    def _read_checksums(self) -> np.ndarray:
        try:
            return np.load(self.path / CHECKSUMS_NAME, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{self.path / CHECKSUMS_NAME} is damaged ({error}); {REMEDY}") from error

    def _readers(self) -> list[Any]:
        return self._load("readers", self._make_readers)

    def _make_readers(self) -> list[Any]:
        # Imported here: it takes seconds, and those who only read the ledger need none of it.
        from mining.mds import streaming

        read = streaming.base.format.reader_from_json
        return [read(str(self.path), None, info) for info in self.shard_infos]

    def _damaged(self, shard: int, pair_id: int, what: str) -> ValueError:
        remedy = f"copy the file again or {REMEDY}" if self.remote is None else "delete it and it is fetched again"
        return ValueError(f"{self.shard_file(shard)} is damaged at pair_id {pair_id} ({what}); {remedy}")

    def _load(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = make()
        return self._loaded[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}


def normalise_caption(caption: str) -> str:
    """NFC, case-folded, every run of whitespace one space, none at the ends: what makes two captions the same."""
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


def caption_hash(caption: str) -> str:
    """Hex sha256 of the normalised caption's UTF-8 bytes."""
    return sha256(normalise_caption(caption).encode()).hexdigest()
