"""`python -m train.report` on made-up run folders: numbers, paired differences, self-containedness, users' mistakes."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from streaming import MDSWriter

from mining.command_line import run
from mining.manifest import write_manifest
from mining.pair_table import PairTable
from train.report.__main__ import main
from train.report.charts import Series, line_chart, thinned, tick_label, ticks
from train.report.compare import build_tables, choose_pair, paired_difference, text_table, verdict_sentence
from train.report.mining_section import mining_part
from train.report.page import report_html
from train.report.runs import read_runs
from train.report.sections import metric_label

ROOT = Path(__file__).parent.parent
KEYS = np.array([f"{number:03d}" for number in range(8)])
CONTROL_TOP1 = [1, 0, 0, 1, 0, 0, 1, 0]
REFINE_TOP1 = [1, 1, 0, 1, 1, 0, 0, 1]


def write_run(folder: Path, recipe: str, *, steps: int = 3, pairs: str = "", store: str = "data/none") -> Path:
    folder.mkdir(parents=True)
    settings = {
        "model": {"name": "pocket-rn", "pretrained": ""},
        "data": {"store": store, "pairs": pairs, "hard_per_anchor": 3, "partners": "mined"},
        "loss": {"margin_weight": 1.0, "margin_space": "cosine", "margin_direction": "both"},
        "batch_size": 128,
    }
    config = {"recipe": recipe, "config": settings, "num_steps": 60, "num_pairs": 17, "world_size": 2, "commit": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": 20 * step, "loss": 5.0 / step, "margin": 0.0, "pairs_per_s": 100.0 * step, "step_ms": 500.0}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_evaluation(
    folder: Path,
    values: dict[str, list[float]],
    *,
    step: int = 60,
    per_unit: bool = True,
    stem: str = "noto",
    keys=KEYS,
) -> dict:
    """Evaluation files as train.evaluate writes them; returns the metrics."""
    (folder / "evaluations").mkdir(exist_ok=True)
    metrics = {}
    for name, units in values.items():
        p = sum(units) / len(units)
        error = math.sqrt(p * (1 - p) / len(units))
        metrics[name] = {"value": p, "standard_error": error, "count": len(units), "unit": "image", "chance": 0.125}
    content = {"suite": "noto", "step": step, "num_images": len(keys), "metrics": metrics, "per_unit": f"{stem}.npz"}
    (folder / "evaluations" / f"{stem}.json").write_text(json.dumps(content))
    if per_unit:
        np.savez(folder / "evaluations" / f"{stem}.npz", keys=keys, **{n: np.array(u) for n, u in values.items()})
    return metrics


@pytest.fixture
def two_runs(tmp_path):
    """A control and a refine run, both evaluated on the same eight pictures."""
    control = write_run(tmp_path / "control", "pocket-control")
    refine = write_run(tmp_path / "refine", "pocket-refine")
    write_evaluation(control, {"zeroshot/name/top1": CONTROL_TOP1, "retrieval/retrieval/text_to_image_r1": [1] * 8})
    write_evaluation(refine, {"zeroshot/name/top1": REFINE_TOP1, "retrieval/retrieval/text_to_image_r1": [1] * 8})
    return control, refine


def tables_of(*folders: Path):
    runs = read_runs(folders)
    return build_tables(runs, choose_pair(runs, None, None))


def test_paired_difference_equals_the_hand_calculation():
    # d = 0, 1, 0, 0, 1, 0, -1, 1: mean 2/8; squares sum to 4; s^2 = (4 - 8 * (1/4)^2) / 7 = 0.5.
    difference = paired_difference(np.array(CONTROL_TOP1, float), np.array(REFINE_TOP1, float))
    assert difference.value == pytest.approx(0.25)
    assert difference.standard_error == pytest.approx(math.sqrt(0.5 / 8))
    assert difference.verdict == "within 2 s.e."


def test_paired_difference_is_that_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 2, 200).astype(float), generator.integers(0, 2, 200).astype(float)
    difference = paired_difference(first, second)
    assert difference.value / difference.standard_error == pytest.approx(stats.ttest_rel(second, first).statistic)


def test_verdict_needs_more_than_twice_the_standard_error():
    # g of n pictures gained, none lost: the ratio is sqrt(g (n-1) / (n-g)), past 2 from the fourth on.
    baseline = np.zeros(1000)
    for gained, verdict in ((3, "within 2 s.e."), (4, "better")):
        candidate = np.array([1.0] * gained + [0.0] * (1000 - gained))
        assert paired_difference(baseline, candidate).verdict == verdict
        assert paired_difference(candidate, baseline).verdict == verdict.replace("better", "worse")


def test_equal_results_are_no_difference():
    difference = paired_difference(np.ones(5), np.ones(5))
    assert (difference.value, difference.standard_error, difference.is_clear) == (0.0, 0.0, False)


def test_differences_without_values_per_picture_add_errors_in_squares_and_say_so(tmp_path):
    control = write_run(tmp_path / "control", "pocket-control")
    refine = write_run(tmp_path / "refine", "pocket-refine")
    write_evaluation(control, {"zeroshot/name/top1": CONTROL_TOP1}, per_unit=False)
    write_evaluation(refine, {"zeroshot/name/top1": REFINE_TOP1})
    (table,) = tables_of(control, refine)
    (row,) = table.rows
    p, q = 3 / 8, 5 / 8
    assert row.difference.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 8 + q * (1 - q) / 8))
    assert not row.difference.is_paired
    assert "(unpaired)" in text_table(table)


def test_other_pictures_are_not_paired(tmp_path):
    control = write_run(tmp_path / "control", "pocket-control")
    refine = write_run(tmp_path / "refine", "pocket-refine")
    write_evaluation(control, {"zeroshot/name/top1": CONTROL_TOP1})
    write_evaluation(refine, {"zeroshot/name/top1": REFINE_TOP1}, keys=KEYS[::-1])
    (table,) = tables_of(control, refine)
    assert not table.rows[0].difference.is_paired


def test_tables_hold_the_numbers_of_the_evaluations(two_runs):
    (table,) = tables_of(*two_runs)
    for column, folder in enumerate(two_runs):
        metrics = json.loads((folder / "evaluations" / "noto.json").read_text())["metrics"]
        assert [row.metric for row in table.rows] == list(metrics)
        for row in table.rows:
            assert row.cells[column].value == metrics[row.metric]["value"]
            assert row.cells[column].standard_error == metrics[row.metric]["standard_error"]
    assert "1 of 2 metrics better" not in verdict_sentence(table)


def test_refine_is_compared_with_control_whatever_the_order(two_runs):
    control, refine = two_runs
    for order in ((control, refine), (refine, control)):
        (table,) = tables_of(*order)
        assert (table.baseline, table.candidate) == ("control", "refine")


def test_baseline_and_candidate_can_be_named(two_runs):
    runs = read_runs(two_runs)
    pair = choose_pair(runs, "refine", "control")
    assert [run.name for run in pair] == ["refine", "control"]
    with pytest.raises(ValueError, match="--baseline nobody is none of the runs control, refine"):
        choose_pair(runs, "nobody", None)


def test_latest_step_of_a_suite_is_shown_and_a_run_that_went_on_is_said(tmp_path):
    folder = write_run(tmp_path / "a", "pocket-refine", steps=5)
    write_evaluation(folder, {"zeroshot/name/top1": REFINE_TOP1}, step=60)
    write_evaluation(folder, {"zeroshot/name/top1": CONTROL_TOP1}, step=20, stem="noto_step_20")
    (found,) = read_runs([folder])
    assert found.evaluations["noto"].content["step"] == 60
    assert any("at step 60, and has gone on to step 100" in lack for lack in found.missing)


def test_time_in_steps_is_the_sum_over_logged_intervals(tmp_path):
    (found,) = read_runs([write_run(tmp_path / "a", "x", steps=4)])
    assert found.seconds == pytest.approx(80 * 0.5)


def test_line_that_a_kill_tore_is_left_out_and_other_damage_is_an_error(tmp_path):
    folder = write_run(tmp_path / "a", "x")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 80, "lo')
    assert read_runs([folder])[0].last_step == 60
    (folder / "metrics.jsonl").write_text('{"step": 2, "lo\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_runs([folder])


class References(HTMLParser):
    """Every attribute through which a browser would load something."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.open_tags: list[str] = []

    def handle_startendtag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag, f"</{tag}> closes another element"


