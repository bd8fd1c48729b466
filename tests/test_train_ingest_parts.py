"""One data set ingested by several programs: the merged store has the bytes of a single ingest, whatever goes wrong on the way."""

import shutil

import pytest

from tests.tar_shards import (
    fails_with,
    ingest,
    ingest_part,
    merge,
    samples,
    store_bytes,
    write_shards,
    write_tar,
)
from train.data.pair_store import PairStore
from train.ingest.parts import Part, parse_part
from train.ingest.plan import locked_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The store of those shards, one ingest."""
    return ingest(shards / "*.tar", tmp_path_factory.mktemp("reference") / "store").path


@pytest.fixture(scope="module")
def ingested(shards, tmp_path_factory):
    """Parts 0/2 and 1/2, done and not merged; copy it."""
    out = tmp_path_factory.mktemp("ingested") / "store"
    for index in range(2):
        ingest_part(shards / "*.tar", out, f"{index}/2")
    return out


@pytest.fixture
def parts(ingested, tmp_path):
    return shutil.copytree(ingested, tmp_path / "store")


def whole_store(folder):
    """All files, the plan too, by name."""
    return {**store_bytes(folder), "ingest.json": (folder / "ingest.json").read_bytes()}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_parts_have_the_bytes_of_a_single_ingest_whatever_their_order(shards, reference, tmp_path, count):
    for index in reversed(range(count)):
        ingest_part(shards / "*.tar", tmp_path / "store", f"{index}/{count}")
    assert whole_store(merge(tmp_path / "store").path) == whole_store(reference)


def test_rejections_are_merged_too(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", samples(["a", "b"]) + [("bad.txt", b"no picture")])
    expected = ingest(tmp_path / "*.tar", tmp_path / "single").path
    for index in range(2):
        ingest_part(tmp_path / "*.tar", tmp_path / "store", f"{index}/2")
    assert whole_store(merge(tmp_path / "store").path) == whole_store(expected)


def test_parts_share_the_shards_out_evenly_and_completely():
    for num_shards in (0, 1, 5, 1243):
        for count in (1, 2, 8, 16):
            shares = [list(Part(index, count).numbers(num_shards)) for index in range(count)]
            assert sorted(number for share in shares for number in share) == list(range(num_shards))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_part_is_no_store_and_says_what_comes_next(shards, tmp_path, capsys):
    ingest_part(shards / "*.tar", tmp_path / "store", "1/2")
    assert capsys.readouterr().out.startswith(
        f"{tmp_path}/store: part 1/2 is done, 2 shards: kept 1 pairs, rejected 0, in "
    )
    with pytest.raises(ValueError, match="no complete PairStore"):
        PairStore.open(tmp_path / "store")


def test_missing_part_is_named_and_what_is_there_is_kept(shards, reference, tmp_path, capsys):
    out = tmp_path / "store"
    ingest_part(shards / "*.tar", out, "1/3")
    line = fails_with(capsys, "--out", str(out), "--merge")
    assert (
        f"2 of 3 parts of {out} are not done (0/3, 2/3); run each with --part, as --part 0/3, then --merge again"
        in line
    )
    ingest_part(shards / "*.tar", out, "2/3")
    ingest_part(shards / "*.tar", out, "0/3")
    assert whole_store(merge(out).path) == whole_store(reference)


def test_merge_without_any_part_says_what_to_run(tmp_path, capsys):
    line = fails_with(capsys, "--out", str(tmp_path / "nothing"), "--merge")
    assert "nothing holds no parts; run --part 0/n ... --part n-1/n into it first" in line
    assert not (tmp_path / "nothing").exists()


def test_parts_of_another_division_are_refused(shards, parts, capsys):
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(parts), "--part", "0/3")
    assert "holds parts of 2 (00000-of-00002) and of 3 (00000-of-00003): shards would be done twice; delete" in line
    assert "holds parts of 2" in fails_with(capsys, "--out", str(parts), "--merge")


def test_foreign_part_is_refused_at_its_start_and_at_the_merge(shards, parts, tmp_path, capsys):
    line = fails_with(
        capsys, "--shards", str(shards / "*.tar"), "--out", str(parts), "--part", "0/2", "--max-pixels", "5000"
    )
    assert "was started with --max-pixels 89478485, now it is 5000; give another --out" in line
    other = tmp_path / "other"
    ingest_part(shards / "*.tar", other, "1/2", "--max-pixels", "5000")
    shutil.rmtree(parts / "parts/00001-of-00002")
    shutil.copytree(other / "parts/00001-of-00002", parts / "parts/00001-of-00002")
    line = fails_with(capsys, "--out", str(parts), "--merge")
    assert f"{parts}/parts/00001-of-00002 is a part of another ingest (other shards or flags than {parts} was" in line


def test_foreign_fragment_is_refused(shards, parts, tmp_path, capsys):
    other = tmp_path / "other"
    ingest_part(shards / "*.tar", other, "1/2", "--max-pixels", "5000")
    shutil.rmtree(parts / "shards/00001")
    shutil.copytree(other / "shards/00001", parts / "shards/00001")
    line = fails_with(capsys, "--out", str(parts), "--merge")
    assert f"{parts}/shards/00001 is another ingest's: it was made from 00001.tar with other --shards or flags" in line


def test_fragment_in_the_place_of_another_is_refused(parts, capsys):
    shutil.rmtree(parts / "shards/00002")
    shutil.copytree(parts / "shards/00000", parts / "shards/00002")
    line = fails_with(capsys, "--out", str(parts), "--merge")
    assert "shards/00002 is another ingest's: it was made from 00000.tar" in line
    assert "belongs to 00002.tar" in line


def test_shards_that_a_finished_part_lost_are_named(shards, reference, parts, capsys):
    shutil.rmtree(parts / "shards/00002")
    shutil.rmtree(parts / "shards/00004")
    line = fails_with(capsys, "--out", str(parts), "--merge")
    assert f"part 0/2 of {parts} is done, but 2 of its shards are not in {parts}/shards (00002.tar, 00004.tar)" in line
    ingest_part(shards / "*.tar", parts, "0/2")
    assert whole_store(merge(parts).path) == whole_store(reference)


def test_parts_from_disks_of_their_own_are_copied_together(shards, reference, tmp_path):
    """As `rsync -a` of each node's folder into one: only the plan is in all of them, and it is equal."""
    out = tmp_path / "store"
    for index in range(3):
        node = tmp_path / f"node{index}"
        ingest_part(shards / "*.tar", node, f"{index}/3")
        shutil.copytree(node, out, dirs_exist_ok=True)
    assert whole_store(merge(out).path) == whole_store(reference)


