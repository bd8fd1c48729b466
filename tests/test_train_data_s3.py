"""A PairStore read from S3: a server of that protocol on loopback (moto's, over real sockets), which goes away and comes back."""

import socket
import threading

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mining.remote_folder import RetryPolicy
from tests.tar_shards import image_bytes, ingest, sample, wait_until, write_tar
from train.data.pair_store import PairStore

SHARDS = range(3)
PATIENT = RetryPolicy(patience_s=60, first_pause_s=0.2, longest_pause_s=0.5)
QUICK = RetryPolicy(patience_s=0.3, first_pause_s=0.1)
BUCKET = "pairs"


class S3Server:
    """Objects stay in this process, so that they are there again after the port was closed for a while."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.open()

    def open(self) -> None:
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.moto.start()

    def close(self) -> None:
        self.moto.stop()
        # Else the system would still accept connections for a server that never answers.
        self.moto._server.server_close()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    for shard in SHARDS:
        pairs = [sample(f"{shard}{n}", f"picture {shard} {n}", image_bytes(3 * shard + n)) for n in range(3)]
        write_tar(folder / f"{shard}.tar", [member for pair in pairs for member in pair])
    return ingest(folder / "*.tar", folder / "store")


@pytest.fixture(scope="module")
def server(local):
    """The store's files under s3://pairs/data/cc12m."""
    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "tester")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("S3_ENDPOINT_URL", server.url)
        client = boto3.client("s3", endpoint_url=server.url)
        client.create_bucket(Bucket=BUCKET)
        for path in local.path.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"data/cc12m/{path.relative_to(local.path)}")
        yield server
        server.close()


@pytest.mark.slow
def test_store_in_s3_is_read_and_waits_for_a_server_that_comes_back(local, server, tmp_path, caplog):
    store = PairStore.open(f"s3://{BUCKET}/data/cc12m", cache=tmp_path / "cache", retry=PATIENT)
    assert store[0] == local[0]
    assert len(list((tmp_path / "cache/shards").rglob("*.mds"))) == 1
    server.close()

    def come_back() -> None:
        wait_until(lambda: "trying again in" in caplog.text, 60)
        server.open()

    returning = threading.Thread(target=come_back)
    returning.start()
    assert store[8] == local[8]
    returning.join()
    assert "shards/00002/shard.00000.mds could not be fetched (EndpointConnectionError" in caplog.text
    assert "trying again in" in caplog.text
    assert list(store) == list(local)
    assert store.fingerprint == local.fingerprint
    assert list((tmp_path / "cache/.downloads").iterdir()) == []


def test_what_s3_does_not_hold_is_an_error_at_once(server, tmp_path):
    patient = RetryPolicy(patience_s=30, first_pause_s=20)
    with pytest.raises(
        ValueError, match=r"s3://pairs/elsewhere/manifest\.json could not be fetched.*check the address"
    ):
        PairStore.open(f"s3://{BUCKET}/elsewhere", cache=tmp_path / "a", retry=patient)
    with pytest.raises(
        ValueError, match=r"s3://no-such-bucket/x/manifest\.json could not be fetched.*check the address"
    ):
        PairStore.open("s3://no-such-bucket/x", cache=tmp_path / "b", retry=patient)


def test_server_that_stays_away_is_an_error_that_says_what_is_kept(server, tmp_path):
    server.close()
    try:
        with pytest.raises(ValueError, match=r"could not be fetched: EndpointConnectionError.* is kept"):
            PairStore.open(f"s3://{BUCKET}/data/cc12m", cache=tmp_path / "cache", retry=QUICK)
    finally:
        server.open()