def references_of(page: str) -> list[str]:
    parser = References()
    parser.feed(page)
    assert parser.open_tags == []
    return parser.found


def write_store(folder: Path, fingerprint: str) -> Path:
    """A PairStore of three pairs, as far as the gallery reads it."""
    columns = {"caption": "str", "image": "bytes", "key": "str", "pair_id": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for number, colour in enumerate(("red", "green", "blue")):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), colour).save(buffer, "png")
            caption = f"a <{colour}> square"
            writer.write({"caption": caption, "image": buffer.getvalue(), "key": f"k{number}", "pair_id": number})
    write_manifest(folder, "PairStore", 1, fingerprint=fingerprint, num_pairs=3)
    return folder


def write_table(folder: Path, store_fingerprint: str) -> Path:
    ids = np.array([[1, 2], [0, 2], [1, -1]], np.int32)
    similarity = np.array([[0.9, 0.5], [0.9, 0.4], [0.3, 0.0]], np.float16)
    PairTable.write(folder, ids, similarity, similarity, store_fingerprint=store_fingerprint)
    return folder


@pytest.mark.slow
def test_report_of_three_runs_is_one_self_contained_file_with_every_part(two_runs, tmp_path):
    pretrain = write_run(tmp_path / "pretrain", "pocket-pretrain", steps=9)
    store, table = write_store(tmp_path / "store", "f00"), write_table(tmp_path / "pairs", "f00")
    out = tmp_path / "pages" / "report.html"
    arguments = [str(pretrain), *map(str, two_runs), "--pairs", str(table), "--store", str(store), "--out", str(out)]
    command = [sys.executable, "-m", "train.report", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    page = out.read_text()
    outside = [value for value in references_of(page) if not value.startswith(("#", "data:image/"))]
    assert outside == []
    assert not re.search(r"https?://|file://|@import|url\(", page)
    assert page.count('src="data:image/png;base64,') >= 4
    assert "a &lt;red&gt; square" in page
    assert "62.50 <small>&plusmn; 17.12</small>" in page
    assert "+25.00 <small>&plusmn; 25.00</small>" in page
    for title in ("Loss", "Throughput, pairs/s"):
        assert f"<figcaption>{title}" in page
    assert "Margin term" not in page, "no run has a margin"
    assert f"{pretrain} has not been evaluated" in page
    lines = finished.stdout.splitlines()
    top1 = next(line for line in lines if line.startswith("zeroshot/name/top1"))
    assert top1.split()[1:3] == ["12.50", "-"]
    assert "37.50 +- 17.12  62.50 +- 17.12   +25.00 +- 25.00  within 2 s.e." in top1
    assert lines[-1] == f"report: {out}"


def test_what_is_missing_is_said_in_the_report_and_on_the_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "alone", "pocket-refine", steps=0)
    main([str(folder), "--out", str(tmp_path / "r.html")])
    page, printed = (tmp_path / "r.html").read_text(), capsys.readouterr().out
    for lack in ("has not been evaluated", "has no metrics yet", "No run uses a pair table"):
        assert lack in page
        assert f"{lack}" in printed
    assert "No run has been evaluated yet" in page


