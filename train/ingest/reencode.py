"""Pictures made smaller while they are ingested (`--reencode`): the longest side to a limit, aspect ratio kept.

In: an opened, not yet decoded PIL image that is larger than the limit. Out: the bytes to store and their size. A picture
keeps its format: JPEG and WebP are written at the given quality, PNG without loss. It keeps its colour profile and its
EXIF orientation (so that every viewer and loader still shows what it showed); other metadata and further frames of an
animation are dropped. The bytes depend on Pillow and its codecs, whose versions `encoder` names.
"""

import io
from typing import NamedTuple

from PIL import Image, features

# An MPO is a JPEG with further pictures behind the first.
OUTPUT_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "WEBP": "WEBP"}
# Modes that cannot be filtered: bits and palette entries are no quantities.
FILTERABLE_MODES = {"1": "L", "PA": "RGBA"}
ORIENTATION_TAG = 0x0112
# JPEG decodes straight to 1/2, 1/4 or 1/8; twice the size that is wanted leaves the filter enough to work with.
DRAFT_GAP = 2


class Picture(NamedTuple):
    """Bytes as they are stored, and their size in pixels."""

    data: bytes
    width: int
    height: int


class CannotShrink(Exception):
    """The picture decodes, and cannot be written smaller; the message says why."""


def encoder() -> str:
    """What writes the pictures; other versions may write other bytes."""
    codecs = {name: features.version(name) for name in ("libjpeg_turbo", "jpg", "webp", "zlib")}
    return f"Pillow {Image.__version__} with " + ", ".join(f"{name} {version}" for name, version in codecs.items())


def shrunk_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height, both at least 1, with the longest side `max_side`."""
    longest = max(width, height)
    return max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest))


def shrink(image: Image.Image, max_side: int, quality: int) -> Picture:
    """Decode `image` and encode it with its longest side `max_side`.

    Raises what Pillow raises for a damaged picture, CannotShrink when it is whole and cannot be written.
    """
    output_format = OUTPUT_FORMATS[image.format]
    width, height = shrunk_size(*image.size, max_side)
    image.draft(None, (DRAFT_GAP * width, DRAFT_GAP * height))
    # Before anything else: reading a PNG's EXIF loads the picture, and a second load hides what was wrong at the first.
    image.load()
    try:
        smaller = filterable(image).resize((width, height), Image.Resampling.LANCZOS)
        data = encode(smaller, output_format, quality, image.info.get("icc_profile"), read_orientation(image))
    except (OSError, ValueError, KeyError) as error:
        raise CannotShrink(f"{output_format} of mode {image.mode}: {error}") from error
    return Picture(data, width, height)


def read_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION_TAG)
    # Cameras and editors write broken EXIF, which Pillow meets with SyntaxError, struct.error, ...: viewers ignore it too.
    except Exception:
        return None


def filterable(image: Image.Image) -> Image.Image:
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert(FILTERABLE_MODES[image.mode]) if image.mode in FILTERABLE_MODES else image


def encode(
    image: Image.Image, output_format: str, quality: int, icc_profile: bytes | None, orientation: int | None
) -> bytes:
    options = {"icc_profile": icc_profile} if icc_profile else {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        options["exif"] = exif.tobytes()
    if output_format != "PNG":
        options["quality"] = quality
    buffer = io.BytesIO()
    image.save(buffer, output_format, **options)
    return buffer.getvalue()
