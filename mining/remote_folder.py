"""One folder in remote storage, seen through a cache folder: each file is fetched when asked for, checked, then renamed.

Owns: which cache folder belongs to which remote, retries, and that several processes (workers, ranks of a node) share
the cache. The transfer itself is MosaicML Streaming's (`CloudDownloader`: s3, gs, sftp, azure, oci, hf, dbfs).

A cache folder:
    cache.json         written first: this folder is a cache, and of which remote; a folder without it is left alone
    .downloads/        locks and unfinished downloads: the only things that are ever removed
    everything else    files under the names that they have in the remote, whole and checked

In: a remote URL, its cache folder (or an empty one), names, and what makes a file right. Out: paths of files that are.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mining.manifest import write_json_atomically

MARKER_NAME = "cache.json"
MARKER_KIND = "HardpairCache"
DOWNLOADS_FOLDER = ".downloads"
# A file that arrives whole and is wrong so often is wrong in the remote.
MAX_WRONG_FILES = 3
# Of HTTP, as the drivers report it: to ask again gives the same answer.
FINAL_STATUS = {400, 401, 403, 404, 410}
FINAL_ERRORS = (FileNotFoundError, PermissionError, ModuleNotFoundError)
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
FINAL_ERROR_NAMES = {"AuthenticationException", "BadHostKeyException", "NoCredentialsError", "DefaultCredentialsError"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long an absent remote is waited for; below the ten minutes after which NCCL gives up on a rank."""

    patience_s: float = 300.0
    """seconds from a file's first failure to the error"""
    first_pause_s: float = 1.0
    """pause after the first failure; each later one is twice as long"""
    longest_pause_s: float = 30.0
    stall_s: float = 60.0
    """seconds without a byte after which a transfer counts as failed"""


class WrongFileError(Exception):
    """A file arrived whole and is not what was expected."""


