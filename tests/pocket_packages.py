"""A tiny stand-in for the npm packages of the pocket data: the same files inside, a few plain drawings, no network."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from train.pocket.artists import TEST_ARTIST, TRAINING_ARTISTS, VALIDATION_ARTIST
from train.pocket.packages import PINNED_PACKAGES, Package

ANIMALS = [
    "cat",
    "dog",
    "fox",
    "hen",
    "owl",
    "pig",
    "bee",
    "cow",
    "eel",
    "elk",
    "emu",
    "gnu",
    "koi",
    "ram",
    "rat",
    "yak",
]
TABLE = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32},
    {"label": "grinning face", "hexcode": "1F600", "tags": ["cheerful", "happy"], "group": 0, "subgroup": 0},
    {"label": "smiling face", "hexcode": "263A-FE0F", "tags": ["smile"], "group": 0, "subgroup": 0},
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["bye"],
        "group": 1,
        "subgroup": 16,
        "skins": [
            {"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"},
            {"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"},
        ],
    },
    {"label": "flag: C\u00f4te d\u2019Ivoire", "hexcode": "1F1E8-1F1EE", "tags": [], "group": 9, "subgroup": 98},
    *[
        {"label": animal, "hexcode": f"1F4{i:02X}", "tags": [animal, "pet"], "group": 3, "subgroup": 34}
        for i, animal in enumerate(ANIMALS)
    ],
]
MESSAGES = {
    "groups": [
        {"key": "smileys-emotion", "message": "smileys & emotion"},
        {"key": "people-body", "message": "people & body"},
        {"key": "component", "message": "components"},
        {"key": "animals-nature", "message": "animals & nature"},
        {"key": "flags", "message": "flags"},
    ]
}
GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "2": "component", "3": "animals-nature", "9": "flags"},
    "subgroups": {
        "0": "face-smiling",
        "16": "hand-fingers-open",
        "32": "skin-tone",
        "34": "animal-mammal",
        "98": "country-flag",
    },
}
# Icon names as the real sets write them. A set without code points has them under slugs alone.
NAMES = {
    "1F600": "grinning-face",
    "263A-FE0F": "smiling-face",
    "1F44B": "waving-hand",
    "1F44B-1F3FB": "waving-hand-light-skin-tone",
    "1F1E8-1F1EE": "flag-for-cote-divoire",
    **{f"1F4{i:02X}": animal for i, animal in enumerate(ANIMALS)},
}
# Two captions with one and the same drawing, as happens in the real sets.
TWINS = ("rat", "ram")


def write_fake_packages(cache: Path) -> list[Package]:
    """Write a tarball for every pinned package into `cache`; returns the packages with the integrity of these tarballs."""
    cache.mkdir(parents=True, exist_ok=True)
    matching = {artist.package: artist.matching for artist in (*TRAINING_ARTISTS, TEST_ARTIST, VALIDATION_ARTIST)}
    packages = []
    for package in PINNED_PACKAGES:
        if package.name == "emojibase-data":
            members = {"en/data.json": TABLE, "en/messages.json": MESSAGES, "meta/groups.json": GROUPS}
        elif matching[package.name] == "file name":
            members = fluent_3d_members()
        else:
            members = icon_set_members(package.name, matching[package.name])
        content = tarball(members)
        (cache / package.tarball_name).write_bytes(content)
        packages.append(dataclasses.replace(package, sha512=sha512_of(content)))
    return packages


def sha512_of(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode()


def tarball(members: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def colour_of(*names: str) -> str:
    return "#" + hashlib.sha256("/".join(names).encode()).hexdigest()[:6]


def icon_set_members(package: str, matching: str) -> dict[str, object]:
    icons, characters = {}, {}
    for hexcode, name in NAMES.items():
        icon = name.replace("-", "") if matching == "joined slug" else name
        colour = colour_of(package, TWINS[0] if name in TWINS else name)
        icons[icon] = {"body": f'<rect width="16" height="32" fill="{colour}"/>'}
        characters[hexcode.lower().replace("-fe0f", "")] = icon
    has_characters = matching == "code points"
    icon_set = {"prefix": package, "width": 32, "height": 32, "icons": icons, "aliases": {}}
    return {"icons.json": icon_set, "chars.json": characters if has_characters else {}}


def fluent_3d_members() -> dict[str, object]:
    members: dict[str, object] = {"assets/../../outside.webp": b"not a picture"}
    for hexcode, name in NAMES.items():
        buffer = io.BytesIO()
        Image.new("RGBA", (256, 256), colour_of("fluent-3d", name)).save(buffer, "WEBP")
        members[f"assets/{hexcode.lower()}.webp"] = buffer.getvalue()
    return members
