"""The manifest that every folder handed from one stage to the next carries, and the atomic way to finish such a folder.

A stage writes into a temporary sibling, then `commit_folder` makes it durable and renames it: a reader sees a whole
folder or none. `read_manifest` refuses a folder of another kind or version with the remedy in the message.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

MANIFEST_NAME = "manifest.json"


def fingerprint(*parts: Any) -> str:
    """Hex sha256 over the parts in order: `bytes` as they are, everything else as canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes | memoryview) else json.dumps(part, sort_keys=True).encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def write_json_atomically(path: Path, content: Any) -> None:
    """Write JSON beside `path`, fsync, rename over it: a reader sees the old file or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        dump_json(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def dump_json(content: Any, file: TextIO) -> None:
    json.dump(content, file, indent=1)
    file.write("\n")


def write_manifest(folder: str | Path, kind: str, version: int, **fields: Any) -> None:
    """Write `manifest.json` atomically: a stage's last file, since its presence says that the folder is complete."""
    write_json_atomically(Path(folder) / MANIFEST_NAME, {"kind": kind, "format_version": version, **fields})


def write_manifest_for_commit(temporary: Path, kind: str, version: int, **fields: Any) -> None:
    """The same in a folder that only `commit_folder` makes durable and visible: it is not synced twice."""
    with open(temporary / MANIFEST_NAME, "w", encoding="utf-8") as file:
        dump_json({"kind": kind, "format_version": version, **fields}, file)


def read_manifest(folder: str | Path, kind: str, version: int, *, remedy: str) -> dict[str, Any]:
    """Return the manifest's fields.

    Raises ValueError naming the folder and `remedy` when the folder or its manifest is missing, is not JSON, is of
    another kind, or has another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder, {with_article(kind)} was expected there; {remedy}")
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST_NAME}, so it is no complete {kind}; {remedy}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    if manifest.get("kind") != kind:
        raise ValueError(f"{folder} holds a {manifest.get('kind')!r}, {with_article(kind)} was expected; {remedy}")
    if manifest.get("format_version") != version:
        raise ValueError(
            f"{folder} has format version {manifest.get('format_version')}, this program reads version {version}; "
            f"{remedy}"
        )
    return manifest


def with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def commit_folder(temporary: Path, final: Path) -> None:
    """Make every file below `temporary` durable, then rename it to `final`, replacing what was there."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        fsync_folder(folder)
    replaced = final.with_name(f".{final.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if final.exists():
        # Renamed, not removed, first: a kill in between leaves both whole folders on disk.
        os.replace(final, replaced)
    os.replace(temporary, final)
    fsync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
