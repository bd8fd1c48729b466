"""Fetching pinned packages: the cache is trusted only where the bytes are the pinned ones, and an outage is one line."""

import dataclasses
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.pocket_packages import sha512_of, tarball
from train.pocket.fetch import default_cache_folder, fetch_packages, npm_reason, read_json_members, read_members
from train.pocket.packages import PINNED_PACKAGES, notice_text

REPOSITORY = Path(__file__).resolve().parent.parent
CONTENT = tarball({"icons.json": {"a": 1}})
PACKAGE = dataclasses.replace(PINNED_PACKAGES[1], sha512=sha512_of(CONTENT))


def packing(content: bytes, calls: list[str]):
    def pack(package, folder: Path) -> None:
        calls.append(package.name)
        (folder / package.tarball_name).write_bytes(content)

    return pack


def never_pack(package, folder: Path) -> None:
    raise AssertionError("the registry was asked")


def test_npm_names_a_scoped_packages_tarball_without_the_at_sign() -> None:
    # As `npm pack` printed it.
    assert PINNED_PACKAGES[1].tarball_name == "iconify-json-twemoji-1.2.5.tgz"
    assert PINNED_PACKAGES[0].tarball_name == "emojibase-data-17.0.0.tgz"


def test_a_package_is_fetched_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    calls: list[str] = []
    first = fetch_packages([PACKAGE], tmp_path / "cache", pack=packing(CONTENT, calls))
    second = fetch_packages([PACKAGE], tmp_path / "cache", pack=never_pack)
    assert first == second
    assert first[PACKAGE.name].read_bytes() == CONTENT
    assert calls == [PACKAGE.name]


def test_a_damaged_tarball_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / PACKAGE.tarball_name).write_bytes(CONTENT[:-7])
    paths = fetch_packages([PACKAGE], tmp_path, pack=packing(CONTENT, []))
    assert paths[PACKAGE.name].read_bytes() == CONTENT


def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"twemoji@1\.2\.5 is not the pinned one.*npm_config_registry"):
        fetch_packages([PACKAGE], tmp_path, pack=packing(CONTENT + b"x", []))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_during_the_fetch_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    def interrupted(package, folder: Path) -> None:
        (folder / package.tarball_name).write_bytes(CONTENT[:10])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_packages([PACKAGE], tmp_path, pack=interrupted)
    assert not (tmp_path / PACKAGE.tarball_name).exists()


def test_a_cache_folder_that_cannot_be_made_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache"):
        fetch_packages([PACKAGE], tmp_path / "file" / "cache", pack=never_pack)


def test_the_cache_folder_follows_the_environment(tmp_path: Path) -> None:
    assert default_cache_folder({"HARDPAIR_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a/pocket")
    assert default_cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/hardpair/pocket")
    assert default_cache_folder({}) == Path.home() / ".cache/hardpair/pocket"


def test_npms_reason_is_its_summary_or_its_last_line() -> None:
    answer = '{"error": {"code": "E404", "summary": "no such version", "detail": ""}}'
    assert npm_reason(answer, "noise") == "E404: no such version"
    assert npm_reason("", "first\nnpm error last\n\n") == "npm error last"
    assert npm_reason("", "") == "it gave no reason"


def test_only_regular_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "links.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(read_members(path, lambda name: True)) == []
    with pytest.raises(ValueError, match=r"has no icons\.json"):
        read_json_members(path, ("icons.json",))


def test_the_repositorys_notice_credits_every_package() -> None:
    assert (REPOSITORY / "NOTICE").read_text(encoding="utf-8").endswith(notice_text(PINNED_PACKAGES))


@pytest.mark.slow
def test_an_unreachable_registry_is_one_line_with_the_remedy_and_exit_code_2(tmp_path: Path) -> None:
    # Port 9 of this machine refuses connections.
    environment = {**os.environ, "npm_config_registry": "http://127.0.0.1:9", "HARDPAIR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "train.pocket.data", "--short", "--out", str(tmp_path / "out")],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: npm could not fetch")
    assert "ECONNREFUSED" in last
    assert "npm_config_registry" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
