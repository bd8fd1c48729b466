"""Around the training loop of every rank: stop together when told to, fail with the first reason, end when something hangs.

Told to stop (SIGTERM, SIGUSR1, a launcher that is gone), a rank tells the hub (control.py). All hold at their next step boundary, the
hub learns which step each has begun, and all go on to the last of these: no rank is left alone in a collective, and no step pays for it
with a collective of its own. A rank that raises says so before its connections break, so that the others' broken connections are no news.
"""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mining.command_line import FIRST_TO_FAIL, NOT_FIRST
from mining.stopping import EXIT_STOPPED, hearing_stop, keep_in_children, undo_in_children
from train.distributed import Ranks, barrier, from_main, is_lost_connection, meeting_address
from train.supervision.control import LAST_WORDS_S, Hub, Line
from train.supervision.phases import Phases
from train.supervision.watchdog import EXIT_HANG, beat_pause_s

MISTAKES = (ValueError, FileNotFoundError)


class Stopped(SystemExit):
    """All ranks stop after the same step, which is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@contextmanager
def supervised(ranks: Ranks, phases: Phases, hang_timeout_s: float, *, saves: bool = True) -> Iterator["Supervisor"]:
    """Supervise the ranks inside. `saves`: the loop asks `stops_after`; else all end at once when told to stop.

    Collective: every rank calls, from its main thread.
    """
    hub = None
    if ranks.is_main:
        host, listener = meeting_address(ranks)
        port, token = from_main(listener.getsockname()[1]), from_main(int.from_bytes(os.urandom(7), "little"))
        hub = Hub(listener, ranks.world_size, token, hang_timeout_s, saves)
    else:
        host = meeting_address(ranks, listens=False)[0]
        port, token = from_main(0), from_main(0)
    supervisor = Supervisor(
        ranks, phases, Line(socket.create_connection((host, port), timeout=60)), token, hang_timeout_s
    )
    barrier()  # the hub knows everybody from here on
    undo_in_children(supervisor, lambda: [end.close() for end in (supervisor, hub) if end])
    try:
        with hearing_stop(supervisor.told_to_stop):
            yield supervisor
    except BaseException as error:
        if supervisor.says_failure(error):
            # The lines stay open: they break when this process ends, having said why, and then the others end.
            raise
        _leave(supervisor, hub)
        raise
    else:
        _leave(supervisor, hub)


def _leave(supervisor: "Supervisor", hub: Hub | None) -> None:
    keep_in_children(supervisor)
    supervisor.leave()
    if hub:
        hub.leave()


class Supervisor:
    """One rank's end of the line to the hub."""

    def __init__(self, ranks: Ranks, phases: Phases, line: Line, token: int, hang_timeout_s: float) -> None:
        self.ranks, self.phases, self.line, self.hang_timeout_s = ranks, phases, line, hang_timeout_s
        self.reading: Callable[[], list[str]] = list
        self.reason = ""
        self._turn = threading.Condition()
        self._begun, self._stop_step, self._holds = -1, None, False
        self._verdict: dict[str, Any] | None = None
        self._hub_heard_s, self._is_leaving = time.monotonic(), False
        self._closing, self._waker = socket.socketpair()
        line.send("hello", rank=ranks.rank, token=token, host=socket.gethostname(), process=os.getpid())
        self._thread = threading.Thread(target=self._listen, name="supervisor", daemon=True)
        self._thread.start()

    def told_to_stop(self, reason: str) -> None:
        self.line.send("stop", reason=reason)

    def stops_after(self, step: int) -> bool:
        """Between two steps: have all agreed that `step` is the last? Then every rank gets the same answer at the same step."""
        with self._turn:
            while self._holds and self._stop_step is None:
                self._turn.wait()
            if self._stop_step is not None and step >= self._stop_step:
                return True
            self._begun = step + 1
            return False

    def says_failure(self, error: BaseException) -> bool:
        """Tell the others, when there are any, why this rank fails. Adds a note to `error`: was it the first?

        Raises SystemExit when `error` is but the echo of another rank's.
        """
        if isinstance(error, Stopped) or self.ranks.world_size == 1:
            return False
        if is_lost_connection(error):
            # Mostly the echo of another rank's failure, which the hub knows or is about to. Should the hub itself be gone, the listening
            # thread says so and ends this process.
            self._wait_for_verdict(LAST_WORDS_S)
        self._is_leaving = True
        if self._verdict is None:
            last_line = f"{type(error).__name__}: {error}".strip()
            is_mistake = isinstance(error, MISTAKES)
            self.line.send("failed", code=2 if is_mistake else 1, text=last_line, is_mistake=is_mistake)
            self._wait_for_verdict(LAST_WORDS_S)
            if self._verdict is None or self._verdict["is_first"]:
                error.add_note(FIRST_TO_FAIL)
                if not is_mistake:
                    print(
                        f"\nrank {self.ranks.rank} failed in {self._place()}: {last_line}", file=sys.stderr, flush=True
                    )
                return True
        error.add_note(NOT_FIRST)
        if is_lost_connection(error):
            raise SystemExit(self._verdict["code"]) from error
        return True

    def leave(self) -> None:
        self._is_leaving = True
        self.line.send("bye")
        self._waker.close()
        self._thread.join()
        self.line.close()

    def close(self) -> None:
        """In a forked child, which has the sockets and not the thread."""
        for end in (self.line, self._waker, self._closing):
            end.close()

    def _wait_for_verdict(self, seconds: float) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._verdict is not None, timeout=seconds)

    def _listen(self) -> None:
        pause_s, hub_is_there = beat_pause_s(self.hang_timeout_s), True
        self._beat()
        while hub_is_there:
            ready = select.select([self.line.socket, self._closing], [], [], pause_s)[0]
            if self._closing in ready:
                break
            if self.line.socket in ready:
                messages = self.line.receive()
                if messages is None:
                    self._lost_hub()
                    break
                for message in messages:
                    hub_is_there &= message["kind"] != "bye"
                    self._take(message)
            self._beat()
        self._closing.close()

    def _beat(self) -> None:
        now_s = time.monotonic()
        self.line.send("beat", place=self._place_now(now_s))
        if now_s - self._hub_heard_s > self.hang_timeout_s:
            self._say(f"hang: rank 0 has given no sign of life for {now_s - self._hub_heard_s:.0f} s, the job ends")
            os._exit(EXIT_HANG)

    def _place_now(self, now_s: float) -> dict[str, Any]:
        now = self.phases.now
        return {
            "phase": now.phase,
            "step": now.step,
            "for_s": now_s - now.since_s,
            "detail": now.detail,
            "reading": self.reading(),
        }

    def _place(self) -> str:
        return f"{self.phases.now.phase} of step {self.phases.now.step}"

    def _take(self, message: dict[str, Any]) -> None:
        self._hub_heard_s = time.monotonic()
        kind = message["kind"]
        with self._turn:
            if kind == "hold":
                self._holds = True
                # Under the lock: the loop can't begin another step between this look and the hold.
                self.line.send("at", begun=self._begun)
            elif kind == "stop_after":
                self._stop_step, self.reason = message["step"], message["reason"]
            elif kind == "down":
                self._verdict = message
            self._turn.notify_all()
        if kind == "leave" and not self._is_leaving:
            self._end_silent_neighbours()
            os._exit(message["code"])

    def _end_silent_neighbours(self) -> None:
        """A stopped process can't end itself, and would keep its launcher waiting."""
        for host, process in self._verdict["kill"] if self._verdict else []:
            if host == socket.gethostname() and process != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, 9)

    def _lost_hub(self) -> None:
        if self._is_leaving:
            return
        if self._verdict is None:
            self._say("rank 0 is gone without a word; killed, or out of memory? Its node's kernel log tells")
        os._exit(self._verdict["code"] if self._verdict else 1)

    def _say(self, text: str) -> None:
        # Not all: but a node of which only some ranks are left is heard as well.
        if self.ranks.rank == 1 or self.ranks.local_rank == 0:
            os.write(2, f"\n{text}\n".encode())
