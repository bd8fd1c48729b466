"""What is kept and what is rejected: single samples and tars, without the worker processes."""

import io
import json
import random
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mining.manifest import commit_folder
from tests.tar_shards import image_bytes, rejected, sample, samples, write_tar
from train.ingest.decode import Rejected, read_pair, read_picture
from train.ingest.plan import Parameters
from train.ingest.sources import expand_shards
from train.ingest.tar_index import Member, index_tar, read_member
from train.ingest.worker import ingest_shard, read_fragment

MAX_PIXELS = 10_000
PARAMETERS = Parameters(max_pixels=MAX_PIXELS, shard_size_mib=1)


def pair_of(members):
    """read_pair over (extension, bytes) members, as if they lay in a tar one after the other."""
    places, data = {}, b""
    for extension, content in members:
        places.setdefault(extension, []).append(Member(len(data), len(content)))
        data += content
    return read_pair("k", places, lambda place: data[place.offset : place.offset + place.size], PARAMETERS)


def reason_of(*members):
    with pytest.raises(Rejected) as caught:
        pair_of(members)
    return str(caught.value)


def fragment(tar, tmp_path, **parameters):
    """Ingest one tar; returns its kept keys, its rejected rows, its manifest."""
    folder = tmp_path / "fragment"
    written = ingest_shard(
        expand_shards([str(tar)])[0],
        folder,
        replace(PARAMETERS, **parameters),
        "the plan's digest",
        lambda done, total: None,
    )
    commit_folder(written.temporary, written.folder)
    manifest = read_fragment(folder)
    kept = pq.read_table(folder / "rows.parquet")["key"].to_pylist() if manifest["num_pairs"] else []
    return kept, rejected(folder) if manifest["num_rejected"] else [], manifest


