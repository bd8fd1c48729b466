"""The benchmark of views: the same work on both sides, and a report."""

import json

import pytest
import torch
from PIL import Image

from train.config import AugmentConfig
from train.data import bench_views
from train.data.augment import augment_picture


def test_both_sides_make_the_same_picture_where_nothing_is_drawn():
    config = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), horizontal_flip_prob=1.0, gray_scale_prob=1.0)
    picture = Image.effect_mandelbrot((300, 300), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    theirs = bench_views.torchvision_list(config, pillow_blur=True)(picture)
    assert torch.equal(augment_picture(picture, config, (224, 224), 0), theirs)


def test_a_report_holds_every_way_and_every_round(tmp_path, capsys):
    out = tmp_path / "views.json"
    bench_views.main(["--num-pairs", "1", "--rounds", "2", "--side", "64", "--views", "slip", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["views"] == {"strong_images": 2, "strong_texts": 0}
    assert set(report["pairs_per_s"]) == {"ours", "torchvision", "torchvision_pillow_blur"}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in report["pairs_per_s"].values())
    assert "pairs/s" in capsys.readouterr().out


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="--rounds are at least 1"):
        bench_views.main(["--rounds", "0"])
