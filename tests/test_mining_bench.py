"""The benchmark of mining on tiny data: its figures, its file, its data set, and mistakes in one line."""

import json

import numpy as np
import pytest

from mining.bench import made_up_store, main
from mining.command_line import run


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_searches_are_timed_beside_the_bare_products(tmp_path, capsys):
    flags = ["--pairs", 600, "--queries", 100, "--dim", 16, "--k", 5, "--rounds", 1, "--out", tmp_path / "r.json"]
    code, _, _ = call(capsys, *flags, "--backends", "fused", "reference", "faiss")
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["pairs"] == 600
    assert report["machine"]["torch"]
    rows = {row["name"]: row for row in report["timings"]}
    assert list(rows) == ["fused", "reference", "faiss", "products bfloat16", "products float32"]
    assert rows["products float32"]["of_products_float32"] == 1.0
    for row in rows.values():
        assert row["pairs_per_s"] == pytest.approx(100 / row["median_ms"] * 1e3, rel=1e-2)
    assert "folder" not in report


def test_self_join_is_verified(tmp_path, capsys):
    flags = ["--self-join", "--pairs", 500, "--dim", 16, "--k", 5, "--out", tmp_path / "r.json"]
    code, _, err = call(capsys, *flags)
    assert code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["wrong_rows"] == 0
    assert report["verified_rows"] == 500
    assert report["certified_rows"] == 500
    assert report["peak_resident_mib"] > 50
    assert "pair/s" in err


def test_made_up_data_is_the_same_every_time_and_alike_in_clusters(tmp_path):
    first, again = (made_up_store(tmp_path / name, 2000, 32) for name in "ab")
    assert first.fingerprint == again.fingerprint
    image, text = (np.asarray(rows, np.float32) for rows in (first.image_ND, first.text_ND))
    cosines = [rows @ rows.T for rows in (image, text)]
    upper = np.triu_indices(2000, 1)
    # Pairs that agree most in image agree in text.
    image_cosine, text_cosine = (cosine[upper] for cosine in cosines)
    closest = np.argsort(-image_cosine)[:2000]
    assert text_cosine[closest].mean() > text_cosine.mean() + text_cosine.std()


def test_bad_numbers_are_one_line(capsys):
    code, _, err = call(capsys, "--pairs", 0)
    assert code == 2
    assert "must be at least 1" in err
    assert err.count("\n") == 1
