"""Source shards: what `--shards` stands for, the name of each, and how to get one as a seekable local tar.

In: local paths, brace ranges, globs, http(s) URLs and `pipe:` commands, several joined by "::" (webdataset's notation).
Out: a list of `Source` in the order of their names, and open files.
"""

import bz2
import glob
import gzip
import lzma
import os
import posixpath
import shlex
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from mining.manifest import fingerprint

COPY_BYTES = 1 << 20
# gopen's curl itself retries a busy server; these attempts are for transfers that break off.
ATTEMPTS = 3
RETRY_WAIT_S = 1.0
DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# The exit codes of curl that a user meets.
CURL_EXITS = {
    6: "host not found",
    7: "no connection to the server",
    18: "transfer cut off",
    22: "the server answered with an error, such as 404",
    28: "timed out",
    56: "connection lost",
}
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class UnreadableShard(Exception):
    """A source shard that cannot be read at all; the message names it and says why."""


class BrokenTransfer(Exception):
    """One attempt to fetch a shard failed."""


@dataclass(frozen=True)
class Source:
    """One source shard. `name` is what the ledger says; `size` is in bytes, None when it is not a local file."""

    name: str
    url: str
    local: bool
    size: int | None

    def identity(self) -> str:
        """Hex digest of where the shard comes from. A signed URL's query is left out: it changes from run to run."""
        return fingerprint(self.url if self.local or self.url.startswith("pipe:") else strip_query(self.url))


def expand_shards(patterns: Sequence[str]) -> list[Source]:
    """Every shard that the patterns stand for, once each, ordered by name.

    Raises ValueError for a pattern that matches nothing, a missing or unreadable local file, a folder, an unknown URL
    scheme, and shards that cannot be told apart by name.
    """
    urls = list(dict.fromkeys(url for pattern in patterns for url in expand_pattern(pattern)))
    names = shard_names(urls)
    sources = [
        Source(name, url, is_local(url), os.path.getsize(url) if is_local(url) else None)
        for name, url in zip(names, urls, strict=True)
    ]
    return sorted(sources, key=lambda source: source.name)


def expand_pattern(pattern: str) -> list[str]:
    try:
        expanded = expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--shards {pattern!r} cannot be expanded ({error}); write the paths out") from error
    urls = [url for item in expanded for url in expand_glob(item, pattern)]
    if not urls:
        raise ValueError(f"no shards match --shards {pattern!r}; give paths such as 'cc12m/{{00000..01242}}.tar'")
    return urls


def expand_glob(item: str, pattern: str) -> list[str]:
    scheme = "" if os.path.lexists(item) else "pipe" if item.startswith("pipe:") else urlsplit(item).scheme
    if scheme == "file":
        item, scheme = unquote(urlsplit(item).path), ""
    if scheme:
        return [check_scheme(item, scheme)]
    if not item or item == "-":
        raise ValueError(f"--shards {pattern!r} names no file; for standard input write it to a file first")
    paths = [item] if os.path.lexists(item) or not glob.has_magic(item) else sorted(glob.glob(item, recursive=True))
    return [check_file(path) for path in paths]


def check_scheme(url: str, scheme: str) -> str:
    if scheme not in gopen_schemes or scheme == "__default__":
        raise ValueError(f"--shards {url}: {scheme}:// is not a known scheme; use http(s):// or 'pipe:COMMAND'")
    return url


def check_file(path: str) -> str:
    if os.path.isdir(path):
        raise ValueError(f"--shards {path} is a folder; give its shards, for example '{path.rstrip('/')}/*.tar'")
    if not os.path.isfile(path):
        raise ValueError(f"shard {path} does not exist; check the range and the folder given to --shards")
    if not os.access(path, os.R_OK):
        raise ValueError(f"shard {path} may not be read; check its permissions")
    return os.path.abspath(path)


def is_local(url: str) -> bool:
    return url.startswith("/")


