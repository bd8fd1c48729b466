"""What ranks tell each other outside of collectives: lines of JSON over TCP, every rank to a hub in rank 0's process.

A connection outlives nothing: the kernel closes it when a rank is killed, and the hub knows at once which. Nothing here is on the path of a
step; a rank says where it is every few seconds, and everything else is said once.

A rank says: hello, beat (where it is), stop (it was told to), at (the step it has begun, holding there), failed, bye.
The hub says: beat, hold, stop_after (a step), down (another rank failed first, or this one did), leave.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mining.stopping import EXIT_STOPPED
from train.supervision.watchdog import EXIT_HANG, Place, beat_pause_s, hang_report

SEND_TIMEOUT_S = 5.0
TICK_S = 0.25
# A mistake is mostly everybody's: rank 0 is to say it.
MISTAKE_WAIT_S = 1.0
# The first rank that failed has so long to say why, then the others end without it.
LAST_WORDS_S = 5.0


class Line:
    """One end of a connection that carries one JSON object a line. Any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lock, self._rest = threading.Lock(), b""

    def send(self, kind: str, **message: Any) -> bool:
        """False when the other side is gone."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps({"kind": kind, **message}).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, for a socket that is ready; None when the other side is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            # No rank: somebody who tries ports.
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()


@dataclass
class Peer:
    """A rank as the hub knows it."""

    rank: int
    line: Line
    host: str
    process: int
    heard_s: float
    place: Place | None = None
    begun: int | None = None
    has_left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


@dataclass
class Failure:
    rank: int
    code: int
    text: str
    is_said: bool
    """the rank says it itself"""


@dataclass
class Agreement:
    """On the step after which all ranks stop: the last one that any has begun, so that none is left alone in a collective."""

    reason: str
    step: int | None = None


@dataclass
class Hub:
    """Rank 0's thread that hears all ranks. `listener` is bound already; `token` keeps strangers out."""

    listener: socket.socket
    world_size: int
    token: int
    hang_timeout_s: float
    saves: bool
    peers: dict[int, Peer] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    verdict: Failure | None = None
    agreement: Agreement | None = None

    def __post_init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.decide_at_s, self.leave_at_s, self.beat_at_s = 0.0, float("inf"), 0.0
        self.closing = threading.Event()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._serve, name="control hub", daemon=True)
        self.thread.start()

    def leave(self) -> None:
        self.closing.set()
        self.thread.join()
        for peer in self.peers.values():
            peer.line.send("bye")
        self.close()

    def close(self) -> None:
        """Also in a forked child, which has the sockets and not the thread."""
        for end in (*(peer.line for peer in self.peers.values()), self.listener, self.selector):
            end.close()

    def _serve(self) -> None:
        while not self.closing.is_set():
            for key, _ in self.selector.select(TICK_S):
                if key.fileobj is self.listener:
                    line = Line(self.listener.accept()[0])
                    self.selector.register(line.socket, selectors.EVENT_READ, line)
                else:
                    self._hear(key.data)
            self._look_around(time.monotonic())

    def _hear(self, line: Line) -> None:
        messages = line.receive()
        peer = next((peer for peer in self.peers.values() if peer.line is line), None)
        for message in messages or []:
            if peer is None:
                peer = self._welcome(line, message)
                if peer is None:
                    messages = None
                    break
            peer.heard_s = time.monotonic()
            self._take(peer, message)
        if messages is None:
            self.selector.unregister(line.socket)
            line.close()
            if peer and not peer.has_left:
                self._gone(peer)

    def _welcome(self, line: Line, message: dict[str, Any]) -> Peer | None:
        if message.get("token") != self.token:
            return None
        peer = Peer(message["rank"], line, message["host"], message["process"], time.monotonic())
        self.peers[peer.rank] = peer
        if self.agreement and self.saves:
            line.send("hold")
        return peer

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat":
            peer.place = Place(**message["place"])
        elif kind == "bye":
            peer.has_left = True
        elif kind == "stop":
            self._stop(f"{message['reason']} at {peer}")
        elif kind == "at":
            peer.begun = message["begun"]
            self._agree()
        elif kind == "failed":
            self.failures.append(Failure(peer.rank, message["code"], message["text"], is_said=True))
            if not message["is_mistake"] or peer.rank == 0:
                self.decide_at_s = 0.0
            elif len(self.failures) == 1:
                self.decide_at_s = time.monotonic() + MISTAKE_WAIT_S

    def _stop(self, reason: str) -> None:
        if self.agreement or self.verdict or self.failures:
            return
        self.agreement = Agreement(reason)
        if self.saves:
            self._tell_all("hold")
        else:
            self._decide(
                Failure(-1, EXIT_STOPPED, f"stopped ({reason}); what is done is kept, the same command goes on", False)
            )

    def _agree(self) -> None:
        here = [peer for peer in self.peers.values() if not peer.has_left]
        if len(self.peers) < self.world_size:
            return
        if self.agreement and self.agreement.step is None and all(peer.begun is not None for peer in here):
            self.agreement.step = max((peer.begun for peer in here), default=0)
            self._tell_all("stop_after", step=self.agreement.step, reason=self.agreement.reason)

    def _gone(self, peer: Peer) -> None:
        peer.has_left = True
        if self.verdict:
            if peer.rank == self.verdict.rank:
                self.leave_at_s = 0.0
            return
        where = f", last seen in {peer.place}" if peer.place else ""
        text = f"{peer} is gone without a word{where}; killed, or out of memory? Its node's kernel log tells"
        self._decide(Failure(peer.rank, 1, text, is_said=False))

    def _look_around(self, now_s: float) -> None:
        if self.failures and not self.verdict and now_s >= self.decide_at_s:
            self._decide(min(self.failures, key=lambda failure: failure.rank != 0))
        if self.verdict:
            if now_s >= self.leave_at_s:
                self._tell_all("leave", code=self.verdict.code)
                self.leave_at_s = float("inf")
            return
        if now_s >= self.beat_at_s:
            self.beat_at_s = now_s + beat_pause_s(self.hang_timeout_s)
            self._tell_all("beat")
        places = {str(peer): (peer.place, now_s - peer.heard_s) for peer in self.peers.values() if not peer.has_left}
        report = hang_report(places, self.hang_timeout_s)
        if report:
            silent = [peer for peer in self.peers.values() if str(peer) in report.silent]
            self._decide(
                Failure(-1, EXIT_HANG, report.text, is_said=False), kill=[[peer.host, peer.process] for peer in silent]
            )

    def _decide(self, failure: Failure, kill: Sequence[Sequence[Any]] = ()) -> None:
        """The reason why the job ends, said once: by the rank itself when it can."""
        self.verdict = failure
        if not failure.is_said:
            os.write(2, f"\n{failure.text}\n".encode())
        for peer in self.peers.values():
            peer.line.send("down", code=failure.code, is_first=peer.rank == failure.rank, kill=list(kill))
        self.leave_at_s = time.monotonic() + LAST_WORDS_S if failure.is_said else 0.0

    def _tell_all(self, kind: str, **message: Any) -> None:
        for peer in self.peers.values():
            if not peer.has_left:
                peer.line.send(kind, **message)
