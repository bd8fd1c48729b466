"""The artists, and which picture of each shows which concept.

Icon sets are matched to the concepts by code points where they carry them; the others by the slug that their icon names
were made from (the concept's label in lower case, words joined by hyphens).
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.pocket.concepts import Concept
from train.pocket.fetch import read_json_members, read_members

CODE_POINTS, SLUG, JOINED_SLUG, FILE_NAME = "code points", "slug", "joined slug", "file name"
ICON_SET_MEMBERS = ("icons.json", "chars.json")


@dataclass(frozen=True)
class Artist:
    """A style: the package that holds it, how its pictures are matched to concepts, and groups that are left out."""

    name: str
    package: str
    matching: str
    groups_left_out: frozenset[str] = field(default_factory=frozenset)


TRAINING_ARTISTS = (
    Artist("twemoji", "@iconify-json/twemoji", CODE_POINTS),
    Artist("fluent-flat", "@iconify-json/fluent-emoji-flat", CODE_POINTS),
    Artist("fluent-3d", "@lobehub/fluent-emoji-3d", FILE_NAME, frozenset({"flags"})),
    Artist("emojione", "@iconify-json/emojione", SLUG),
    Artist("openmoji", "@iconify-json/openmoji", CODE_POINTS),
    Artist("emojione-v1", "@iconify-json/emojione-v1", SLUG),
    Artist("fxemoji", "@iconify-json/fxemoji", JOINED_SLUG),
)
TEST_ARTIST = Artist("noto", "@iconify-json/noto", CODE_POINTS)
VALIDATION_ARTIST = Artist("noto-v1", "@iconify-json/noto-v1", SLUG)


@dataclass(frozen=True)
class Drawing:
    """One concept by one artist: an SVG document or WebP file in `source`, which is None where the artist drew none."""

    artist: str
    concept: Concept
    source: bytes | None
    address: str


def read_drawings(artist: Artist, package_address: str, tarball: Path, concepts: list[Concept]) -> list[Drawing]:
    """The artist's drawings of `concepts`, in their order.

    Where matching is by code points, a base concept without a picture stays in the list with `source` None. With slugs
    the picture may exist under an older name of the concept, so nothing is said about it.
    """
    wanted = [concept for concept in concepts if concept.group not in artist.groups_left_out]
    pictures = read_files(tarball) if artist.matching == FILE_NAME else read_icon_set(tarball, artist.matching)
    drawings = []
    for concept in wanted:
        name = next((name for name in candidate_names(concept, artist.matching) if name in pictures), None)
        if name is not None:
            drawings.append(Drawing(artist.name, concept, pictures[name], f"{package_address}#{name}"))
        elif artist.matching in (CODE_POINTS, FILE_NAME) and not concept.has_skin_tone:
            drawings.append(Drawing(artist.name, concept, None, f"{package_address}#{concept.hexcode.lower()}"))
    if not any(drawing.source for drawing in drawings):
        raise ValueError(f"{tarball} holds no drawing of a known concept; remove the file and run again")
    return drawings


def candidate_names(concept: Concept, matching: str) -> list[str]:
    """The names under which a picture of `concept` may be found, the likeliest first."""
    if matching in (CODE_POINTS, FILE_NAME):
        return [strip_variation_selector(concept.hexcode)]
    name = slug(concept.label)
    if matching == JOINED_SLUG:
        return [name.replace("-", "")]
    # Older sets write "flag: France" as flag-for-france, noto-v1 a few as flag-for-flag-france.
    country = name.removeprefix("flag-")
    return [name] if country == name else [name, f"flag-for-{country}", f"flag-for-flag-{country}"]


def strip_variation_selector(code_points: str) -> str:
    """`263A-FE0F` -> `263a`: whether U+FE0F is written differs from set to set and says nothing about the picture."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """`man's shoe` -> `mans-shoe`, `flag: Sao Tome & Principe` -> `flag-sao-tome-and-principe`."""
    letters = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"['.!]", "", letters.replace("&", " and "))
    return re.sub(r"[^a-z0-9#*]+", "-", words).strip("-")


def read_files(tarball: Path) -> dict[str, bytes]:
    """Pictures of a package with one WebP file a concept, by code points."""
    files = read_members(tarball, lambda name: name.startswith("assets/") and name.endswith(".webp"))
    return {strip_variation_selector(Path(name).stem): content for name, content in files}


def read_icon_set(tarball: Path, matching: str) -> dict[str, bytes]:
    """SVG documents of an Iconify package, by code points (`chars.json`) or by icon name."""
    icon_set, characters = read_json_members(tarball, ICON_SET_MEMBERS)
    documents = dict(svg_documents(icon_set))
    if matching != CODE_POINTS:
        return documents
    names = {strip_variation_selector(code_points): name for code_points, name in characters.items()}
    return {code_points: documents[name] for code_points, name in names.items() if name in documents}


def svg_documents(icon_set: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """(icon name, SVG document) of every icon and alias; an alias may mirror its parent."""
    for name, icon in icon_set["icons"].items():
        yield name, svg_document(icon, icon_set, mirrored=False)
    for name, alias in icon_set.get("aliases", {}).items():
        unknown = set(alias) - {"parent", "hFlip", "hidden"}
        if unknown:
            raise ValueError(
                f"alias {name} of icon set {icon_set['prefix']} asks for {sorted(unknown)}, only hFlip is known"
            )
        parent = icon_set["icons"].get(alias["parent"])
        if parent is not None:
            yield name, svg_document(parent, icon_set, mirrored=bool(alias.get("hFlip")))


def svg_document(icon: dict[str, Any], icon_set: dict[str, Any], *, mirrored: bool) -> bytes:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if mirrored:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    ).encode()