def test_pair_table_named_by_a_run_but_gone_is_missing_not_an_error(tmp_path, capsys):
    folder = write_run(tmp_path / "a", "pocket-refine", pairs=str(tmp_path / "gone"))
    main([str(folder), "--out", str(tmp_path / "r.html")])
    assert "cannot be shown" in capsys.readouterr().out


def one_line_error(capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(main, [str(argument) for argument in arguments])
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_missing_run_folder_is_one_line(tmp_path, capsys):
    assert "nowhere does not exist" in one_line_error(capsys, tmp_path / "nowhere")


def test_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert "no config.json" in one_line_error(capsys, tmp_path)


def test_pair_table_of_another_store_is_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "a", "pocket-refine")
    store, table = write_store(tmp_path / "store", "f00"), write_table(tmp_path / "pairs", "ba2")
    arguments = ("--pairs", table, "--store", store, "--out", tmp_path / "r.html")
    assert "another store" in one_line_error(capsys, folder, *arguments)


def test_damaged_evaluation_is_one_line_naming_it(two_runs, tmp_path, capsys):
    (two_runs[0] / "evaluations" / "noto.json").write_text("{")
    assert "noto.json is not valid JSON" in one_line_error(capsys, *two_runs, "--out", tmp_path / "r.html")
    write_evaluation(two_runs[0], {"zeroshot/name/top1": CONTROL_TOP1})
    (two_runs[0] / "evaluations" / "noto.npz").write_bytes(b"x")
    assert "noto.npz is damaged" in one_line_error(capsys, *two_runs, "--out", tmp_path / "r.html")