def test_same_part_twice_at_once_is_refused_and_other_parts_are_not(shards, tmp_path, capsys):
    out = tmp_path / "store"
    with locked_folder(out, "1/2"):
        line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(out), "--part", "1/2")
        assert f"another train.ingest is writing to part 1/2 of {out}; wait for it" in line
        ingest_part(shards / "*.tar", out, "0/2")
        for flags in (["--merge"], ["--shards", str(shards / "*.tar")]):
            assert f"another train.ingest is writing to {out}; wait" in fails_with(capsys, "--out", str(out), *flags)
    ingest_part(shards / "*.tar", out, "1/2")
    merge(out)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_part_leaves_alone_what_another_part_is_writing(shards, tmp_path):
    out = tmp_path / "store"
    ingest_part(shards / "*.tar", out, "1/2")
    for number in (0, 1):
        (out / f"shards/.0000{number}.17.tmp").mkdir()
        (out / f"shards/.0000{number}.17.spool").touch()
    ingest_part(shards / "*.tar", out, "0/2")
    assert sorted(path.name for path in out.glob("shards/.*")) == [".00001.17.spool", ".00001.17.tmp"]


def test_finished_part_and_merged_store_are_not_done_again(shards, parts, capsys):
    before = {path: path.stat().st_ino for path in parts.rglob("*.mds")}
    ingest_part(shards / "*.tar", parts, "0/2")
    assert {path: path.stat().st_ino for path in parts.rglob("*.mds")} == before
    merge(parts)
    capsys.readouterr()
    merge(parts)
    assert "kept 50 pairs, rejected 0, already complete" in capsys.readouterr().out
    ingest_part(shards / "*.tar", parts, "1/2")
    assert f"{parts} is already complete: all parts are merged" in capsys.readouterr().out


def test_a_single_ingest_finishes_what_parts_began(shards, reference, tmp_path):
    ingest_part(shards / "*.tar", tmp_path / "store", "1/3")
    assert whole_store(ingest(shards / "*.tar", tmp_path / "store").path) == whole_store(reference)


def test_merge_checks_shards_and_flags_that_it_is_given(shards, parts, capsys):
    line = fails_with(capsys, "--out", str(parts), "--merge", "--shards", str(shards / "0000{0,1}.tar"))
    assert "was started with other --shards" in line
    line = fails_with(capsys, "--out", str(parts), "--merge", "--shard-size-mib", "7")
    assert "was started with --shard-size-mib 64, now it is 7" in line
    assert len(merge(parts, "--shards", str(shards / "*.tar"))) == 50


@pytest.mark.parametrize("step", ["write_rejected", "number_all", "write_ledger", "write_index", "write_manifest"])
def test_merge_that_dies_is_finished_by_the_next(reference, parts, monkeypatch, step):
    import train.ingest.finish as finish

    def die(*arguments, **fields):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, step, die)
    with pytest.raises(KeyboardInterrupt):
        merge(parts)
    monkeypatch.undo()
    assert whole_store(merge(parts).path) == whole_store(reference)


def test_merge_that_dies_between_two_fragments_numbers_the_rest(reference, parts, monkeypatch):
    import train.ingest.numbering as numbering

    number_file, calls = numbering.number_file, []

    def die_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        number_file(*arguments)

    monkeypatch.setattr(numbering, "number_file", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge(parts)
    monkeypatch.undo()
    assert whole_store(merge(parts).path) == whole_store(reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "--part is '3', it has to be i/n, as 0/8, 1/8, ... 7/8"),
        ("8/8", "--part is 8/8: parts are counted from 0, so it has to be 0/8 to 7/8"),
        ("0/0", "--part is 0/0: parts are counted from 0, so it has to be 0/1"),
        ("-1/4", "--part is '-1/4', it has to be i/n"),
        ("a/b", "--part is 'a/b'"),
    ],
)
def test_wrong_parts_are_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_part(text)
    assert parse_part("7/8") == Part(7, 8)


def test_flags_that_exclude_each_other_are_refused(shards, tmp_path, capsys):
    flags = ["--shards", str(shards / "*.tar"), "--out", str(tmp_path / "s")]
    line = fails_with(capsys, *flags, "--part", "0/2", "--merge")
    assert "--part and --merge exclude each other; give --merge alone, when all parts are done" in line
    assert "--dry-run and --merge exclude each other" in fails_with(capsys, *flags, "--dry-run", "--merge")
    assert "--shards is missing: the tars to ingest" in fails_with(capsys, "--out", str(tmp_path / "s"))
    assert "--out is missing: the folder of the PairStore" in fails_with(capsys, "--shards", str(shards / "*.tar"))
    assert not (tmp_path / "s").exists()
