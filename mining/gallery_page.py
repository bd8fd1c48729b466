"""The gallery's HTML: one self-contained file, images inlined as found, readable in light and dark and on a phone."""

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mining.plots import STYLE as CHART_STYLE
from mining.pruning import DROPS

if TYPE_CHECKING:
    from mining.gallery import Anchor, HardPair, Picture, Section

IMAGE_TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"BM", "bmp"))
CAUSE_LABELS = {
    "same_image": "same image",
    "same_caption": "same caption",
    "near_image": "near-duplicate image",
    "near_text": "near-duplicate text",
    "false_negative": "likely false negative",
    "hub_capped": "hub over its cap",
}

STYLE = """
.gallery { --ink: #1c2330; --muted: #626c7d; --page: #f5f6f8; --card: #ffffff; --line: #dfe3ea; --image: #2f6fdb;
  --text: #d9822b; --bad: #b3403a; --plate: #ffffff; color: var(--ink); background: var(--page); }
@media (prefers-color-scheme: dark) {
  .gallery { --ink: #e6e9ef; --muted: #98a2b3; --page: #14171c; --card: #1d2128; --line: #323843; --image: #7aa9f7;
    --text: #efa65a; --bad: #ef8d87; --plate: #f1f2f4; }
}
.gallery, .gallery * { box-sizing: border-box; }
.gallery { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0; }
.gallery main { max-width: 1280px; margin: 0 auto; padding: 32px 20px 64px; }
.gallery h1 { font-size: 26px; margin: 0 0 6px; letter-spacing: -.01em; }
.gallery h2 { font-size: 19px; margin: 44px 0 2px; }
.gallery p { margin: 0 0 14px; color: var(--muted); max-width: 78ch; }
.gallery .facts { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 18px 0 0; padding: 0; }
.gallery .facts div { display: flex; flex-direction: column; min-width: 0; }
.gallery .facts dt { color: var(--muted); font-size: 12px; order: 2; }
.gallery .facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.gallery .legend { display: flex; gap: 18px; margin: 18px 0 0; font-size: 13px; color: var(--muted); flex-wrap: wrap; }
.gallery .legend i { display: inline-block; width: 22px; height: 5px; border-radius: 3px; margin-right: 6px;
  vertical-align: middle; }
.gallery .anchor { display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 0 20px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 0 0 14px; }
.gallery .pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(108px, 1fr)); gap: 14px 12px; }
.gallery figure { margin: 0; min-width: 0; }
.gallery .plate { background: var(--plate); border: 1px solid var(--line); border-radius: 6px; overflow: hidden;
  aspect-ratio: 1; display: flex; align-items: center; justify-content: center; }
.gallery img { width: 100%; height: 100%; object-fit: contain; display: block; }
.gallery .none { color: #626c7d; font-size: 12px; padding: 8px; text-align: center; }
.gallery figcaption { font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.gallery .self figcaption { font-size: 14px; font-weight: 600; -webkit-line-clamp: 8; }
.gallery .id { font-size: 11px; color: var(--muted); margin-top: 2px; overflow-wrap: anywhere; }
.gallery .bar { display: grid; grid-template-columns: 1fr 34px; align-items: center; gap: 6px; font-size: 11px;
  color: var(--muted); font-variant-numeric: tabular-nums; line-height: 1.3; }
.gallery .bar span { background: var(--line); height: 5px; border-radius: 3px; overflow: hidden; }
.gallery .bar i { display: block; height: 100%; }
.gallery .bar b { text-align: right; font-weight: 500; }
.gallery .score { font-weight: 600; font-size: 13px; font-variant-numeric: tabular-nums; margin: 6px 0 2px; }
.gallery .out { grid-column: 1 / -1; border-top: 1px solid var(--line); margin-top: 14px; padding-top: 12px; }
.gallery .out h3 { font-size: 12px; font-weight: 600; color: var(--bad); margin: 0 0 8px; }
.gallery .out .pairs { grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
.gallery .out figure { display: grid; grid-template-columns: 64px 1fr; gap: 0 10px; align-items: start; }
.gallery .out .words { min-width: 0; }
.gallery .out figcaption { margin-top: 0; }
.gallery .remark { font-size: 12px; color: var(--bad); margin-top: 4px; font-weight: 600; }
.gallery .empty { color: var(--muted); font-size: 14px; }
@media (max-width: 640px) {
  .gallery main { padding: 20px 12px 40px; }
  .gallery .anchor { grid-template-columns: 1fr; gap: 16px; padding: 12px; }
  .gallery .self { display: grid; grid-template-columns: 110px 1fr; gap: 0 12px; }
  .gallery .self figcaption { margin-top: 0; }
  .gallery .pairs { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
}
"""


