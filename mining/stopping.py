"""How a program stops when it is told to: SIGTERM or SIGUSR1 (preemption by Slurm, a node that goes down), or a launcher that is gone.

A thread hears of it at once, whatever the main thread waits for. Without more it ends the process with exit code 85: what a program has
written by then is kept, and the same command goes on. `train.supervision.supervisor` puts a checkpoint before that.
"""

import contextlib
import ctypes
import errno
import io
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mining.command_line import NOT_FIRST, run

# "Told to stop, all is kept: run the same command again." Job scripts requeue on it.
EXIT_STOPPED = 85
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Command lines of processes that start ranks and must not be outlived, and of what starts those.
LAUNCHERS = (b"deepspeed.launcher.launch", b"torch.distributed.run", b"torchrun")
LAUNCHERS_PARENTS = (b"deepspeed",)
POLL_S = 1.0
PR_SET_PDEATHSIG = 1
# Those that listen, the innermost last.
_heard: list["_Hearing"] = []
# What a forked child is to let go of: it leaves when its parent does, not when somebody signals the whole tree of processes, and must not
# keep its parent's connections open.
_undone_in_children: dict[int, Callable[[], None]] = {}
_has_fork_hook: list[bool] = []


def leave(reason: str) -> NoReturn:
    """End the process at once with exit code 85."""
    if os.environ.get("RANK", "0") == "0":
        # Not print: the main thread may hold its lock.
        os.write(2, f"\nstopped ({reason}); what is done is kept, the same command goes on\n".encode())
    os._exit(EXIT_STOPPED)


@contextmanager
def hearing_stop(on_stop: Callable[[str], None] = leave) -> Iterator[None]:
    """Inside, `on_stop(reason)` is called from a thread for every stop signal and when the launcher is gone. For the main thread."""
    hearing = _Hearing(on_stop)
    try:
        yield
    finally:
        hearing.close()


def run_stoppable(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> NoReturn:
    """`run` for a program that may be one of several ranks; never returns.

    It ends without waiting for threads and data workers: one that is blocked would keep a rank, and with it the job, from ending.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout, sys.stderr = lasting(1), lasting(2)
    code: int | str | None = 0
    with hearing_stop():
        try:
            run(main, arguments)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            if NOT_FIRST not in getattr(error, "__notes__", []):
                traceback.print_exc()
            code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    end_process(code if isinstance(code, int) else int(code is not None))


class _LastingFile(io.FileIO):
    """Goes on without a reader: when ssh or a launcher is gone, its rank must still save what it has."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def lasting(descriptor: int) -> io.TextIOWrapper:
    """A standard stream that never breaks."""
    file = io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True)


def end_process(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        # A reader that has gone, as in `program | head`.
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def end_with_parent(_worker: int = 0) -> None:
    """Let the kernel kill this process when its parent ends, and nobody else stop it: for data workers, as DataLoader's worker_init_fn.

    Launchers and Slurm signal every process of a job, and a rank without its workers can't get to its next step.
    """
    for number in STOP_SIGNALS:
        # torch has put a handler there, which lets the signal kill.
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_launcher() -> Callable[[], bool]:
    """Have the kernel send SIGTERM when the launcher of this rank dies. Returns: is the launcher, or what started it, gone?

    DeepSpeed's launchers die of a signal without a word to their ranks. A process that no launcher started follows nobody.
    """
    launcher = os.getppid()
    if not _is_one_of(launcher, LAUNCHERS):
        return lambda: False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    above = _parent_of(launcher)
    if above is None or not _is_one_of(above, LAUNCHERS_PARENTS):
        return lambda: os.getppid() != launcher
    return lambda: os.getppid() != launcher or _parent_of(launcher) != above


def undo_in_children(owner: object, undo: Callable[[], None]) -> None:
    """Have `undo` called in every process that is forked from now on, until `keep_in_children(owner)`."""
    _undone_in_children[id(owner)] = undo
    if not _has_fork_hook:
        _has_fork_hook.append(True)
        os.register_at_fork(after_in_child=_undo_all)


def keep_in_children(owner: object) -> None:
    _undone_in_children.pop(id(owner), None)


def _undo_all() -> None:
    while _undone_in_children:
        _undone_in_children.popitem()[1]()


def _is_one_of(process: int, command_lines: Sequence[bytes]) -> bool:
    try:
        command_line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(part in command_line for part in command_lines)


def _parent_of(process: int) -> int | None:
    try:
        # The name, in brackets, may hold anything; the parent is the second field behind it.
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return None


class _Hearing:
    def __init__(self, on_stop: Callable[[str], None]) -> None:
        self.on_stop = on_stop
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        # The interpreter's own C handler writes the signal's number there, though the main thread be deep in a collective.
        self.outer = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.launcher_is_gone = follow_launcher()
        undo_in_children(self, self.forget)
        _heard.append(self)
        self.thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        told = False
        while True:
            ready = select.select([self.reader], [], [], POLL_S)[0]
            received = self.reader.recv(64) if ready else b""
            if ready and not received:
                return
            for number in received:
                if number in STOP_SIGNALS:
                    self.on_stop(signal.Signals(number).name)
            # The innermost answers; signals go to it anyway.
            if not told and _heard[-1:] == [self] and self.launcher_is_gone():
                told = True
                self.on_stop("the launcher is gone")

    def close(self) -> None:
        _heard.remove(self)
        keep_in_children(self)
        signal.set_wakeup_fd(self.outer)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.writer.close()
        if threading.current_thread() is not self.thread:
            self.thread.join()
        self.reader.close()

    def forget(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self.reader.close()
        self.writer.close()
