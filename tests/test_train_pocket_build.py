"""The finished folder: img2dataset's layout, splits, suites, and what a rerun or a kill does to it."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from mining.command_line import run
from tests.pocket_packages import ANIMALS, write_fake_packages
from train.pocket import build as build_module
from train.pocket.artists import Drawing
from train.pocket.build import PocketConfig, build, main
from train.pocket.concepts import Concept
from train.pocket.render import Picture, render_all, render_drawing
from train.pocket.shards import ShardPlan, plan_shards, shard_key, write_shard

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8" viewBox="0 0 8 8"><path d="M0 0h4v8h-4z"/></svg>'


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """(cache folder, packages) of the stand-in packages."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, write_fake_packages(cache)


@pytest.fixture(scope="module")
def built(fake, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "pocket"
    build(PocketConfig(out=out, cache=fake[0], processes=1), fake[1])
    return out


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    pairs: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, extension = member.name.split(".")
            pairs.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return pairs


def all_fields(folder: Path) -> list[dict]:
    return [json.loads(pair["json"]) for tar in sorted(folder.glob("*.tar")) for pair in read_tar(tar).values()]


def drawing(index: int, source: bytes | None) -> Drawing:
    label = f"thing {index}"
    return Drawing("artist", Concept(f"{index:04X}", label, label, (), "g", "s"), source, f"npm:x@1#{index}")


def test_keys_are_img2datasets() -> None:
    # img2dataset: 10 ** ceil(log10(number_sample_per_shard)) * shard + index, five digits for the shard.
    assert shard_key(2, 17, 3000) == "000020017"
    assert shard_key(12, 5, 256) == "00012005"


def test_shards_are_unequal_and_mixed_and_hold_every_drawing_once() -> None:
    drawings = [drawing(i, b"%d" % i) for i in range(1000)]
    plans = plan_shards(drawings, drawings_per_shard=150, seed=0)
    # 40 % and 60 % of the rows, each cut into shards of 150.
    assert [len(plan.drawings) for plan in plans] == [150, 150, 100, 150, 150, 150, 150]
    assert [plan.extension for plan in plans] == ["webp", "jpg", "webp", "webp", "jpg", "webp", "webp"]
    assert Counter(d for plan in plans for d in plan.drawings) == Counter(drawings)
    early = [sum(int(d.concept.hexcode, 16) < 500 for d in plan.drawings) for plan in plans[:2]]
    assert all(40 < count < 110 for count in early)


def test_shard_order_ignores_the_order_of_arrival_and_follows_the_seed() -> None:
    drawings = [drawing(i, b"%d" % i) for i in range(100)]
    first = plan_shards(drawings, drawings_per_shard=30, seed=0)
    assert first == plan_shards(drawings[::-1], drawings_per_shard=30, seed=0)
    assert first != plan_shards(drawings, drawings_per_shard=30, seed=1)


def test_byte_identical_drawings_stay_byte_identical_pictures(built: Path) -> None:
    pictures: dict[str, set[bytes]] = {}
    for tar in sorted((built / "train").glob("*.tar")):
        for pair in read_tar(tar).values():
            fields = json.loads(pair["json"])
            if fields["artist"] == "twemoji" and fields["name"] in ("rat", "ram"):
                pictures.setdefault(fields["name"], set()).add(pair.get("webp") or pair.get("jpg"))
    assert pictures["rat"] == pictures["ram"]


def test_a_shard_lists_failed_rows_in_the_parquet_and_not_in_the_tar(tmp_path: Path) -> None:
    drawings = [drawing(0, SVG), drawing(1, None), drawing(2, b"<svg not drawable"), drawing(3, SVG)]
    plan = ShardPlan(1, drawings, "jpg")
    pictures = render_all([(d.source, plan.extension) for d in drawings], side=16, processes=1)
    counts = write_shard(tmp_path, plan, pictures, side=16, drawings_per_shard=1000)
    assert counts == {
        ("artist", "success"): 2,
        ("artist", "failed_to_download"): 1,
        ("artist", "failed_to_resize"): 1,
    }
    assert list(read_tar(tmp_path / "00001.tar")) == ["00001000", "00001003"]
    table = pq.read_table(tmp_path / "00001.parquet").to_pylist()
    statuses = [row["status"] for row in table]
    assert statuses == ["success", "failed_to_download", "failed_to_resize", "success"]
    assert [row["width"] for row in table] == [16, None, None, 16]
    stats = json.loads((tmp_path / "00001_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (4, 2, 1, 1)
    assert sum(stats["status_dict"].values()) == 4


def test_webdataset_reads_the_shards_and_the_parquet_tells_the_same(built: Path) -> None:
    for tar in sorted((built / "train").glob("*.tar")):
        samples = list(webdataset.WebDataset([str(tar)], shardshuffle=False))
        rows = {row["key"]: row for row in pq.read_table(tar.with_suffix(".parquet")).to_pylist()}
        drawn = {key: row for key, row in rows.items() if row["status"] == "success"}
        assert [sample["__key__"] for sample in samples] == list(drawn)
        for sample in samples:
            fields = json.loads(sample["json"])
            assert fields == drawn[sample["__key__"]]
            assert sample["txt"].decode() == fields["caption"]
            picture = Image.open(io.BytesIO(sample.get("webp") or sample["jpg"]))
            assert picture.size == (fields["width"], fields["height"]) == (72, 72)


def test_both_picture_forms_occur(built: Path) -> None:
    forms = {
        extension for tar in (built / "train").glob("*.tar") for pair in read_tar(tar).values() for extension in pair
    }
    assert forms == {"webp", "jpg", "txt", "json"}


def test_fields_beyond_img2datasets_describe_the_concept(built: Path) -> None:
    fields = {(f["artist"], f["name"]): f for f in all_fields(built / "train")}
    tone = fields["emojione", "waving hand: light skin tone"]
    assert tone["base_name"] == "waving hand"
    assert (tone["group"], tone["subgroup"], tone["hexcode"]) == ("people & body", "hand fingers open", "1F44B-1F3FB")
    assert tone["caption"] == fields["twemoji", "waving hand: light skin tone"]["caption"]
    assert tone["url"] == "npm:@iconify-json/emojione@1.2.3#waving-hand-light-skin-tone"


def test_neither_noto_is_ever_trained_on_and_all_seven_artists_are(built: Path) -> None:
    artists = {
        split: {f["artist"] for f in all_fields(built / split)} for split in ("train", "valid_noto_v1", "test_noto")
    }
    seven = {"twemoji", "fluent-flat", "fluent-3d", "emojione", "openmoji", "emojione-v1", "fxemoji"}
    assert artists == {"train": seven, "valid_noto_v1": {"noto-v1"}, "test_noto": {"noto"}}


def test_fluent_3d_comes_without_flags(built: Path) -> None:
    flags = {f["artist"] for f in all_fields(built / "train") if f["group"] == "flags"}
    assert flags == {"twemoji", "fluent-flat", "emojione", "openmoji", "emojione-v1"}


def test_suites_name_shards_that_exist_and_hold_every_known_class(built: Path) -> None:
    for file, name, split in (("noto", "pocket-noto", "test_noto"), ("noto_v1", "pocket-noto-v1", "valid_noto_v1")):
        suite = json.loads((built / f"suite_{file}.json").read_text())
        assert (suite["name"], suite["format"]) == (name, "webdataset")
        assert suite["data"] == f"{split}/{{00000..00001}}.tar"
        assert len(list((built / split).glob("*.tar"))) == 2
        tasks = {(task["kind"], task["name"]): task for task in suite["tasks"]}
        expected = ["face smiling", "waving hand: light skin tone"]
        assert expected[1] in tasks["zeroshot", "name"]["classes"]
        assert len(tasks["zeroshot", "name"]["classes"]) == 5 + len(ANIMALS)
        assert expected[0] in tasks["zeroshot", "subgroup"]["classes"]
        assert tasks["zeroshot", "name_within_subgroup"]["within"] == "subgroup"
        assert tasks["zeroshot", "skin_tone"]["within"] == "base_name"
        assert tasks["retrieval", "retrieval"]["caption_key"] == "name"
        assert tasks["linear_probe", "subgroup"]["train_data"] == "train/{00000..00001}.tar"


def test_a_second_run_touches_nothing(built: Path, fake, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build(PocketConfig(out=built, cache=built / "no cache is needed", processes=1), fake[1])
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert "is complete: train" in capsys.readouterr().out


def test_a_shortened_shard_or_other_parameters_lead_to_a_rebuild(fake, tmp_path: Path) -> None:
    config = PocketConfig(out=tmp_path / "pocket", cache=fake[0], processes=1, image_side=16)
    build(config, fake[1])
    whole = (config.out / "train/00000.tar").read_bytes()
    (config.out / "train/00000.tar").write_bytes(whole[:1000])
    build(config, fake[1])
    assert (config.out / "train/00000.tar").read_bytes() == whole
    build(PocketConfig(out=config.out, cache=fake[0], processes=1, image_side=16, skin_tones=False), fake[1])
    fields = all_fields(config.out / "train")
    assert {f["base_name"] for f in fields} == {f["name"] for f in fields}
    suite = json.loads((config.out / "suite_noto.json").read_text())
    assert "skin_tone" not in [task["name"] for task in suite["tasks"]]


def test_a_killed_run_leaves_no_output_and_the_next_run_starts_clean(fake, tmp_path: Path, monkeypatch) -> None:
    config = PocketConfig(out=tmp_path / "pocket", cache=fake[0], processes=1, image_side=16)

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_suites", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config, fake[1])
    assert not config.out.exists()
    build(config, fake[1])
    assert (config.out / "suite_noto.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["pocket"]


def test_a_folder_of_something_else_is_never_replaced(fake, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no pocket data; name another folder with --out"):
        build(PocketConfig(out=tmp_path, cache=fake[0]), fake[1])
    assert (tmp_path / "thesis.tex").is_file()


def test_the_short_form_has_three_artists_and_no_skin_tones(fake, tmp_path: Path) -> None:
    build(PocketConfig(out=tmp_path / "pocket", cache=fake[0], processes=1, short=True), fake[1])
    fields = all_fields(tmp_path / "pocket/train")
    assert {f["artist"] for f in fields} == {"twemoji", "fluent-flat", "openmoji"}
    assert not any("skin tone" in f["name"] for f in fields)
    notice = (tmp_path / "pocket/NOTICE").read_text()
    assert "twemoji" in notice
    assert "emojione" not in notice


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-side", "4"], "image_side=4 must be between 16 and 512"),
        (["--processes", "-1"], "processes=-1 must be 0"),
        (["--skin-tone"], "--skin-tones"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(flags, message, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(main, ["--out", str(tmp_path / "pocket"), *flags])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_drawings_keep_their_proportions_on_white() -> None:
    wide = SVG.replace(b'width="8" height="8" viewBox="0 0 8 8"', b'width="8" height="4" viewBox="0 0 8 4"')
    picture = render_drawing((wide, "webp"), side=32)
    assert (picture.original_width, picture.original_height) == (8, 4)
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded)).convert("L"))
    assert pixels.shape == (32, 32)
    assert pixels[:6].min() > 240
    assert pixels[26:].min() > 240
    assert pixels[10:22, 2:13].max() < 15
    assert pixels[10:22, 19:].min() > 240


def test_transparency_becomes_white() -> None:
    buffer = io.BytesIO()
    # Invisible pixels with a colour: only compositing, not dropping the alpha channel, makes them white.
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(buffer, "WEBP", lossless=True, exact=True)
    picture = render_drawing((buffer.getvalue(), "webp"), side=16)
    assert np.asarray(Image.open(io.BytesIO(picture.encoded))).min() > 250


def test_a_picture_that_cannot_be_drawn_says_why_instead_of_raising() -> None:
    assert render_drawing((b"garbage", "jpg"), side=16).error.startswith("not drawable")
    assert render_drawing((None, "jpg"), side=16) == Picture(error="no drawing")


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(built: Path, fake, tmp_path: Path) -> None:
    build(PocketConfig(out=tmp_path / "pocket", cache=fake[0], processes=3), fake[1])
    # The stats hold durations, and the manifest the length of their digits.
    names = [p.relative_to(built) for p in sorted(built.rglob("*")) if p.is_file()]
    names = [name for name in names if not name.name.endswith(("_stats.json", "manifest.json"))]
    assert len(names) == 3 + 2 * 6
    for name in names:
        assert (tmp_path / "pocket" / name).read_bytes() == (built / name).read_bytes(), name
