"""The whole pipeline on a tiny world, through the commands that a user types: every stage reads what the stage before it wrote."""

import json

import numpy as np
import pytest

from mining import EmbeddingStore, PairTable
from tests.tiny_world import SHAPES, deepspeed, drawing, program, python, training_flags, write_shards
from train.data.pair_store import PairStore


def write_suite(folder) -> None:
    """An ImageFolder of the shapes in unseen hues, and the questions about it."""
    for shape in SHAPES:
        (folder / "test" / shape).mkdir(parents=True)
        for hue in (2, 13, 30):
            (folder / "test" / shape / f"{hue}.png").write_bytes(drawing(shape, hue, size=44))
    suite = {
        "name": "shapes",
        "data": "test",
        "format": "imagefolder",
        "tasks": [{"kind": "zeroshot", "name": "shape", "class_key": "cls", "templates": ["{}", "{} of hue 3"]}],
    }
    (folder / "suite.json").write_text(json.dumps(suite), encoding="utf-8")


@pytest.mark.slow
def test_every_stage_reads_what_the_one_before_wrote(tmp_path):
    write_shards(tmp_path / "shards", num_hues=12)
    write_suite(tmp_path)
    store, run, refined = tmp_path / "store", tmp_path / "runs" / "base", tmp_path / "runs" / "refined"
    embeddings, pairs = tmp_path / "embeddings", tmp_path / "pairs"

    program(
        *python("-m", "train.ingest", "--shards", f"{tmp_path}/shards/*.tar", "--out", str(store), "--workers", "2")
    )
    program(*deepspeed(2, "train/main.py", "pocket-pretrain", *training_flags(store, run, max_steps=5)))
    places = ("--checkpoint", str(run), "--store", str(store), "--out", str(embeddings), "--device", "cpu")
    program(*python("-m", "train.embed", *places))
    program(*python("-m", "mining.main", "search", "--embeddings", str(embeddings), "--out", str(pairs), "--k", "8"))
    gallery = tmp_path / "gallery.html"
    program(
        *python("-m", "mining.main", "gallery", "--pairs", str(pairs), "--store", str(store), "--out", str(gallery))
    )
    refine = training_flags(
        store, refined, max_steps=3, batch_size=18, data__pairs=pairs, model__pretrained=run, loss__margin_weight=1.0
    )
    program(*deepspeed(2, "train/main.py", "pocket-refine", *refine))
    for path in (run, refined):
        program(
            *python(
                "-m",
                "train.evaluate",
                "--checkpoint",
                str(path),
                "--suite",
                str(tmp_path / "suite.json"),
                "--device",
                "cpu",
            )
        )
    report = tmp_path / "report.html"
    runs = (str(run), str(refined))
    done = program(
        *python("-m", "train.report", *runs, "--pairs", str(pairs), "--store", str(store), "--out", str(report))
    )

    ledger = PairStore.open(store)
    table, rows = PairTable.open(pairs), EmbeddingStore.open(embeddings)
    assert len(ledger) == len(table) == len(rows) == 48
    assert rows.manifest["store_fingerprint"] == table.manifest["store_fingerprint"] == ledger.fingerprint
    assert table.manifest["embeddings_fingerprint"] == rows.fingerprint
    # The first hard pair of each row is the best clamped product of two cosines, worked out here in float64.
    image, text = (np.asarray(side, np.float64) for side in (rows.image_ND, rows.text_ND))
    score = np.maximum(image @ image.T, 0) * np.maximum(text @ text.T, 0)
    np.fill_diagonal(score, -1)
    same = ledger.image_group_N[:, None] == ledger.image_group_N
    score[same] = -1
    best = score.max(axis=1)
    mined = score[np.arange(48), table.pair_ids_NK[:, 0]]
    has_any = table.pair_ids_NK[:, 0] >= 0
    assert has_any.any()
    # Near-duplicates beyond the ceiling are left out, so the mined score may be lower than the best; it is never a miss below that.
    unexcluded = has_any & (table.num_excluded_N == same.sum(axis=1) - 1)
    assert np.allclose(mined[unexcluded], best[unexcluded], atol=1e-6)
    config = json.loads((refined / "config.json").read_text(encoding="utf-8"))
    assert config["store_fingerprint"] == ledger.fingerprint
    assert config["pairs_fingerprint"] == table.fingerprint
    assert [json.loads(line)["margin"] > 0 for line in (refined / "metrics.jsonl").read_text().splitlines()] == [
        True
    ] * 3
    for path in (run, refined):
        metrics = json.loads((path / "evaluations" / "shapes.json").read_text(encoding="utf-8"))["metrics"]
        assert metrics["zeroshot/shape/top1"]["count"] == 12
    assert "zeroshot/shape/top1" in done.stdout
    assert report.stat().st_size > 10_000
    assert gallery.stat().st_size > 10_000
