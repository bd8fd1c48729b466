"""Manifests and the atomic finish of a folder."""

import hashlib
import json
import os

import pytest

from mining.manifest import (
    commit_folder,
    fingerprint,
    read_manifest,
    write_json_atomically,
    write_manifest,
)


def test_fingerprint_is_that_of_content_and_keeps_parts_apart():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc")
    assert fingerprint("1") != fingerprint(1)
    # By hand: each part is its length in 8 little-endian bytes and itself; JSON for what is not bytes.
    by_hand = (1).to_bytes(8, "little") + b"x" + (3).to_bytes(8, "little") + b"[1]"
    assert fingerprint(b"x", [1]) == hashlib.sha256(by_hand).hexdigest()


def test_manifest_returns_its_fields(tmp_path):
    write_manifest(tmp_path, "Thing", 3, count=5)
    assert read_manifest(tmp_path, "Thing", 3, remedy="make it")["count"] == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "Other", "format_version": 1}', "holds a 'Other', a Thing was expected"),
        ('{"kind": "Thing", "format_version": 2}', "format version 2, this program reads version 1"),
        ('{"kind": "Thing"', "not valid JSON"),
        ("[1]", "no JSON object"),
    ],
)
def test_manifest_that_does_not_fit_is_refused_with_the_remedy(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*make it again"):
        read_manifest(tmp_path, "Thing", 1, remedy="make it again")


def test_missing_folder_and_missing_manifest_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_manifest(tmp_path / "none", "Thing", 1, remedy="make it")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        read_manifest(tmp_path, "Thing", 1, remedy="make it")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json_atomically(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_commit_replaces_a_folder_whole(tmp_path):
    for name, text in (("new", "new"), ("out", "old")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(text)
    (tmp_path / "out" / "only_old").write_text("x")
    commit_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "only_old").exists()


def test_kill_while_replacing_leaves_both_folders_on_disk(tmp_path, monkeypatch):
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = os.replace

    def killed_before_the_second(source, target):
        if source == tmp_path / "new":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("mining.manifest.os.replace", killed_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            commit_folder(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "new" / "file").read_text() == "new"
    assert (tmp_path / ".out.replaced" / "file").read_text() == "out"
    commit_folder(tmp_path / "new", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
