"""The processes of a run tell process 0 every second that they live and how far they are; it tells them when one is lost.

A collective operation waits for ever for a process that does not come. So each process watches, in a thread: one that dies is
noticed when its connection closes, one that is stopped or cut off when it has been silent for `timeout` seconds, one that lives but
does nothing (a file system that hangs, a deadlock) when the others have been ahead of it for `stuck` seconds. All that are left then
say in one line which it was, and end with exit code LOST; what is saved stays as it is.
"""
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Dict, Optional

LOST = 75  # EX_TEMPFAIL: starting again is what helps
BEAT = 1.0  # seconds between signs of life


class _Peer:
    """What is known of another process: the connection, who it is, when it was heard, how often it has moved on and when last."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer = connection, b""
        self.name, self.index, self.step, self.marks = "a process", None, None, 0
        self.heard = self.moved = time.monotonic()

    def hear(self, message: dict) -> None:
        self.heard = time.monotonic()
        self.name, self.index, self.step = message["name"], message["process"], message["step"]
        if message["marks"] != self.marks:
            self.marks, self.moved = message["marks"], self.heard


class RollCall:
    """Process `index` of `count`, which must then `listen` (process 0) or `report_to` it (the others).

    Args:
      timeout: seconds of silence after which a process is lost. stuck: seconds that one may stay behind the others.
    """

    def __init__(self, index: int, count: int, *, timeout: float = 60.0, stuck: Optional[float] = None):
        self.index, self.count, self.timeout, self.stuck = index, count, timeout, stuck or 10 * timeout
        self.name = f"process {index} (host {socket.gethostname()}, pid {os.getpid()})"
        self._marks, self._step, self._moved = 0, None, time.monotonic()
        self._peers: Dict[socket.socket, _Peer] = {}
        self._left, self._lock, self._server, self._hub, self._gone = False, threading.Lock(), None, None, 0

    def mark(self, step: int) -> None:
        """This process has come to `step`; to be called again and again by what may hang."""
        self._marks, self._step, self._moved = self._marks + 1, step, time.monotonic()

    def listen(self) -> int:
        """Start hearing the others; the port to which they report."""
        self._server = socket.create_server(("", 0), family=socket.AF_INET, backlog=self.count)
        self._began = time.monotonic()
        threading.Thread(target=self._hear_all, daemon=True).start()
        return self._server.getsockname()[1]

    def report_to(self, host: str, port: int) -> None:
        """Start reporting; a process 0 that cannot be reached is said, and left to JAX's own heartbeat."""
        try:
            self._hub = socket.create_connection((host, port), timeout=self.timeout)
        except OSError as error:
            print(f"warning: {self.name} cannot reach port {port} of {host} ({error}); lost processes will be noticed late, by JAX alone",
                  file=sys.stderr, flush=True)
            return
        self._tell(self._hub)
        threading.Thread(target=self._report, daemon=True).start()

    def leave(self, reason: Optional[str] = None, code: int = 0) -> None:
        """This process ends, by itself; the others go on without it, or, where there is a reason, end with `code` and say it."""
        with self._lock:
            self._left = True
        if self._hub is not None:
            self._tell(self._hub, left=True, reason=reason, code=code)
        for peer in list(self._peers.values()):
            self._send(peer.connection, {"left": True, "verdict": reason and f"{self.name} stopped: {reason}", "code": code})
        if reason:
            self._let_them_read()

    def wait_for_verdict(self) -> None:
        """Give the watch the time that it takes to say which other process caused a failure here; it ends this process if one did."""
        time.sleep(self.timeout + 2 * BEAT if self._hub is not None or self._peers else 0)

    def _let_them_read(self) -> None:
        """A connection that ends with something unread takes what was sent last with it."""
        if self._peers or self._hub is not None:
            time.sleep(BEAT)

    def _tell(self, connection: socket.socket, **more) -> None:
        self._send(connection, {"process": self.index, "name": self.name, "step": self._step, "marks": self._marks, **more})

    def _send(self, connection: socket.socket, message: dict) -> None:
        try:
            connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the end of a connection is noticed where it is read

    def _end(self, verdict: str, code: int = LOST) -> None:
        with self._lock:
            if self._left:
                return
            self._left = True
        for peer in list(self._peers.values()):
            self._send(peer.connection, {"verdict": verdict, "code": code})
        print(f"\nerror: {verdict}" + ("; process " + str(self.index) + " ends, and the same command goes on from the last checkpoint"
                                     if code == LOST else ""), file=sys.stderr, flush=True)
        if self._peers:
            self._let_them_read()
        os._exit(code)  # the main thread waits in a collective operation that will never end

    def _report(self) -> None:
        """In every process but the first: a sign of life every BEAT, and an ear to process 0."""
        peer, sent = _Peer(self._hub), 0.0
        self._hub.settimeout(BEAT / 2)
        while not self._left:
            if time.monotonic() - sent >= BEAT:
                self._tell(self._hub)
                sent = time.monotonic()
            try:
                data = self._hub.recv(1 << 16)
            except TimeoutError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                return self._end(_died(peer, "process 0"))
            for message in _messages(peer, data or b""):
                if message.get("verdict"):
                    return self._end(message["verdict"], message["code"])
                if message.get("left"):
                    return
                peer.hear(message)
            if time.monotonic() - peer.heard > self.timeout:
                return self._end(_silent(peer, "process 0", self.timeout))

    def _hear_all(self) -> None:
        """In process 0: hear the others, judge, and let them hear."""
        selector = selectors.DefaultSelector()
        selector.register(self._server, selectors.EVENT_READ)
        sent = 0.0
        while not self._left:
            for key, _ in selector.select(BEAT / 2):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    self._peers[connection] = _Peer(connection)
                    self._tell(connection)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                peer = self._peers[key.fileobj]
                try:
                    data = key.fileobj.recv(1 << 16)
                except OSError:
                    data = b""
                for message in _messages(peer, data):
                    peer.hear(message)
                    if message.get("left"):
                        if message["reason"]:
                            return self._end(f"{peer.name} stopped: {message['reason']}", message["code"])
                        selector.unregister(key.fileobj)
                        self._gone += self._peers.pop(key.fileobj, None) is not None
                if data == b"" and key.fileobj in self._peers:
                    return self._end(_died(peer))
            now = time.monotonic()
            if now - sent >= BEAT:
                sent = now
                for peer in self._peers.values():
                    self._tell(peer.connection)
            self._judge(now)

    def _judge(self, now: float) -> None:
        for peer in self._peers.values():
            if now - peer.heard > self.timeout:
                return self._end(_silent(peer, "a process", self.timeout))
        marks = {None: self._marks, **{c: peer.marks for c, peer in self._peers.items()}}
        if now - self._began > self.timeout and len(self._peers) + self._gone < self.count - 1:
            print(f"warning: {self.count - 1 - self._gone - len(self._peers)} of {self.count} processes do not report", file=sys.stderr)
            self._began = float("inf")
        last = min(marks.values())
        behind = [c for c, n in marks.items() if n == last]
        moved = [self._moved if c is None else self._peers[c].moved for c in behind]
        if last < max(marks.values()) and now - max(moved) > self.stuck:
            names = [self.name if c is None else self._peers[c].name for c in behind]
            steps = [self._step if c is None else self._peers[c].step for c in behind]
            self._end(f"{', '.join(names)} has not moved on from step {steps[0]} for {self.stuck:.0f} s, and the others have")


def _messages(peer: _Peer, data: bytes):
    *lines, peer.buffer = (peer.buffer + data).split(b"\n")
    return [json.loads(line) for line in lines]


def _who(peer: _Peer, name: str) -> str:
    return peer.name if peer.index is not None else name


def _died(peer: _Peer, name: str = "a process") -> str:
    return f"{_who(peer, name)} died" + ("" if peer.step is None else f" after step {peer.step}")


def _silent(peer: _Peer, name: str, timeout: float) -> str:
    return f"{_who(peer, name)} has been silent for {timeout:.0f} s" + ("" if peer.step is None else f", since step {peer.step}")
