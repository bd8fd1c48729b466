"""`--reencode`: which pictures get smaller, what they look like afterwards, and what the store says about them."""

import hashlib
import io
import random

import numpy as np
import pytest
from PIL import Image

from tests.tar_shards import fails_with, image_bytes, ingest, rejected, sample, samples, store_bytes, write_tar
from train.data.pair_store import PairStore
from train.ingest.decode import Rejected, read_picture
from train.ingest.plan import Parameters
from train.ingest.reencode import encoder, shrunk_size

MAX_SIDE = 64
PARAMETERS = Parameters(10**8, 64, MAX_SIDE, 90, encoder())
AS_FOUND = Parameters(10**8, 64)


def smooth(size, mode="RGB"):
    """A picture of slow waves: what filters and codecs lose of it is small."""
    width, height = size
    x_W, y_H = np.arange(width) / width, np.arange(height) / height
    waves = [np.sin(3 * x_W[None] + channel) * np.cos(4 * y_H[:, None] - channel) for channel in range(3)]
    pixels = np.stack([np.uint8(127 + 100 * wave) for wave in waves], axis=-1)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, image_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 64), (64, 32)),
        ((64, 128), (32, 64)),
        ((65, 65), (64, 64)),
        ((200, 150), (64, 48)),
        ((1000, 1), (64, 1)),
        ((1001, 333), (64, 21)),
    ],
)
def test_longest_side_becomes_the_limit_and_the_aspect_ratio_stays(size, expected):
    assert shrunk_size(*size, MAX_SIDE) == expected
    picture = read_picture(encoded(smooth(size), "PNG"), PARAMETERS)
    assert (picture.width, picture.height) == opened(picture.data).size == expected


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(64, 64), (64, 3), (1, 64), (20, 20)])
def test_pictures_that_are_small_enough_keep_their_bytes(image_format, size):
    data = encoded(smooth(size), image_format)
    assert read_picture(data, PARAMETERS).data is data


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_keeps_its_format_and_what_it_shows(image_format):
    data = encoded(smooth((400, 300)), image_format, **({} if image_format == "PNG" else {"quality": 95}))
    picture = read_picture(data, PARAMETERS)
    small = opened(picture.data)
    assert (small.format, small.mode, small.size) == (image_format, "RGB", (64, 48))
    # The same waves sampled at 64 x 48 points: nothing of the filter or the codec is in the expected value.
    difference = np.asarray(small, float) - np.asarray(smooth((64, 48)), float)
    assert np.sqrt((difference**2).mean()) < 3


def test_quality_decides_the_size_of_the_file():
    data = image_bytes(3, "JPEG", (256, 256))
    sizes = [len(read_picture(data, Parameters(10**8, 64, MAX_SIDE, quality, ""))[0]) for quality in (20, 60, 95)]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("mode", "image_format", "expected"),
    [
        ("L", "JPEG", "L"),
        ("CMYK", "JPEG", "CMYK"),
        ("1", "PNG", "L"),
        ("P", "PNG", "RGB"),
        ("LA", "PNG", "LA"),
        ("RGBA", "PNG", "RGBA"),
        ("RGBA", "WEBP", "RGBA"),
        ("I;16", "PNG", "I;16"),
    ],
)
def test_every_mode_that_the_formats_have_can_be_shrunk(mode, image_format, expected):
    source = Image.fromarray(np.full((100, 200), 30_000, np.uint16)) if mode == "I;16" else smooth((200, 100), mode)
    if mode in ("LA", "RGBA"):
        source.putalpha(smooth((200, 100), "L"))
    small = opened(read_picture(encoded(source, image_format), PARAMETERS).data)
    small.load()
    assert (small.format, small.mode, small.size) == (image_format, expected, (64, 32))
    if mode == "I;16":
        assert set(np.asarray(small).ravel().tolist()) == {30_000}


def test_transparent_palette_keeps_its_transparency():
    source = smooth((200, 100)).quantize(8)
    source.info["transparency"] = 0
    small = opened(read_picture(encoded(source, "PNG", transparency=0), PARAMETERS).data)
    assert small.mode == "RGBA"
    assert small.getextrema()[3][0] == 0


def test_orientation_and_colour_profile_stay_and_other_metadata_goes():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    small = opened(read_picture(encoded(smooth((200, 100)), exif=exif, icc_profile=profile), PARAMETERS).data)
    assert dict(small.getexif()) == {0x0112: 6}
    assert small.info["icc_profile"] == profile
    # As stored, not as turned: the loader does not look at the orientation, with --reencode or without.
    assert small.size == (64, 32)


def test_broken_exif_is_no_reason_to_lose_a_picture():
    data = encoded(smooth((200, 100)), exif=b"Exif\0\0" + random.Random(0).randbytes(60))
    assert read_picture(data, PARAMETERS).width == 64


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_same_damaged_pictures_are_rejected_as_without_it(image_format):
    """Half-size decoding of a JPEG reads to its end all the same."""
    whole = image_bytes(5, image_format, (300, 200))
    generator = random.Random(0)
    outcomes = set()
    for _ in range(60):
        damaged = whole[: generator.randrange(len(whole))] if generator.random() < 0.3 else bytearray(whole)
        if isinstance(damaged, bytearray):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        reasons = [reason_or_none(bytes(damaged), parameters) for parameters in (AS_FOUND, PARAMETERS)]
        assert reasons[0] == reasons[1]
        outcomes.add(reasons[0])
    assert "undecodable image" in outcomes
    assert reason_or_none(whole, PARAMETERS) is None


