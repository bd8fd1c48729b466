"""The mining programs as a user calls them: output, help, and one line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mining import EmbeddingStore, PairTable
from mining.command_line import run
from mining.main import main
from mining.summary import histogram_lines, summary_text
from tests.embeddings import random_rows, random_store

REPOSITORY = Path(__file__).resolve().parents[1]


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the program in this process."""
    code = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as exit_info:
        code = exit_info.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_search_then_inspect_print_the_numbers(tmp_path, capsys):
    random_store(tmp_path / "e", 120)
    code, out, err = call(
        capsys, "search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p", "--k", 7, "--image-ceiling", 0.5
    )
    assert code == 0
    table = PairTable.open(tmp_path / "p")
    assert table.k == 7
    assert "120 (k = 7)" in out
    assert f"left out         {int(table.num_excluded_N.sum())} duplicates" in out
    assert str(tmp_path / "p") in out
    assert "pair/s" in err
    summary = json.loads((tmp_path / "p" / "summary.json").read_text())
    assert summary["pairs"] == 120
    assert summary["seconds"] > 0
    code, out, _ = call(capsys, "inspect", "--pairs", tmp_path / "p")
    assert code == 0
    assert "####" in out
    assert "hubs" in out


def test_search_again_says_that_it_is_complete(tmp_path, capsys):
    random_store(tmp_path / "e", 20)
    arguments = ("search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p", "--k", 2)
    call(capsys, *arguments)
    assert "is complete already" in call(capsys, *arguments)[2]
    assert "is complete already" not in call(capsys, *arguments, "--no-resume")[2]


def test_embeddings_that_were_not_compared_with_their_checksums_are_said_to_be_so(tmp_path, capsys):
    random_store(tmp_path / "e", 20)
    arguments = ("search", "--embeddings", tmp_path / "e", "--k", 2, "--out")
    for name, flags in (("checked", ()), ("unchecked", ("--no-check-embeddings",))):
        shown = call(capsys, *arguments, tmp_path / name, *flags)[1]
        shown_again = call(capsys, "inspect", "--pairs", tmp_path / name)[1]
        for text in (shown, shown_again):
            assert "20 (100.0 %) certified" in text
            assert ("NOT CHECKED      whether the embeddings have the bytes" in text) == (name == "unchecked")
        assert json.loads((tmp_path / name / "summary.json").read_text())["embeddings_checked"] == (name == "checked")
    # Of an appended table the old rows are compared in any case.
    summary = json.loads((tmp_path / "unchecked" / "summary.json").read_text())
    summary["appended"] = {"old_pairs": 15, "new_pairs": 5}
    assert "NOT CHECKED      whether the embeddings of the new pairs have" in summary_text(summary)


def test_faiss_backend_is_reached_by_its_flag(tmp_path, capsys):
    random_store(tmp_path / "e", 60)
    arguments = ("search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p", "--backend", "faiss")
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    # Not proven beforehand, so measured.
    assert "of the exact hard pairs are listed" in out
    assert call(capsys, *arguments, "--exact")[0] == 0
    assert PairTable.open(tmp_path / "p").certified_N.all()
    assert PairTable.open(tmp_path / "p").manifest["facts"]["backend"] == "faiss"


def test_queries_are_searched_piece_by_piece(tmp_path, capsys):
    random_store(tmp_path / "e", 60)
    arguments = ("search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p", "--k", 4)
    code, out, _ = call(capsys, *arguments, "--queries", "0:50")
    assert code == 0
    assert "pairs 0:50 are searched" in out
    assert not (tmp_path / "p").exists()
    code, out, _ = call(capsys, *arguments, "--queries", "50:60", "--no-check-embeddings")
    assert code == 0
    assert "60 (k = 4)" in out


def test_measured_recall_of_an_inverted_index_is_printed_with_its_interval(tmp_path, capsys):
    random_store(tmp_path / "e", 300)
    flags = ("--k", 5, "--backend", "faiss", "--index", "ivf", "--nlist", 8, "--nprobe", 2, "--recall-sample", 100)
    code, out, _ = call(capsys, "search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p", *flags)
    assert code == 0
    recall = PairTable.open(tmp_path / "p").manifest["facts"]["recall"]
    assert f"recall           {recall['recall']:.4f} of the exact hard pairs are listed (95 % Wilson interval 0." in out
    assert "100 rows drawn at random" in out


def test_rank_without_a_world_is_one_line(tmp_path, capsys, monkeypatch):
    random_store(tmp_path / "e", 12)
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = call(capsys, "search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p")
    assert code == 2
    assert "WORLD_SIZE=4 is set in the environment without its companion" in err
    assert err.count("\n") == 1


