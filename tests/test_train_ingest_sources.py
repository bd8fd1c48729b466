"""Where shards come from, and what a newcomer gets wrong: paths, servers, commands, folders."""

import http.server
import tarfile
import threading
from functools import partial

import pyarrow.parquet as pq
import pytest

import train.ingest.sources as sources
from tests.tar_shards import (
    fails_with,
    image_bytes,
    ingest,
    sample,
    samples,
    store_bytes,
    write_shards,
    write_tar,
)
from train.data.pair_store import PairStore
from train.ingest.plan import locked_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The store of those shards, one worker."""
    return ingest(shards / "{00000..00004}.tar", tmp_path_factory.mktemp("reference") / "store").path


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the first `breaks` answers stop halfway."""

    breaks = 0
    requests = 0

    def log_message(self, *arguments) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        type(self).requests += 1
        data = source.read()
        if type(self).breaks > 0:
            type(self).breaks -= 1
            outputfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        outputfile.write(data)


@pytest.fixture
def server(shards):
    handler = type("Handler", (Server,), {"breaks": 0, "requests": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(shards))) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}", handler
        listening.shutdown()


def test_shards_are_read_over_http(server, reference, tmp_path):
    url, handler = server
    ingest(url + "/{00000..00004}.tar?signature=1", tmp_path / "store", "--workers", "2")
    assert store_bytes(tmp_path / "store") == store_bytes(reference)
    assert handler.requests == 5
    # A signed URL is another one in every run.
    ingest(url + "/{00000..00004}.tar?signature=2", tmp_path / "store")


def test_transfer_that_breaks_off_is_repeated_not_taken_for_a_torn_tar(server, reference, tmp_path):
    url, handler = server
    handler.breaks = 1
    ingest(url + "/{00000..00004}.tar", tmp_path / "store")
    assert handler.requests == 6
    assert store_bytes(tmp_path / "store") == store_bytes(reference)


def test_shard_that_a_server_does_not_have_is_named_and_the_others_are_kept(server, shards, tmp_path, capsys):
    url, handler = server
    arguments = ["--shards", url + "/0000{0,1,7}.tar", "--out", str(tmp_path / "store")]
    line = fails_with(capsys, *arguments)
    assert f"shard 00007.tar cannot be read after 3 attempts: {url}/00007.tar ended with exit 22 (the server" in line
    assert "(1 of 3 shards failed); finished shards are kept: run the same command again" in line
    assert handler.requests == 2
    write_tar(shards / "00007.tar", samples(["late"]))
    try:
        assert ingest(arguments[1], tmp_path / "store").ledger["key"].to_pylist()[-1] == "late"
        assert handler.requests == 3
    finally:
        (shards / "00007.tar").unlink()


def test_shards_are_read_from_commands(shards, reference, tmp_path):
    ingest(f"pipe:cat {shards}/{{00000..00004}}.tar", tmp_path / "store", "--workers", "2")
    assert store_bytes(tmp_path / "store") == store_bytes(reference)


def test_command_that_fails_names_its_shard(shards, tmp_path, capsys):
    command = f"pipe:head -c 5000 {shards}/00002.tar; exit 3"
    line = fails_with(capsys, "--shards", command, "--out", str(tmp_path / "store"))
    assert "shard 00002.tar cannot be read after 3 attempts" in line
    assert "exit 3" in line
    assert not list((tmp_path / "store" / "shards").iterdir())


def test_equal_basenames_are_told_apart_by_their_folders(tmp_path):
    for folder in ("a", "b/c"):
        write_tar(tmp_path / "x" / folder / "0.tar", samples(["key"]))
    store = ingest(tmp_path / "x/**/0.tar", tmp_path / "store")
    assert store.ledger["shard"].to_pylist() == ["a/0.tar", "b/c/0.tar"]
    assert store.ledger["key"].to_pylist() == ["key", "key"]