class RemoteFolder:
    """Fetches files of `remote` into `cache`. Pickles, and may be used by any number of processes at once.

    Raises ValueError for a URL that carries a password, a scheme that Streaming does not know, and a cache folder that
    holds anything but a cache of this remote: no file of such a folder is changed or removed.
    """

    def __init__(self, remote: str, cache: str | Path, policy: RetryPolicy | None = None) -> None:
        self.remote, self.cache = remote.rstrip("/"), Path(cache)
        self.policy = RetryPolicy() if policy is None else policy
        check_url(self.remote)
        claim_cache(self.cache, self.remote)

    def fetch(self, name: str, check: Callable[[Path], None], *, wait: bool = True) -> Path | None:
        """The path of the file `name`, fetched if it is not there yet; None if another process fetches it and not `wait`.

        `check(path)` raises ValueError for a file that is not right; it is called once, before the file gets its name.
        Raises ValueError naming the file, the remote and the remedy when the remote does not have it, stays away for
        longer than the policy's patience, or keeps sending something that is not right.
        """
        target = self.cache / name
        if target.is_file():
            return target
        with self._locked(name, wait=wait) as is_mine:
            if target.is_file():
                return target
            if not is_mine:
                return None
            self._remove_leftovers(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fetch_patiently(name, check, target)
            return target

    def _fetch_patiently(self, name: str, check: Callable[[Path], None], target: Path) -> None:
        first_failure_s, pause_s, num_wrong = None, self.policy.first_pause_s, 0
        while True:
            try:
                return self._fetch_once(name, check, target)
            except Exception as error:  # the drivers raise whatever they like
                now_s = time.monotonic()
                first_failure_s = now_s if first_failure_s is None else first_failure_s
                num_wrong += isinstance(error, WrongFileError)
                waited_s = now_s - first_failure_s
                if num_wrong == MAX_WRONG_FILES or is_final(error) or waited_s + pause_s > self.policy.patience_s:
                    raise ValueError(self._complaint(name, error, waited_s)) from error
                logger.warning(
                    "%s/%s could not be fetched (%s); trying again in %.3g s",
                    self.remote,
                    name,
                    describe(error),
                    pause_s,
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self.policy.longest_pause_s)

    def _fetch_once(self, name: str, check: Callable[[Path], None], target: Path) -> None:
        # A folder of its own: the drivers put unfinished files beside the one they are asked for.
        folder = self._downloads / f"{self._flat(name)}.{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            file = folder / "file"
            download(f"{self.remote}/{name}", file, self.policy.stall_s)
            try:
                check(file)
            except ValueError as error:
                raise WrongFileError(str(error)) from error
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _complaint(self, name: str, error: Exception, waited_s: float) -> str:
        what = f"{self.remote}/{name} could not be fetched: {describe(error)}"
        if isinstance(error, WrongFileError):
            remedy = f"copy that file to the remote again; if the store there was made anew, give another cache folder than {self.cache}"
            return f"{what}, {MAX_WRONG_FILES} times in a row; {remedy}"
        if isinstance(error, ModuleNotFoundError):
            return f"{what}; install what Streaming needs for this kind of storage"
        if is_disk_error(error):
            return f"{what}; make room for {self.cache}, then run the same command again"
        if is_final(error):
            return f"{what}; check the address and the credentials"
        return (
            f"{what}; it was tried for {waited_s:.0f} s. See whether the remote answers, then run the same command again: "
            f"what is in {self.cache} is kept"
        )

    @property
    def _downloads(self) -> Path:
        return self.cache / DOWNLOADS_FOLDER

    def _flat(self, name: str) -> str:
        """Of this host's downloads of one file; locks of one host are sure, those between hosts may not be."""
        return f"{name.replace('/', '~')}@{socket.gethostname()}"

    def _remove_leftovers(self, name: str) -> None:
        """What killed processes of this host left of `name`; the caller holds its lock."""
        for leftover in self._downloads.glob(f"{self._flat(name)}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of one file; gives False when another process has it and not `wait`. It goes with the process."""
        self._downloads.mkdir(exist_ok=True)
        path = self._downloads / f"{self._flat(name)}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_mine = lock(descriptor, path, wait=wait)
            yield is_mine
            if is_mine:
                # Whoever waits for it finds the file in place, so a second lock of this name does no harm.
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        # Some cluster file systems have no locks: then a file may be fetched twice, each into a folder of its own.
        logger.warning("%s cannot be locked (%s); processes may fetch the same file", path, error)
    return True


def is_remote(path: object) -> bool:
    """Whether a store's place is a URL: `s3://bucket/cc12m`, `dbfs:/Volumes/...`, `file:///mnt/nfs/cc12m`."""
    return re.match(r"[a-z][a-z0-9+-]*:/", str(path)) is not None


def check_url(remote: str) -> None:
    if not re.match(r"[a-z][a-z0-9+-]*://|dbfs:/", remote):
        raise ValueError(f"{remote} is not a URL such as s3://bucket/folder")
    parts = urllib.parse.urlsplit(remote)
    if parts.password:
        shown = f"{parts.scheme}://{parts.username}:...@{parts.hostname}{parts.path}"
        raise ValueError(
            f"{shown} carries a password, which would be written into the run's files; use a key instead "
            "(sftp: COMPOSER_SFTP_KEY_FILE names it, COMPOSER_SFTP_KNOWN_HOSTS_FILE the hosts)"
        )


def claim_cache(cache: Path, remote: str) -> None:
    """Make `cache` this remote's cache, or see that it is. Raises ValueError for any other folder that is not empty."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / MARKER_NAME).is_file():
            strangers = [entry.name for entry in cache.iterdir() if MARKER_NAME not in entry.name]
            # Looked at again: another process may have claimed the folder and begun to fill it meanwhile.
            if strangers and not (cache / MARKER_NAME).is_file():
                raise ValueError(
                    f"the cache folder {cache} is not empty and is no cache (it holds {sorted(strangers)[0]}); nothing in it was "
                    "touched; give an empty folder, or one that does not exist yet"
                )
            if not strangers:
                write_json_atomically(cache / MARKER_NAME, {"kind": MARKER_KIND, "remote": remote})
        marker = json.loads((cache / MARKER_NAME).read_text(encoding="utf-8"))
        if marker["kind"] != MARKER_KIND:
            raise ValueError(f"{cache / MARKER_NAME} is not this program's; give another cache folder")
        of = marker["remote"]
    except OSError as error:
        raise ValueError(f"the cache folder {cache} cannot be written ({error}); give another one") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{cache / MARKER_NAME} is damaged ({error!r}); give another cache folder") from error
    if of != remote:
        raise ValueError(
            f"{cache} is the cache of {of}, not of {remote}; give each remote store a cache folder of its own"
        )


def download(url: str, file: Path, stall_s: float) -> None:
    """Fetch one file with Streaming's driver; TimeoutError when nothing more arrives for `stall_s` seconds."""
    # Imported here: it takes seconds, and a store whose files are all in the cache needs none of it.
    from mining.mds import streaming  # the one place that imports Streaming

    path = url.removeprefix("file://")
    # The one for plain paths is asked for by no path at all.
    downloader = streaming.base.storage.CloudDownloader.get(None if path != url else url)
    failures: list[Exception] = []

    def transfer() -> None:
        try:
            downloader.download(path, str(file), stall_s)
        except Exception as error:  # handed to the caller's thread
            failures.append(error)

    # In a thread, since sftp's driver knows no time limit: a server that falls silent would hold the worker for ever.
    thread = threading.Thread(target=transfer, daemon=True, name="download")
    thread.start()
    size, changed_s = 0, time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, stall_s / 4))
        now = bytes_in(file.parent)
        if now != size:
            size, changed_s = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - changed_s > stall_s:
            threading.Thread(target=downloader.clean_up, daemon=True, name="hang up").start()
            raise TimeoutError(f"nothing arrived for {stall_s:g} s, after {size} bytes")
    downloader.clean_up()
    if failures:
        raise failures[0]


def bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            # Renamed by the driver just now.
            continue
    return total


def is_final(error: Exception) -> bool:
    """Whether the same question would get the same answer: nothing there, no right to it, no driver, no room for it."""
    if isinstance(error, FINAL_ERRORS) or type(error).__name__ in FINAL_ERROR_NAMES or is_disk_error(error):
        return True
    if "not found in known_hosts" in str(error):
        return True
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = metadata.get("HTTPStatusCode") or getattr(error, "status_code", None) or getattr(error, "code", None)
    return isinstance(status, int) and status in FINAL_STATUS


def is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRNOS


def describe(error: Exception) -> str:
    if isinstance(error, WrongFileError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
