"""A real SSH server on loopback that serves one folder by sftp, read-only, in a process of its own that a test may kill.

`python -m tests.sftp_server FOLDER PORT HOST_KEY USER_KEY LOG SECONDS_PER_READ`: every file opened is a line of LOG, and
each read of (mostly) 32 KiB takes SECONDS_PER_READ.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko

ROOT = Path(__file__).resolve().parent.parent


class Login(paramiko.ServerInterface):
    def __init__(self, user_key: paramiko.PKey) -> None:
        self.user_key = user_key

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if key == self.user_key else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


class Folder(paramiko.SFTPServerInterface):
    def __init__(self, server: Login, *, folder: Path, log: Path, seconds_per_read: float) -> None:
        super().__init__(server)
        self.folder, self.log, self.seconds_per_read = folder, log, seconds_per_read

    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(os.stat(self.folder / path.lstrip("/")))
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)

    lstat = stat

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        try:
            file = (self.folder / path.lstrip("/")).open("rb")
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno)
        with open(self.log, "a") as log:
            log.write(path.lstrip("/") + "\n")
        return SlowFile(file, self.seconds_per_read)


class SlowFile(paramiko.SFTPHandle):
    def __init__(self, file: object, seconds_per_read: float) -> None:
        super().__init__()
        self.readfile, self.seconds_per_read = file, seconds_per_read

    def read(self, offset: int, length: int) -> bytes | int:
        time.sleep(self.seconds_per_read)
        return super().read(offset, length)

    def stat(self) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))


def serve(folder: Path, port: int, host_key: Path, user_key: Path, log: Path, seconds_per_read: float) -> None:
    login = Login(paramiko.RSAKey(filename=str(user_key)))
    listener = socket.create_server(("127.0.0.1", port), backlog=16)
    transports = []
    while True:
        connection, _ = listener.accept()
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.RSAKey(filename=str(host_key)))
        transport.set_subsystem_handler(
            "sftp", paramiko.SFTPServer, Folder, folder=folder, log=log, seconds_per_read=seconds_per_read
        )
        threading.Thread(target=transport.start_server, kwargs={"server": login}, daemon=True).start()
        transports.append(transport)


class SftpServer:
    """Starts, kills and restarts that process on one port, and sets what Streaming's sftp driver reads from the environment."""

    def __init__(self, folder: Path, scratch: Path, monkeypatch, *, seconds_per_read: float = 0.0) -> None:
        self.folder, self.scratch, self.seconds_per_read = folder, scratch, seconds_per_read
        for name in ("host", "user"):
            paramiko.RSAKey.generate(2048).write_private_key_file(str(scratch / name))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        host_key = paramiko.RSAKey(filename=str(scratch / "host"))
        (scratch / "known_hosts").write_text(f"[127.0.0.1]:{self.port} ssh-rsa {host_key.get_base64()}\n")
        monkeypatch.setenv("COMPOSER_SFTP_KEY_FILE", str(scratch / "user"))
        monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(scratch / "known_hosts"))
        self.log = scratch / "opened"
        self.log.touch()
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"sftp://tester@127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [
            self.folder,
            self.port,
            self.scratch / "host",
            self.scratch / "user",
            self.log,
            self.seconds_per_read,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sftp_server", *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError("the sftp server did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def opened(self) -> list[str]:
        """The files that clients have opened so far, in order."""
        return self.log.read_text().split()


@contextmanager
def running(server: SftpServer) -> Iterator[SftpServer]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    folder, port, host_key, user_key, log, seconds_per_read = sys.argv[1:]
    serve(Path(folder), int(port), Path(host_key), Path(user_key), Path(log), float(seconds_per_read))