def png_header(width, height):
    """A PNG whose header promises a size, with no pixels behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("image_format", "extension"), [("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")]
)
def test_image_formats_are_kept_byte_for_byte(image_format, extension):
    image = image_bytes(1, image_format, (31, 17))
    pair = pair_of([(extension, image), ("txt", b" as found\n")])
    assert (pair.image, pair.caption, pair.width, pair.height) == (image, " as found\n", 31, 17)


def test_format_is_read_from_the_bytes_not_from_the_name():
    assert pair_of([("jpg", image_bytes(1, "WEBP")), ("txt", b"c")]).width == 24


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_image_is_rejected(image_format, share):
    image = image_bytes(1, image_format)
    assert reason_of(("jpg", image[: int(len(image) * share)]), ("txt", b"c")).startswith("undecodable image: ")


@pytest.mark.parametrize("image", [b"", b"<html>404</html>", random.Random(0).randbytes(500)])
def test_bytes_that_are_no_image_are_rejected_with_a_reason_that_repeats(image):
    reasons = {reason_of(("jpg", image), ("txt", b"c")) for _ in range(2)}
    assert reasons == {"undecodable image: not JPEG, PNG, WEBP"}


def test_other_image_formats_are_rejected():
    assert reason_of(("png", image_bytes(1, "GIF")), ("txt", b"c")) == "undecodable image: not JPEG, PNG, WEBP"


def category_of(image):
    """ "kept", or the category of the reason."""
    try:
        read_picture(image, PARAMETERS)
    except Rejected as reason:
        return str(reason).split(":")[0]
    return "kept"


def test_corrupt_bytes_are_never_fatal():
    """Thousands of damaged files: each is decoded or rejected, and nothing else happens."""
    generator = random.Random(0)
    categories = set()
    for image_format in ("JPEG", "PNG", "WEBP"):
        whole = image_bytes(5, image_format)
        for _ in range(700):
            damaged = bytearray(whole)
            for _ in range(generator.choice([1, 4, 32])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            categories.add(category_of(bytes(damaged)))
    assert categories == {"kept", "undecodable image", "too many pixels"}


def test_decompression_bomb_is_rejected_by_its_header_before_decoding():
    assert reason_of(("png", png_header(60_000, 60_000)), ("txt", b"c")).startswith("too many pixels: ")
    assert (
        reason_of(("png", png_header(101, 100)), ("txt", b"c")) == "too many pixels: 101 x 100, --max-pixels is 10000"
    )
    # A real bomb: 16 million pixels in 16 kB of file; decoding it would take 48 MB.
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "PNG")
    tracemalloc.start()
    try:
        assert reason_of(("png", buffer.getvalue()), ("txt", b"c")).startswith("too many pixels: 4000 x 4000")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_limit_of_pixels_is_inclusive():
    assert pair_of([("jpg", image_bytes(1, "JPEG", (100, 100))), ("txt", b"c")]).width == 100


@pytest.mark.parametrize("caption", [b"", b"  \n\t", "\u00a0\u2003\n".encode()])
def test_empty_caption_is_rejected(caption):
    assert reason_of(("jpg", image_bytes(1)), ("txt", caption)) == "empty caption"


def test_caption_that_is_not_utf8_is_rejected():
    assert reason_of(("jpg", image_bytes(1)), ("txt", "caf\u00e9".encode("latin-1"))).startswith(
        "caption is not UTF-8: "
    )


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b'{"a": "\xff"}', b"[" * 100_000])
def test_bad_json_is_rejected(text):
    assert reason_of(("jpg", image_bytes(1)), ("txt", b"c"), ("json", text)).startswith("bad JSON: ")


def test_json_is_optional_and_other_members_are_ignored():
    assert pair_of([("cls", b"3"), ("jpg", image_bytes(1)), ("txt", b"c"), ("seg.png", b"not an image")]).caption == "c"


def test_missing_members_are_rejected():
    assert reason_of(("txt", b"c"), ("json", b"{}")) == "missing image"
    assert reason_of(("jpg", image_bytes(1)), ("json", b"{}")) == "missing caption"


def test_image_is_chosen_by_extension_not_by_place():
    jpg, png = image_bytes(1), image_bytes(2, "PNG")
    for members in ([("png", png), ("jpg", jpg)], [("jpg", jpg), ("png", png)]):
        assert pair_of([*members, ("txt", b"c")]).image == jpg


def test_key_with_different_copies_is_rejected_whatever_their_order(tmp_path):
    one, other = sample("a", "first"), sample("a", "second")
    for members in (one + other + sample("b"), other + sample("b") + one):
        kept, rows, _ = fragment(write_tar(tmp_path / "0.tar", members), tmp_path)
        assert kept == ["b"]
        assert rows == [("0.tar", "a", "duplicate key: 2 different .txt members, none is kept")]


def test_key_with_equal_copies_is_kept_once_and_counted(tmp_path):
    kept, rows, manifest = fragment(write_tar(tmp_path / "0.tar", sample("a") + sample("b") + sample("a")), tmp_path)
    assert kept == ["a", "b"]
    assert rows == [("0.tar", "a", "duplicate key: 2 equal copies, one is kept")]
    assert manifest["num_rejected"] == {"duplicate key": 1}


def test_members_of_a_sample_may_lie_anywhere_in_the_tar(tmp_path):
    members = samples(["b", "a", "sub/c"])
    contents = []
    for seed in range(3):
        random.Random(seed).shuffle(members)
        kept, rows, manifest = fragment(write_tar(tmp_path / "0.tar", members), tmp_path)
        assert (kept, rows) == (["a", "b", "sub/c"], [])
        contents.append(manifest["content"])
    assert len(set(contents)) == 1


def test_upper_case_extensions_and_webdataset_metadata_are_understood(tmp_path):
    image, caption, _ = sample("a")
    members = [("__meta__", b"x"), ("README", b"x"), ("._a.jpg", b"x"), ("a.JPG", image[1]), ("a.TXT", caption[1])]
    assert fragment(write_tar(tmp_path / "0.tar", members), tmp_path)[:2] == (["a"], [])


def test_key_that_is_not_utf8_is_rejected_and_named(tmp_path):
    members = sample("b") + [(name.replace("a.", "\udcff."), data) for name, data in sample("a")]
    kept, rows, _ = fragment(write_tar(tmp_path / "0.tar", members), tmp_path)
    assert (kept, rows) == (["b"], [("0.tar", "\\udcff", "key is not UTF-8")])


def test_every_cut_of_a_tar_keeps_what_lies_before_it(tmp_path):
    """The tar is cut at every header, in every header, in every member; the last cut leaves only the end mark off."""
    keys = ["a", "b", "c"]
    whole = write_tar(tmp_path / "whole.tar", samples(keys)).read_bytes()
    with open(tmp_path / "whole.tar", "rb") as file:
        members = index_tar(file).members
    # A sample counts from the end of its caption on: the json behind it is optional.
    ends = {key: members[key]["txt"][0].offset + members[key]["txt"][0].size for key in keys}
    places = sorted(place for key in keys for copies in members[key].values() for place in copies)
    cuts = [cut for place in places for cut in (place.offset - 512, place.offset - 200, place.offset + place.size // 2)]
    cuts.append(-(-(places[-1].offset + places[-1].size) // 512) * 512)
    for cut in cuts:
        torn = tmp_path / "torn.tar"
        torn.write_bytes(whole[:cut])
        kept, rows, _ = fragment(torn, tmp_path)
        assert kept == [key for key in keys if ends[key] <= cut], cut
        assert [row for row in rows if row[2].startswith("torn tar: ")] == [row for row in rows if row[1] == ""]
        assert len([row for row in rows if row[1] == ""]) == 1, cut


def test_broken_header_in_the_middle_is_a_tear_not_the_end(tmp_path):
    tar = write_tar(tmp_path / "0.tar", samples(["a", "b"]))
    data = bytearray(tar.read_bytes())
    with open(tar, "rb") as file:
        header = index_tar(file).members["b"]["jpg"][0].offset - 512
    data[header : header + 100] = b"\xff" * 100
    tar.write_bytes(data)
    kept, rows, _ = fragment(tar, tmp_path)
    assert kept == ["a"]
    assert rows == [("0.tar", "", f"torn tar: broken header at byte {header}; nothing after that was read")]


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", bytes(range(256)) * 40])
def test_file_that_is_no_tar_gives_one_rejected_row(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    kept, rows, _ = fragment(tmp_path / "0.tar", tmp_path)
    assert kept == []
    assert [(shard, key) for shard, key, _ in rows] == [("0.tar", "")]
    assert rows[0][2].startswith("torn tar: ")


def test_long_names_and_non_ascii_keys_are_kept(tmp_path):
    keys = ["n" * 180, "sch\u00f6n/" + "d" * 120]
    assert fragment(write_tar(tmp_path / "0.tar", samples(keys)), tmp_path)[0] == keys


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_compressed_tar_is_read_and_its_tear_is_found(tmp_path, ending):
    tar = write_tar(tmp_path / f"0.tar.{ending}", samples([f"{number:03d}" for number in range(40)]), f"w:{ending}")
    assert len(fragment(tar, tmp_path)[0]) == 40
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    kept, rows, _ = fragment(tar, tmp_path)
    assert len(kept) < 40
    assert rows[0][2].startswith("torn tar: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0.tar.{ending}", "fragment"]


def test_image_larger_than_a_shard_file_leaves_no_empty_file(tmp_path):
    big = image_bytes(1, "PNG", (900, 700))
    assert len(big) > 1 << 20
    tar = write_tar(tmp_path / "0.tar", sample("a", image=big) + sample("b") + sample("c", image=big))
    kept, _, manifest = fragment(tar, tmp_path, max_pixels=10**6)
    assert kept == ["a", "b", "c"]
    assert all(shard["samples"] for shard in manifest["mds"])
    files = sorted(path.name for path in (tmp_path / "fragment").glob("*.mds"))
    assert files == [shard["raw_data"]["basename"] for shard in manifest["mds"]]


def test_memory_is_bounded_by_the_shard_file_not_by_the_tar(tmp_path):
    image = image_bytes(1, "PNG", (512, 512))
    members = [member for number in range(60) for member in sample(f"{number:02d}", image=image)]
    random.Random(0).shuffle(members)
    tar = write_tar(tmp_path / "0.tar", members)
    assert tar.stat().st_size > 45 << 20
    fragment(write_tar(tmp_path / "warm.tar", samples(["a"])), tmp_path)
    tracemalloc.start()
    try:
        kept, _, _ = fragment(tar, tmp_path, max_pixels=10**6, shard_size_mib=2)
        peak_mib = tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()
    assert len(kept) == 60
    # The samples of one MDS file, the file itself while it is written, and a few copies of one sample.
    assert peak_mib < 4 * 2 + 6


def test_index_reads_the_bytes_of_every_member(tmp_path):
    members = samples(["b", "a"])
    with open(write_tar(tmp_path / "0.tar", members), "rb") as file:
        index = index_tar(file)
        for name, data in members:
            key, extension = name.split(".")
            assert read_member(file, index.members[key][extension][0]) == data
    assert index.torn is None
    assert json.loads(members[2][1]) == {"key": "b"}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (sample("a"), {"shard.00000.mds", "rows.parquet"}),
        (sample("a") + sample("b", ""), {"shard.00000.mds", "rows.parquet", "rejected.parquet"}),
        (sample("b", ""), {"rejected.parquet"}),
        ([], set()),
    ],
)
def test_fragment_holds_no_file_without_rows_or_samples(tmp_path, members, expected):
    fragment(write_tar(tmp_path / "0.tar", members), tmp_path)
    assert {path.name for path in (tmp_path / "fragment").iterdir()} == {"manifest.json", *expected}
