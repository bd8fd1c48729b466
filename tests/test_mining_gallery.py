"""The gallery on a tiny MDS folder: what the page shows, and what is refused."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter

from mining import EmbeddingStore, PairTable
from mining.gallery import MdsPictures, gallery_sections, write_gallery
from mining.gallery_page import image_type
from mining.ledger import read_ledger
from mining.manifest import write_manifest
from mining.plots import bar_chart, compact
from mining.problem import SearchLimits
from mining.pruning import Pruning
from mining.search import search_pairs
from mining.summary import read_summary
from tests.embeddings import random_rows, unit

CAPTIONS = ['a <b>cat</b> & "dog"', "grüße aus köln", *[f"caption {number}" for number in range(2, 12)]]
FORMATS = ("PNG", "JPEG", "WEBP")


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * number, 255 - 20 * number, 90)).save(buffer, FORMATS[number % 3])
    return buffer.getvalue()


def write_store(path: Path, *, store_fingerprint: str = "f" * 64, first_id: int = 0) -> Path:
    columns = {"caption": "str", "image": "bytes", "key": "str", "pair_id": "int"}
    # Small shards, so that ids cross them.
    with MDSWriter(out=str(path), columns=columns, size_limit=1200) as writer:
        for number, caption in enumerate(CAPTIONS):
            sample = {
                "image": image_bytes(number),
                "caption": caption,
                "key": f"k{number}",
                "pair_id": first_id + number,
            }
            writer.write(sample)
    write_manifest(path, "PairStore", 1, fingerprint=store_fingerprint, num_pairs=len(CAPTIONS))
    return path


@pytest.fixture
def world(tmp_path) -> Path:
    """A store of 12 pairs, its pair table: pairs 2 and 3 share a caption, 4 and 5 an image, pair 9 has no embedding."""
    write_store(tmp_path / "store")
    image = random_rows(12, 6, 0, offset=0.6)
    image[9] = np.nan
    store = EmbeddingStore.write(
        tmp_path / "e",
        image,
        random_rows(12, 5, 1, offset=0.6),
        caption_group_N=np.array([0, 1, 2, 2, *range(4, 12)]),
        image_group_N=np.array([0, 1, 2, 3, 4, 4, *range(6, 12)]),
        store_fingerprint="f" * 64,
    )
    search_pairs(store, tmp_path / "p", SearchLimits(k=4))
    return tmp_path


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[bytes] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.open_tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(base64.b64decode(attributes["src"].split("base64,")[1]))
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in ("img", "meta"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_holds_every_picture_inside_and_is_well_formed(world):
    write_gallery(world / "p", world / "store", world / "out" / "gallery.html", num_anchors=3, pairs_per_anchor=2)
    text = (world / "out" / "gallery.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open_tags == []
    assert set(page.images) <= {image_bytes(number) for number in range(12)}
    assert page.images
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "prefers-color-scheme: dark" in text


def test_captions_are_escaped(world):
    write_gallery(world / "p", world / "store", world / "gallery.html", num_anchors=12, pairs_per_anchor=4)
    text = (world / "gallery.html").read_text(encoding="utf-8")
    assert "<b>cat</b>" not in text
    page = Page(text)
    assert CAPTIONS[0] in page.texts
    assert CAPTIONS[1] in page.texts


def left_out(anchor) -> list[tuple[str, int, list[int]]]:
    return [(left.cause, left.count, [picture.pair_id for picture, _ in left.examples]) for left in anchor.left_out]


def test_sections_show_the_table_s_pairs_with_their_numbers(world):
    table = PairTable.open(world / "p")
    sections = gallery_sections(table, MdsPictures(world / "store"), 12, 3, seed=0)
    titles = ["Hardest", "At random", "Same image", "Same caption", "Hubs", "Noise"]
    assert [section.title for section in sections] == titles
    anchors = {anchor.picture.pair_id: anchor for section in sections for anchor in section.anchors}
    assert set(anchors) == set(range(12))
    for pair_id, anchor in anchors.items():
        listed = [pair for pair in table.pair_ids_NK[pair_id][:3].tolist() if pair >= 0]
        assert [pair.picture.pair_id for pair in anchor.hard_pairs] == listed
        for column, pair in enumerate(anchor.hard_pairs):
            assert pair.picture.caption == CAPTIONS[listed[column]]
            assert pair.score == pytest.approx(
                float(table.image_similarity_NK[pair_id, column]) * float(table.text_similarity_NK[pair_id, column])
            )
    assert left_out(anchors[2]) == [("same_caption", 1, [3])]
    assert left_out(anchors[5]) == [("same_image", 1, [4])]
    assert [anchor.picture.pair_id for anchor in sections[-1].anchors] == [9]
    degree_N = np.bincount(table.pair_ids_NK[table.pair_ids_NK >= 0], minlength=12)
    for anchor in sections[-2].anchors:
        assert anchor.remark == f"in {degree_N[anchor.picture.pair_id]} lists"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """As `world`, with towers in one space, all tests on, and near-duplicates of both kinds."""
    folder = tmp_path_factory.mktemp("pruned")
    write_store(folder / "store")
    image = random_rows(12, 4, 0, offset=0.8)
    text = unit(image + 0.4 * random_rows(12, 4, 1))
    store = EmbeddingStore.write(
        folder / "e", image, text, alignment_N=(image * text).sum(1), store_fingerprint="f" * 64
    )
    limits = SearchLimits(k=6, image_ceiling=0.97, text_ceiling=0.97)
    search_pairs(store, folder / "p", limits, pruning=Pruning(0.0, 3), noise_alignment_quantile=0.1)
    return folder


def test_every_cause_has_its_section_with_pictures_and_cosines(pruned):
    table, ledger = PairTable.open(pruned / "p"), read_ledger(pruned / "p").to_pylist()
    sections = {
        section.title: section.anchors
        for section in gallery_sections(table, MdsPictures(pruned / "store"), 12, 3, seed=0)
    }
    for title, cause in (
        ("Near-duplicate images", "near_image"),
        ("Near-duplicate texts", "near_text"),
        ("Likely false negatives", "false_negative"),
        ("Lists that lost a hub", "hub_capped"),
    ):
        rows = [row for row in ledger if row["cause"] == cause]
        assert rows, cause
        for anchor in sections[title]:
            (left,) = (left for left in anchor.left_out if left.cause == cause)
            of_anchor = {row["other"]: row for row in rows if row["anchor"] == anchor.picture.pair_id}
            assert left.count == sum(row["num_excluded"] for row in list(of_anchor.values())[:1])
            for picture, known in left.examples:
                row = of_anchor[picture.pair_id]
                assert known.startswith(f"image {row['image_similarity']:.2f}, text {row['text_similarity']:.2f}")
                assert picture.caption == CAPTIONS[picture.pair_id]
                assert ("that text" in known) == (cause == "false_negative")
    assert {anchor.picture.pair_id for anchor in sections["Noise"]} == set(np.flatnonzero(table.noise_N).tolist())
    assert "as ranked, 3 now" in " ".join(anchor.remark for anchor in sections["Hubs"])


def test_page_has_charts_of_the_summary_inside(pruned):
    write_gallery(pruned / "p", pruned / "store", pruned / "gallery.html", num_anchors=3, pairs_per_anchor=2)
    text = (pruned / "gallery.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open_tags == []
    assert text.count("<svg") == 4
    summary = read_summary(pruned / "p")
    drawn = [line for line in page.texts if re.fullmatch(r".+: [\d,]+", line)]
    assert [int(line.split(": ")[1]) for line in drawn if " to " in line] == summary["score"]["histogram"]
    for title in ("Scores of all hard pairs", "Coverage", "Lists a pair is in", "Left out"):
        assert title in page.texts
    assert f"false neg.: {summary['dropped']['false_negative']}" in drawn
    assert f"hubs: {summary['dropped']['hub_capped']}" in drawn
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_bars_are_as_high_as_their_counts():
    figure = bar_chart("title", "a < b", [("0", 0), ("1-5", 40), ("6", 10), ("7", 1)])
    heights = [float(number) for number in re.findall(r'height="([\d.]+)" rx', figure)]
    assert heights[0] == 0
    assert heights[1] == pytest.approx(4 * heights[2])
    assert heights[3] >= 1
    assert "a &lt; b" in figure
    assert bar_chart("title", "", [("0", 0)]) == ""
    assert [compact(number) for number in (7, 999, 1000, 1024, 12345, 10**6, 25 * 10**6, 3 * 10**9)] == [
        "7",
        "999",
        "1k",
        "1024",
        "12k",
        "1M",
        "25M",
        "3G",
    ]


def test_table_without_summary_and_ledger_is_shown_without_them(world):
    for name in ("summary.json", "excluded.parquet"):
        (world / "p" / name).unlink()
    sections = gallery_sections(PairTable.open(world / "p"), MdsPictures(world / "store"), 12, 3, seed=0)
    assert [section.title for section in sections] == ["Hardest", "At random", "Same image", "Same caption", "Noise"]
    write_gallery(world / "p", world / "store", world / "gallery.html")
    assert "<svg" not in (world / "gallery.html").read_text(encoding="utf-8")


def test_hardest_come_first_and_duplicates_once_a_group(world):
    table = PairTable.open(world / "p")
    sections = gallery_sections(table, MdsPictures(world / "store"), 12, 3, seed=0)
    best = [anchor.hard_pairs[0].score for anchor in sections[0].anchors]
    assert best == sorted(best, reverse=True)
    assert [[anchor.picture.pair_id for anchor in section.anchors] for section in sections[2:4]] == [[4], [2]]


def test_same_seed_gives_the_same_page(world):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_gallery(world / "p", world / "store", world / name, num_anchors=3, pairs_per_anchor=2, seed=seed)
    assert (world / "a").read_bytes() == (world / "b").read_bytes()
    assert (world / "a").read_bytes() != (world / "c").read_bytes()


def test_table_of_another_store_is_refused(world):
    write_store(world / "other", store_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"pair table of another store.*ffffffffffff.*000000000000"):
        write_gallery(world / "p", world / "other", world / "gallery.html")
    assert not (world / "gallery.html").exists()


def test_damaged_store_is_refused_with_the_shard(world):
    pictures = MdsPictures(world / "store")
    last = world / "store" / pictures.shard_infos[-1]["raw_data"]["basename"]
    last.write_bytes(last.read_bytes()[:10])
    with pytest.raises(ValueError, match=rf"{last.name} is missing or damaged at pair 11"):
        pictures[11]
    last.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        pictures[11]
    (world / "store" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is missing or damaged"):
        MdsPictures(world / "store")


def test_store_whose_ids_are_not_its_places_is_refused(tmp_path):
    pictures = MdsPictures(write_store(tmp_path / "store", first_id=1))
    with pytest.raises(ValueError, match="holds pair 1 where pair 0 belongs"):
        pictures[0]


def test_numbers_below_one_are_refused(world):
    with pytest.raises(ValueError, match="num_anchors=0"):
        write_gallery(world / "p", world / "store", world / "gallery.html", num_anchors=0)


def test_image_types_are_told_by_their_first_bytes():
    assert [image_type(image_bytes(number)) for number in range(3)] == ["png", "jpeg", "webp"]
    assert image_type(b"<svg/>") is None