def reason_or_none(data, parameters):
    try:
        read_picture(data, parameters)
    except Rejected as reason:
        return str(reason).split(":")[0]
    return None


def test_pixel_limit_comes_before_shrinking():
    with pytest.raises(Rejected, match="too many pixels: 200 x 100"):
        read_picture(encoded(smooth((200, 100))), Parameters(19_999, 64, MAX_SIDE, 90, ""))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two equal large pictures, two large ones that become equal, a small one, a bad one."""
    folder = tmp_path_factory.mktemp("tars")
    large, small = image_bytes(1, "JPEG", (120, 80)), image_bytes(2, "JPEG", (40, 30))
    grey = [encoded(Image.new("L", (width, width), 7), "PNG") for width in (100, 200)]
    members = [
        *sample("a", "one", large),
        *sample("b", "two", large),
        *sample("c", "three", small),
        *sample("d", "four", grey[0], "png"),
        *sample("e", "five", grey[1], "png"),
        *sample("f", "six", large[:500]),
    ]
    write_tar(folder / "0.tar", members)
    write_tar(folder / "1.tar", samples(["g"]))
    return folder, [large, large, small, *grey]


def test_store_holds_smaller_pictures_and_the_ledger_the_hash_of_the_found_ones(tars, tmp_path, capsys):
    folder, images = tars
    store = ingest(folder / "*.tar", tmp_path / "store", "--reencode", "--max-side", "50")
    ledger = store.ledger
    assert ledger["image_sha256"].to_pylist()[:5] == [hashlib.sha256(image).hexdigest() for image in images]
    assert ledger["width"].to_pylist()[:5] == [50, 50, 40, 50, 50]
    assert ledger["height"].to_pylist()[:5] == [33, 33, 30, 50, 50]
    assert [opened(store[pair].image).size for pair in range(5)] == [(50, 33), (50, 33), (40, 30), (50, 50), (50, 50)]
    assert store[2].image == images[2]
    # Equal files are one group. Different files are not, even where they are stored as the same bytes.
    assert store[3].image == store[4].image
    group_N = store.image_group_N
    assert group_N[0] == group_N[1]
    assert len(set(group_N[:5])) == 4
    assert [row[:2] for row in rejected(store.path)] == [("0.tar", "f")]
    assert store.manifest["parameters"] == {
        "max_pixels": 89_478_485,
        "shard_size_mib": 64,
        "max_side": 50,
        "quality": 90,
        "encoder": encoder(),
    }
    assert "kept 6 pairs (4 of them shrunk), rejected 1" in capsys.readouterr().out


def test_fingerprint_is_another_one_exactly_when_bytes_are(tars, tmp_path):
    folder, _ = tars
    stores = {
        name: ingest(folder / "*.tar", tmp_path / name, *flags).fingerprint
        for name, flags in {
            "found": [],
            "side50": ["--reencode", "--max-side", "50"],
            "side48": ["--reencode", "--max-side", "48"],
            "quality": ["--reencode", "--max-side", "50", "--quality", "60"],
            "roomy": ["--reencode", "--max-side", "500"],
        }.items()
    }
    assert stores["roomy"] == stores["found"]
    assert len(set(stores.values())) == 4


def test_rerun_with_other_settings_is_refused(tars, tmp_path, capsys, monkeypatch):
    folder, _ = tars
    command = ["--shards", str(folder / "*.tar"), "--out", str(tmp_path / "store")]
    ingest(folder / "*.tar", tmp_path / "store", "--reencode", "--max-side", "50")
    before = store_bytes(tmp_path / "store")
    assert "was started with --max-side 50, now it is 512" in fails_with(capsys, *command, "--reencode")
    flags = ["--reencode", "--max-side", "50", "--quality", "80"]
    assert "was started with --quality 90, now it is 80" in fails_with(capsys, *command, *flags)
    assert "was started with --reencode, now it is without" in fails_with(capsys, *command)
    monkeypatch.setattr("train.ingest.config.encoder", lambda: "Pillow 1.0")
    line = fails_with(capsys, *command, "--reencode", "--max-side", "50")
    assert f"was started with {encoder()}, here is Pillow 1.0: install the former, or give another --out" in line
    assert store_bytes(tmp_path / "store") == before
    PairStore.open(tmp_path / "store")


def test_same_flags_give_the_same_bytes_with_any_number_of_workers(tars, tmp_path):
    folder, _ = tars
    flags = ["--reencode", "--max-side", "33"]
    stores = [ingest(folder / "*.tar", tmp_path / w, *flags, "--workers", w).path for w in ("1", "2")]
    assert store_bytes(stores[0]) == store_bytes(stores[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-side", "256"], "--max-side is for shrunk pictures; add --reencode, or leave --max-side out"),
        (["--quality", "80"], "--quality is for shrunk pictures; add --reencode, or leave --quality out"),
        (["--reencode", "--max-side", "8"], "--max-side is 8, it has to be at least 32"),
        (["--reencode", "--quality", "100"], "--quality is 100, it has to be 1 to 95"),
    ],
)
def test_wrong_flags_are_refused(tars, tmp_path, capsys, flags, message):
    folder, _ = tars
    assert message in fails_with(capsys, "--shards", str(folder / "*.tar"), "--out", str(tmp_path / "s"), *flags)
    assert not (tmp_path / "s").exists()
