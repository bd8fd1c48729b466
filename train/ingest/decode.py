"""One sample of a tar: a pair to keep, or the reason to reject it.

In: the members of one key. Out: a `Pair` with the bytes as found (smaller ones when `--reencode` asks for it), or
`Rejected`. Nothing here is fatal.
"""

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from PIL import Image

from train.ingest.plan import Parameters
from train.ingest.reencode import CannotShrink, Picture, shrink
from train.ingest.tar_index import Member

# The first of these that a key has is its image.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSION = "txt"
JSON_EXTENSION = "json"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
# A member is read into memory whole; an honest photograph is nowhere near.
MAX_MEMBER_MIB = 256


class Rejected(Exception):
    """The reason, "category: detail" or "category", as rejected.parquet has it."""


@dataclass(frozen=True)
class Pair:
    """A pair to keep: caption as found, image bytes as they are stored, their size in pixels.

    `image_sha256` is of the bytes as found: equal pictures stay equal, and downloads comparable, whatever is stored.
    """

    key: str
    image: bytes
    caption: str
    width: int
    height: int
    image_sha256: str
    shrunk: bool


def read_pair(
    key: str, members: dict[str, list[Member]], read: Callable[[Member], bytes], parameters: Parameters
) -> Pair:
    """Check everything about one key and return its pair. `read` gives a member's bytes.

    Raises Rejected with the reason.
    """
    extension, caption = check_texts(key, members, read)
    image = read_once(members[extension], extension, read)
    picture = read_picture(image, parameters)
    image_sha256, shrunk = sha256(image).hexdigest(), picture.data is not image
    return Pair(key, picture.data, caption, picture.width, picture.height, image_sha256, shrunk)


def check_texts(key: str, members: dict[str, list[Member]], read: Callable[[Member], bytes]) -> tuple[str, str]:
    """The picture's extension and the caption, after all checks but the picture's. Raises Rejected."""
    check_key(key)
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
    if extension is None:
        raise Rejected("missing image")
    if CAPTION_EXTENSION not in members:
        raise Rejected("missing caption")
    if JSON_EXTENSION in members:
        check_json(read_once(members[JSON_EXTENSION], JSON_EXTENSION, read))
    return extension, decode_caption(read_once(members[CAPTION_EXTENSION], CAPTION_EXTENSION, read))


def check_key(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise Rejected("key is not UTF-8") from error


def read_once(copies: list[Member], extension: str, read: Callable[[Member], bytes]) -> bytes:
    size_mib = max(copy.size for copy in copies) / (1 << 20)
    if size_mib > MAX_MEMBER_MIB:
        raise Rejected(f"oversized member: .{extension} has {size_mib:.0f} MiB, the limit is {MAX_MEMBER_MIB}")
    data = read(copies[0])
    # Which image belongs to which caption cannot be told, and the first in the tar is an accident of the download.
    if any(copy.size != len(data) or read(copy) != data for copy in copies[1:]):
        raise Rejected(f"duplicate key: {len(copies)} different .{extension} members, none is kept")
    return data


def check_json(data: bytes) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"bad JSON: {error}") from error
    if not isinstance(content, dict):
        raise Rejected(f"bad JSON: an object was expected, found {type(content).__name__}")


def decode_caption(data: bytes) -> str:
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"caption is not UTF-8: {error}") from error
    if not caption.strip():
        raise Rejected("empty caption")
    return caption


def read_picture(data: bytes, parameters: Parameters) -> Picture:
    """The picture to store: `data` itself when it decodes fully and is small enough, else a smaller one of its format.

    Raises Rejected.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning: --max-pixels is the limit that counts.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                return decode_picture(image, data, parameters)
    except (Rejected, MemoryError):
        raise
    except CannotShrink as error:
        raise Rejected(f"cannot be shrunk: {error}") from error
    except Image.DecompressionBombError as error:
        raise Rejected(f"too many pixels: {error}") from error
    # Decoders meet corrupt bytes with any exception: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise Rejected(f"undecodable image: {describe(error)}") from error


def decode_picture(image: Image.Image, data: bytes, parameters: Parameters) -> Picture:
    width, height = image.size
    if width * height > parameters.max_pixels:
        raise Rejected(f"too many pixels: {width} x {height}, --max-pixels is {parameters.max_pixels}")
    if parameters.max_side is not None and max(width, height) > parameters.max_side:
        return shrink(image, parameters.max_side, parameters.quality)
    image.load()
    return Picture(data, width, height)


def describe(error: Exception) -> str:
    # Pillow's message for an unknown format holds the address of the buffer, which changes from run to run.
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not {', '.join(IMAGE_FORMATS)}"
    return str(error) or type(error).__name__
