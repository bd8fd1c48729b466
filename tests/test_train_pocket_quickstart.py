"""The quickstart's own work: which stages run again, what is shown of them, and how a failure ends it. The stages themselves run in
`make quickstart POCKET=short`."""

import sys
from pathlib import Path

import pytest

from train.pocket import quickstart
from train.pocket.quickstart import Marks, QuickstartConfig, Stage, run_filtered, run_stages, stages


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def append(path: Path, word: str) -> Stage:
    return Stage(word, script(f"open({str(path)!r}, 'a').write('{word} ')"))


def test_a_second_run_skips_what_is_done_and_goes_on_after_a_failure(tmp_path, monkeypatch, capfd):
    trace, config = tmp_path / "trace", QuickstartConfig(out=str(tmp_path / "out"))
    first, last = append(trace, "first"), append(trace, "last")
    monkeypatch.setattr(
        quickstart, "stages", lambda config: [first, Stage("broken", script("raise SystemExit(3)")), last]
    )
    with pytest.raises(SystemExit, match=r"\[2/3\] broken failed with exit code 3; its output is in .*broken.log"):
        run_stages(config)
    monkeypatch.setattr(quickstart, "stages", lambda config: [first, append(trace, "mended"), last])
    run_stages(config)
    run_stages(config)
    assert trace.read_text() == "first mended last "
    assert capfd.readouterr().out.count("done before") == 1 + 3


def test_a_changed_stage_runs_again_with_all_after_it(tmp_path, monkeypatch):
    trace, config = tmp_path / "trace", QuickstartConfig(out=str(tmp_path / "out"))
    monkeypatch.setattr(quickstart, "stages", lambda config: [append(trace, word) for word in ("a", "b", "c")])
    run_stages(config)
    monkeypatch.setattr(quickstart, "stages", lambda config: [append(trace, word) for word in ("a", "other", "c")])
    run_stages(config)
    assert trace.read_text() == "a b c other c "


def test_the_launchers_port_does_not_make_a_stage_new(tmp_path):
    marks = Marks(tmp_path / "stages.json")
    marks.set_done(Stage("embed", ("deepspeed", "--num_accelerators", "2", "--master_port", "1234", "x.py")), 1.0)
    assert Marks(tmp_path / "stages.json").is_done(
        Stage("embed", ("deepspeed", "--num_accelerators", "2", "--master_port", "9876", "x.py"))
    )


def test_the_launchers_narration_goes_to_the_log_alone(tmp_path, capfd):
    code = (
        "print('[2026-01-01 10:00:00,123] [INFO] [launch.py:1:main] WORLD INFO DICT');"
        "print('error: the store is damaged'); print('table'); raise SystemExit(2)"
    )
    assert run_filtered(script(code), tmp_path / "stage.log") == 2
    shown = capfd.readouterr().out
    assert "WORLD INFO" not in shown
    assert "error: the store is damaged\n" in shown
    assert "table\n" in shown
    assert "WORLD INFO" in (tmp_path / "stage.log").read_text()


@pytest.mark.parametrize("short", [False, True])
def test_the_story_is_told_in_the_order_of_the_pipeline(short):
    names = [stage.name for stage in stages(QuickstartConfig(short=short))]
    assert names[:8] == ["data", "ingest", "pretrain", "embed", "mine", "gallery", "control", "refine"]
    assert names[8:] == [*([] if short else ["evaluate-pretrain"]), "evaluate-control", "evaluate-refine", "report"]


def test_a_folder_with_a_space_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without spaces"):
        run_stages(QuickstartConfig(out=str(tmp_path / "my folder")))