def test_no_runs_is_one_line(capsys, tmp_path):
    assert "at least one run folder" in one_line_error(capsys, "--out", tmp_path / "r.html")


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.03, 0.041, 4) == pytest.approx([-0.02, 0.0, 0.02, 0.04])


def test_neighbouring_tick_labels_differ():
    values = ticks(14.245, 14.273, 6)
    assert [tick_label(value, values) for value in values] == [
        "14.245",
        "14.250",
        "14.255",
        "14.260",
        "14.265",
        "14.270",
    ]
    assert [tick_label(value, [0, 50000]) for value in (0, 50000)] == ["0", "50k"]


def test_long_series_are_thinned_to_means_that_keep_the_average():
    values = list(range(1000))
    short = thinned(Series("a", values, values, 0))
    assert len(short.x) == 400
    assert short.x[0] == pytest.approx(0.5)
    assert sum(short.y) / 400 == pytest.approx(499.5, abs=1.0)


def test_gap_at_a_value_that_is_not_finite_breaks_the_line():
    chart = line_chart("x", [Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, 4.0], 0)])
    path = re.search(r' d="([^"]*)"', chart).group(1)
    assert (path.count("M"), path.count("L")) == (2, 2)
    assert line_chart("x", [Series("a", [], [], 0)]) == ""


def test_metric_labels_are_words():
    assert metric_label("zeroshot/name_within_subgroup/top1") == "name within subgroup, top-1"
    assert metric_label("retrieval/retrieval/text_to_image_r10") == "text to image R@10"
    assert metric_label("linear_probe/group/mean_per_class") == "group, mean per class"


def test_mixed_similarities_have_a_table_and_their_highest_values_are_marked(two_runs, tmp_path):
    path = two_runs[1] / "evaluations" / "noto.json"
    content = json.loads(path.read_text())
    shares = {"0.1": 0.25, "0.5": 0.875, "0.9": 0.75}
    mixed = {weight: {"top1": {"value": value, "standard_error": 0.1}} for weight, value in shares.items()}
    content["details"] = {"zeroshot/name": {"interpolation": mixed}, "linear_probe/name": {"iterations": 3}}
    path.write_text(json.dumps(content))
    runs = read_runs(two_runs)
    page = report_html(runs, tables_of(*two_runs), mining_part(runs, None, None))
    (table,) = re.findall(r'<table class="mixed">.*?</table>', page)
    assert re.findall(r"<th>(.*?)</th>", table)[1:] == ["0.1", "0.5", "0.9", "1"]
    assert re.findall(r"<td>(.*?)</td>", table) == ["25.00", "<strong>87.50</strong>", "75.00", "62.50"]
    assert '<a href="#mixed">' in page
    assert 'id="mixed"' not in report_html(runs[:1], tables_of(two_runs[0]), mining_part(runs[:1], None, None))
