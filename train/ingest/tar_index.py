"""Where the members of a tar lie, grouped by key, so that its samples can be read in any order without holding them.

In: a seekable tar. Out: a `TarIndex` of offsets, about 1 KiB a key whatever the images weigh.
"""

import os
import re
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

# Members that webdataset takes for metadata.
META_PATTERN = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    offset: int
    size: int


@dataclass
class TarIndex:
    """Members by key and by lower-case extension; `torn` says where and why the tar could not be read to its end."""

    members: dict[str, dict[str, list[Member]]] = field(default_factory=dict)
    torn: str | None = None


def index_tar(file: BinaryIO) -> TarIndex:
    """Scan the headers of `file` once. Never raises for a damaged tar: everything before the damage is in the index."""
    index = TarIndex()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            index.torn = scan(tar, index, os.fstat(file.fileno()).st_size)
            if index.torn is None:
                index.torn = missing_end(file, tar.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        index.torn = f"{error} at byte {file.tell()}"
    return index


def scan(tar: tarfile.TarFile, index: TarIndex, file_size: int) -> str | None:
    while (info := tar.next()) is not None:
        # tarfile would keep every header in memory.
        tar.members = []
        if info.size < 0 or info.offset_data + info.size > file_size:
            return f"inside {info.name}, at byte {file_size} of the file"
        add_member(index, info)
    return None


def add_member(index: TarIndex, info: tarfile.TarInfo) -> None:
    if not info.isreg() or info.sparse is not None or META_PATTERN.match(info.name):
        return
    key, extension = base_plus_ext(info.name)
    if key is None:
        return
    by_extension = index.members.setdefault(key, {})
    by_extension.setdefault(extension.lower(), []).append(Member(info.offset_data, info.size))


def missing_end(file: BinaryIO, offset: int) -> str | None:
    """tarfile takes a broken header, or the end of the file, for the end of the archive: only zeros are."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return f"no end-of-archive mark at byte {offset}"
    if block.strip(b"\0"):
        return f"broken header at byte {offset}"
    return None


def read_member(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