def gallery_html(sections: Sequence["Section"], facts: Sequence[tuple[str, str]], *, charts: str = "") -> str:
    """The whole page; `charts`: HTML of mining.plots."""
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Hard pairs</title>
<style>body {{ margin: 0; }}{STYLE}{CHART_STYLE}</style>
</head>
<body class="gallery">
<main>
<h1>Hard pairs</h1>
<p>Each card is an anchor with the pairs that are closest to it in image and in text, hardest first. The score is the
product of both cosines. Below the line is what the anchor lacks: duplicates, left out before the ranking, and what was taken out of
the ranked list afterwards.</p>
<dl class="facts">{rows}</dl>
{charts}
<div class="legend"><span><i style="background:var(--image)"></i>image cosine</span>
<span><i style="background:var(--text)"></i>text cosine</span></div>
{sections_html(sections)}
</main>
</body>
</html>
"""


def sections_html(sections: Sequence["Section"]) -> str:
    """The sections alone, for a page of another program: put STYLE in its head and class "gallery" around it."""
    return "\n".join(
        f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.note)}</p>"
        + "\n".join(anchor_html(anchor) for anchor in section.anchors)
        + "</section>"
        for section in sections
    )


def anchor_html(anchor: "Anchor") -> str:
    pairs = "".join(hard_pair_html(pair) for pair in anchor.hard_pairs)
    taken = any(left.cause in DROPS for left in anchor.left_out)
    why = "No hard pair is left." if taken else "No hard pair: nothing agrees."
    listed = f'<div class="pairs">{pairs}</div>' if pairs else f'<div class="empty">{why}</div>'
    remark = f'<div class="remark">{html.escape(anchor.remark)}</div>' if anchor.remark else ""
    own = f'<figure class="self">{plate_html(anchor.picture)}<div>{words_html(anchor.picture)}{remark}</div></figure>'
    return f'<article class="anchor">{own}{listed}{left_out_html(anchor)}</article>'


def hard_pair_html(pair: "HardPair") -> str:
    bars = bar_html("image", pair.image_similarity) + bar_html("text", pair.text_similarity)
    return (
        f'<figure>{plate_html(pair.picture)}<div class="score">{pair.score:.3f}</div>{bars}'
        f"{words_html(pair.picture)}</figure>"
    )


def bar_html(kind: str, similarity: float) -> str:
    width = 100.0 * min(max(similarity, 0.0), 1.0)
    return (
        f'<div class="bar" title="{kind} cosine"><span><i style="width:{width:.1f}%;background:var(--{kind})"></i></span>'
        f"<b>{similarity:.2f}</b></div>"
    )


def left_out_html(anchor: "Anchor") -> str:
    return "".join(
        f'<div class="out"><h3>Left out, {CAUSE_LABELS[left.cause]}: {left.count:,}</h3><div class="pairs">'
        + "".join(
            f'<figure>{plate_html(picture)}<div class="words">{words_html(picture)}'
            + (f'<div class="id">{html.escape(known)}</div>' if known else "")
            + "</div></figure>"
            for picture, known in left.examples
        )
        + "</div></div>"
        for left in anchor.left_out
    )


def plate_html(picture: "Picture") -> str:
    kind = image_type(picture.image)
    if kind is None:
        return '<div class="plate"><div class="none">image of unknown format</div></div>'
    data = base64.b64encode(picture.image).decode()
    return (
        f'<div class="plate"><img loading="lazy" alt="{html.escape(picture.caption, quote=True)}" '
        f'src="data:image/{kind};base64,{data}"></div>'
    )


def words_html(picture: "Picture") -> str:
    return (
        f'<figcaption title="{html.escape(picture.caption, quote=True)}">{html.escape(picture.caption)}</figcaption>'
        f'<div class="id">pair {picture.pair_id}, key {html.escape(picture.key)}</div>'
    )


def image_type(image: bytes) -> str | None:
    """Subtype of the image's media type, from its first bytes; None when a browser would not know it."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((kind for start, kind in IMAGE_TYPES if image.startswith(start)), None)