def shard_names(urls: Sequence[str]) -> list[str]:
    """Basenames, or, when two are equal, paths relative to the folder that all shards share."""
    paths = [path_of(url) for url in urls]
    names = [posixpath.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [path.split("/") for path in paths]
    shared = num_shared([path[:-1] for path in parts])
    names = ["/".join(path[shared:]) for path in parts]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        first, second = [url for url, other in zip(urls, names, strict=True) if other == name][:2]
        raise ValueError(f"--shards: {first} and {second} would both be called {name}; give them different file names")
    return names


def num_shared(folders: Sequence[Sequence[str]]) -> int:
    """How many leading components all folders share."""
    return next(
        (i for i, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1), min(map(len, folders))
    )


def path_of(url: str) -> str:
    """The part of a URL that looks like a path: of a `pipe:` command its first word that names a tar."""
    if url.startswith("pipe:"):
        return path_in_command(url[len("pipe:") :])
    if is_local(url):
        return url
    return strip_query(url).split("://", 1)[1]


def path_in_command(command: str) -> str:
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words = [strip_query(word) for word in lexer]
    except ValueError:
        words = []
    tars = [word for word in words if word.endswith(TAR_ENDINGS)]
    # Without such a word the whole command is the name; it may not be taken for a path.
    return tars[0].split("://", 1)[-1] if tars else command.strip().replace("/", "_")


def strip_query(url: str) -> str:
    return url.split("?", 1)[0].split("#", 1)[0] if "://" in url else url


def plain_tar(source: Source, spool: Path) -> Path:
    """A path to the shard as a seekable, uncompressed tar: the shard itself when it is one, else a copy.

    Copies are `spool` and `spool` + ".plain"; the caller removes them. Raises UnreadableShard naming the shard.
    """
    path = Path(source.url)
    if not source.local:
        fetch(source, spool)
        path = spool
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise UnreadableShard(f"shard {source.name} cannot be read ({error})") from error
    for start, decompressor in DECOMPRESSORS.items():
        if magic.startswith(start):
            plain = plain_path(spool)
            copy_chunks(decompressed_chunks(decompressor, path), plain)
            return plain
    return path


def plain_path(spool: Path) -> Path:
    return spool.with_name(spool.name + ".plain")


def fetch(source: Source, spool: Path) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            copy_chunks(streamed_chunks(source.url), spool)
            return
        except BrokenTransfer as error:
            if attempt == ATTEMPTS:
                raise UnreadableShard(
                    f"shard {source.name} cannot be read after {ATTEMPTS} attempts: {error}"
                ) from error
            time.sleep(RETRY_WAIT_S * attempt)


def copy_chunks(chunks: Iterator[bytes], path: Path) -> None:
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)


def streamed_chunks(url: str) -> Iterator[bytes]:
    """The bytes behind a URL or command. Raises BrokenTransfer; errors of the disk they are written to stay what they are."""
    try:
        stream = gopen(url)
    except FileNotFoundError as error:
        raise BrokenTransfer(f"{error.filename} is not installed, which webdataset needs to read {url}") from error
    try:
        try:
            while chunk := stream.read(COPY_BYTES):
                yield chunk
        finally:
            # Closing waits for the command and raises OSError when it failed.
            stream.close()
    except OSError as error:
        raise BrokenTransfer(describe_exit(url, stream.status)) from error


def describe_exit(url: str, status: int) -> str:
    """Why the process behind a URL failed: a `pipe:` command, or the curl (gsutil, ...) that webdataset starts."""
    meaning = "" if url.startswith("pipe:") else CURL_EXITS.get(status, "")
    return f"{strip_query(url)} ended with exit {status}" + (f" ({meaning})" if meaning else "")


def decompressed_chunks(decompressor: Callable[..., BinaryIO], path: Path) -> Iterator[bytes]:
    with decompressor(path, "rb") as packed:
        while True:
            try:
                chunk = packed.read(COPY_BYTES)
            # A torn or damaged archive ends early: what came out is kept, and the tar inside is torn at that place.
            except (EOFError, OSError, lzma.LZMAError, zlib.error):
                return
            if not chunk:
                return
            yield chunk
