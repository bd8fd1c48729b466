"""Turns a drawing (SVG document or WebP file) into a small square picture on white, in as many processes as asked."""

import io
import multiprocessing
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import resvg_py
from PIL import Image, ImageOps

BACKGROUND = "#ffffff"
# Near one kilobyte at 72 px with flat areas and outlines clean; slower methods than 2 save 3 % of that.
ENCODER_OPTIONS = {
    "webp": {"format": "WEBP", "quality": 85, "method": 2},
    "jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
}
SVG_SIZE = re.compile(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)"')
DRAWINGS_PER_TASK = 32


@dataclass(frozen=True)
class Picture:
    """An encoded picture with the size of its drawing, or `error` when the drawing could not be rendered."""

    encoded: bytes = b""
    original_width: int = 0
    original_height: int = 0
    error: str | None = None


def render_all(sources: Iterable[tuple[bytes | None, str]], *, side: int, processes: int) -> Iterator[Picture]:
    """Yield a Picture for each (drawing or None, `webp` or `jpg`), in order; `processes` changes no byte."""
    render = partial(render_drawing, side=side)
    if processes == 1:
        yield from map(render, sources)
        return
    # Spawned, since a forked child would share the progress bar's thread and locks.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(render, sources, chunksize=DRAWINGS_PER_TASK)


def render_drawing(source: tuple[bytes | None, str], *, side: int) -> Picture:
    """Draw into a `side` x `side` square on white, keeping proportions, and encode it."""
    drawing, extension = source
    if drawing is None:
        return Picture(error="no drawing")
    try:
        image, original_size = rasterise(drawing, side)
    except (ValueError, OSError) as error:
        return Picture(error=f"not drawable: {error}")
    buffer = io.BytesIO()
    image.save(buffer, **ENCODER_OPTIONS[extension])
    return Picture(buffer.getvalue(), *original_size)


def rasterise(drawing: bytes, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """RGB picture of `side` x `side` pixels, and the drawing's own (width, height)."""
    if drawing.startswith(b"<svg"):
        text = drawing.decode()
        size = SVG_SIZE.match(text)
        if size is None:
            raise ValueError("the SVG document does not begin with its width and height")
        width, height = float(size[1]), float(size[2])
        scale = side / max(width, height)
        png = resvg_py.svg_to_bytes(svg_string=text, background=BACKGROUND, skip_system_fonts=True, zoom=scale)
        return fit(Image.open(io.BytesIO(png)).convert("RGB"), side), (round(width), round(height))
    with Image.open(io.BytesIO(drawing)) as opened:
        layered = opened.convert("RGBA")
    white = Image.new("RGBA", layered.size, BACKGROUND)
    return fit(Image.alpha_composite(white, layered).convert("RGB"), side), layered.size


def fit(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=BACKGROUND)