def test_shard_names_of_commands_and_urls_are_those_of_their_tars():
    urls = ["pipe:aws s3 cp s3://bucket/x/1.tar -", "http://host/y/2.tar?a=b/c", "/data/3.tgz", "pipe:make | head"]
    assert sources.shard_names(urls) == ["1.tar", "2.tar", "3.tgz", "make | head"]
    assert sources.shard_names(["pipe:curl 'http://h/a/1.tar?x'", "http://h/b/1.tar"]) == ["a/1.tar", "b/1.tar"]
    with pytest.raises(ValueError, match=r"would both be called 1\.tar; give them different file names"):
        sources.shard_names(["pipe:cat /a/1.tar", "pipe:zcat /a/1.tar"])


def test_file_urls_and_joined_patterns_are_understood(shards):
    found = sources.expand_shards([f"file:{shards}/00000.tar::{shards}/0000{{1,2}}.tar", str(shards / "*2.tar")])
    assert [source.name for source in found] == ["00000.tar", "00001.tar", "00002.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{shards}/{{00000..00009}}.tar", "shard {shards}/00005.tar does not exist; check the range"),
        ("{shards}/nothing-*.tar", "no shards match --shards '{shards}/nothing-*.tar'; give paths such as"),
        ("{shards}", "{shards} is a folder; give its shards, for example '{shards}/*.tar'"),
        ("s3://bucket/0.tar", "s3:// is not a known scheme; use http(s):// or 'pipe:COMMAND'"),
        ("-", "names no file"),
        ("{shards}/${{HOME}}.tar", "cannot be expanded"),
    ],
)
def test_wrong_shards_give_one_line_and_no_folder(shards, tmp_path, capsys, pattern, message):
    line = fails_with(capsys, "--shards", pattern.format(shards=shards), "--out", str(tmp_path / "store"))
    assert message.format(shards=shards) in line
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers is 0, it has to be at least 1"),
        (["--max-pixels", "-3"], "--max-pixels is -3, it has to be at least 1"),
        (["--shard-size-mib", "4096"], "--shard-size-mib is 4096, it has to be 1 to 2048"),
        (["--worker", "3"], "does not know --worker; did you mean --workers?"),
    ],
)
def test_wrong_flags_give_one_line(shards, tmp_path, capsys, flags, message):
    assert message in fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path / "store"), *flags)
    assert not (tmp_path / "store").exists()


def test_folder_of_something_else_is_refused_and_left_alone(shards, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path))
    assert f"--out {tmp_path} is not empty and holds no ingest; give another --out" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path / "thesis.txt"))
    assert "thesis.txt cannot be written" in line


def test_second_ingest_into_the_same_folder_is_refused(shards, tmp_path, capsys):
    with locked_folder(tmp_path):
        line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path))
    assert f"another train.ingest is writing to {tmp_path}; wait for it, or give another --out" in line


def test_shard_that_changed_since_the_start_is_refused(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", samples(["a"]))
    ingest(tmp_path / "0.tar", tmp_path / "store")
    write_tar(tmp_path / "0.tar", sample("a", image=image_bytes(1, "PNG", (99, 99))))
    line = fails_with(capsys, "--shards", str(tmp_path / "0.tar"), "--out", str(tmp_path / "store"))
    assert "0.tar has 40960 bytes, it had 10240 when" in line
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other/0.tar", samples(["a"]))
    line = fails_with(capsys, "--shards", str(tmp_path / "other/0.tar"), "--out", str(tmp_path / "store"))
    assert "was started with 0.tar from another place" in line


def test_input_of_which_nothing_is_left_is_an_error_that_says_why(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [*sample("a", " "), *sample("b", image=b"x"), *sample("c", "")])
    out = tmp_path / "store"
    for _ in range(2):
        line = fails_with(capsys, "--shards", str(tmp_path / "0.tar"), "--out", str(out))
        assert (
            f"every sample was rejected (empty caption 2, undecodable image 1); {out}/rejected.parquet says why" in line
        )
        assert pq.read_table(out / "rejected.parquet")["key"].to_pylist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no complete PairStore"):
        PairStore.open(out)


def test_tar_without_samples_is_an_error_that_says_how_members_are_called(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
    line = fails_with(capsys, "--shards", str(tmp_path / "0.tar"), "--out", str(tmp_path / "store"))
    assert "no sample in 1 shards; members are to be called KEY.jpg, KEY.txt, KEY.json" in line