def test_help_lists_commands_and_flags(capsys):
    for arguments in ((), ("--help",)):
        code, out, _ = call(capsys, *arguments)
        assert code == 0
        assert all(command in out for command in ("search", "append", "verify", "inspect", "gallery"))
    code, out, _ = call(capsys, "search", "--help")
    assert code == 0
    for flag in (
        "--embeddings",
        "--out",
        "--k",
        "--backend",
        "--image-ceiling",
        "--noise-alignment-quantile",
        "--false-negative-margin",
        "--hub-cap",
        "--block",
    ):
        assert flag in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serch",), "has no command 'serch'; did you mean search?"),
        (("search", "--embeding", "x"), "does not know --embeding; did you mean --embeddings?"),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--k", "0"), "k=0"),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--floor", "1"), "floor=1"),
        (
            ("search", "--embeddings", "{e}", "--out", "{p}", "--backend", "faiss", "--recall-sample", "0"),
            "recall_sample=0",
        ),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--hub-cap", "0"), "hub_cap=0"),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--false-negative-margin", "0"), "share no space"),
        (("append", "--pairs", "{written}", "--embeddings", "{e}", "--out", "{p}"), "is not exact"),
        (("search", "--embeddings", "{none}", "--out", "{p}"), "is not a folder, an EmbeddingStore was expected there"),
        (("search", "--embeddings", "{e}", "--out", "{e}"), "something other than a PairTable"),
        (("search", "--embeddings", "{torn}", "--out", "{p}"), "text.npy does not have the bytes"),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--queries", "3"), "must be two whole numbers START:STOP"),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--queries", "3:99"), "queries=3:99 must be a range"),
        (
            ("search", "--embeddings", "{e}", "--out", "{p}", "--index", "ivf"),
            "backend='fused' searches without an index",
        ),
        (("search", "--embeddings", "{e}", "--out", "{p}", "--helip-compat", "--helip-subset", "0"), "helip_subset=0"),
        (
            ("search", "--embeddings", "{e}", "--out", "{p}", "--backend", "faiss", "--device", "cuda"),
            "sees no GPU here; use --device cpu",
        ),
        (("search", "--embeddings", "{cut}", "--out", "{p}"), "image.npy is damaged or cut short"),
        (("verify", "--pairs", "{cut_pairs}", "--embeddings", "{e}"), "pair_ids.npy is damaged or cut short"),
        (("verify", "--pairs", "{written}", "--embeddings", "{e}"), "was made from embeddings of fingerprint"),
        (("search", "--embeddings", "{e}"), "Missing from python -m mining.main search: --out"),
        (("inspect", "--pairs", "{e}"), "holds a 'EmbeddingStore', a PairTable was expected"),
        (("inspect", "--pairs", "{written}"), "summary.json is missing"),
        (("gallery", "--pairs", "{written}", "--store", "{none}", "--out", "{p}"), "a PairStore was expected there"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(tmp_path, capsys, arguments, message):
    random_store(tmp_path / "e", 12)
    EmbeddingStore.write(tmp_path / "torn", random_rows(3, 4, 0), random_rows(3, 4, 0))
    with open(tmp_path / "torn" / "text.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    PairTable.write(tmp_path / "written", np.array([[1], [0]]), np.ones((2, 1)), np.ones((2, 1)))
    cut = EmbeddingStore.write(tmp_path / "cut", random_rows(3, 4, 0), random_rows(3, 4, 0)).path / "image.npy"
    os.truncate(cut, cut.stat().st_size - 5)
    cut = PairTable.write(tmp_path / "cut_pairs", np.array([[1], [0]]), np.ones((2, 1)), np.ones((2, 1))).path
    os.truncate(cut / "pair_ids.npy", 130)
    places = {name: str(tmp_path / name) for name in ("e", "p", "none", "torn", "written", "cut", "cut_pairs")}
    code, _, err = call(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_program_runs_as_a_module_without_loading_torch_for_its_help():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mining.main", "search", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert "--embeddings" in done.stdout
    assert "mining.command_line" in done.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


def test_histogram_spans_the_scores_and_scales_to_the_largest_bar():
    histogram = [0] * 20
    histogram[4], histogram[6] = 400, 10
    lines = histogram_lines(histogram)
    assert lines[1].split() == ["0.20", "-", "0.25", "#" * 40, "400"]
    assert lines[2].split() == ["0.25", "-", "0.30", "0"]
    assert lines[3].split() == ["0.30", "-", "0.35", "#", "10"]
    assert len(lines) == 4


def test_summary_of_a_table_without_hard_pairs_is_printed(tmp_path, capsys):
    EmbeddingStore.write(tmp_path / "e", np.eye(3), np.eye(3))
    code, out, _ = call(capsys, "search", "--embeddings", tmp_path / "e", "--out", tmp_path / "p")
    assert code == 0
    assert "best score       no hard pairs" in out
    assert "nothing agrees 3" in out
    assert "no hard pairs" in summary_text(json.loads((tmp_path / "p" / "summary.json").read_text()), with_details=True)
