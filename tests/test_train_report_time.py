"""The report's time of a step, use of the machine, and what pruning dropped."""

import json
from pathlib import Path

import pytest

from train.report.mining_section import MiningPart, dropped_facts
from train.report.page import report_html
from train.report.runs import read_run
from train.report.time_section import PARTS, step_parts, time_section, use_facts


def write_run(folder: Path, rows: list[dict], **facts) -> Path:
    folder.mkdir()
    config = {"recipe": "pocket-pretrain", "config": {}, "commit": "abcdef0123456789", **facts}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def row(step: int, forward_ms: float, **more) -> dict:
    parts = dict.fromkeys((field for field, _ in PARTS), 10.0)
    parts["forward_ms"] = forward_ms
    return {"step": step, "loss": 1.0, "pairs_per_s": 5.0, "step_ms": sum(parts.values()), **parts, **more}


@pytest.fixture
def run(tmp_path):
    use = {"mfu": 0.4, "data_wait_share": 0.1, "goodput": 0.876, "restarts": 2, "skipped_steps": 1}
    # The first report has the warm-up.
    rows = [row(1, 900.0, mfu=0.1), row(2, 30.0, **use), row(3, 32.0, **use)]
    return read_run(write_run(tmp_path / "run <1>", rows, dirty=True), "run <1>")


def test_parts_are_medians_of_the_logged_steps(run):
    assert step_parts(run)["forward_ms"] == 32.0
    assert step_parts(run)["reduce_ms"] == 10.0


def test_bars_and_table_hold_every_part_to_one_scale(run):
    page = time_section([run])
    assert page.count("<rect") == len(PARTS)
    assert "<title>run &lt;1&gt;, forward: 32.0 ms</title>" in page
    # 7 parts of 10 ms and one of 32.
    assert ">102 ms</text>" in page
    assert "<td>32.0 <small>31.4 %</small></td>" in page
    assert "run <1>" not in page


def test_runs_of_earlier_versions_have_no_bars(tmp_path):
    old = read_run(write_run(tmp_path / "old", [{"step": 1, "loss": 1.0, "step_ms": 5.0, "pairs_per_s": 2.0}]), "old")
    assert time_section([old]) == ""
    assert dict(use_facts(old))["Median MFU"] == "-"
    page = report_html([old], [], MiningPart([], "", []))
    assert 'href="#time"' not in page
    assert "<figcaption>MFU" not in page


def test_use_of_the_machine_is_in_the_table_of_runs(run):
    page = report_html([run], [], MiningPart([], "", []))
    facts = dict(use_facts(run))
    assert facts == {
        "Median MFU": "40.0 %",
        "Waiting for data": "10.0 %",
        "Goodput": "87.6 %",
        "Restarts": "2",
        "Skipped steps": "1",
    }
    for label, value in facts.items():
        assert f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' in page
    assert "abcdef012345 + changes" in page
    assert 'href="#time"' in page


def test_what_pruning_took_out_is_said_with_its_parameter():
    summary = {
        "dropped": {"false_negative": 1234, "hub_capped": 5, "left_without": 3},
        "parameters": {"false_negative_margin": 0.02, "hub_cap": 100},
    }
    assert dropped_facts(summary) == [
        ("Taken out as likely false negatives (margin 0.02)", "1,234"),
        ("Taken out of hubs (at most 100 lists)", "5"),
        ("Left without hard pairs by that", "3"),
    ]
    assert dropped_facts({"dropped": {"left_without": 0}}) == []
    assert dropped_facts({}) == []
