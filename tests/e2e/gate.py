"""A proxy between two processes at which a test can stop an exchange in the middle, to kill one of them just there."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Side = Literal["request", "reply"]

_REACHED_S = 600.0
_CHUNK_BYTES = 1 << 16


class Hold:
    """The first exchange that fits `pattern` ("METHOD /path …") stops when `after_bytes` of one side have passed."""

    def __init__(self, pattern: str, side: Side, after_bytes: int) -> None:
        self.pattern = re.compile(pattern)
        self.side = side
        self.after_bytes = after_bytes
        self.is_cut = False
        self._reached = threading.Event()
        self._released = threading.Event()

    def wait_reached(self) -> None:
        """Until the exchange stands still; whoever waits for it is in the middle of that step."""
        assert self._reached.wait(_REACHED_S), f"nothing came to {self.pattern.pattern}"

    def release(self) -> None:
        """Let it go on."""
        self._released.set()

    def cut(self) -> None:
        """Break the connection, unless it was let go on before."""
        self.is_cut = not self._released.is_set()
        self._released.set()

    def stand_still(self) -> None:
        self._reached.set()
        self._released.wait()


class Gate:
    """HTTP/1.1 to a port of this machine, one exchange a connection, byte by byte as it comes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._holds: list[Hold] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def hold(self, pattern: str, side: Side = "request", after_bytes: int = 0) -> Iterator[Hold]:
        """Args: as in Hold. What is held at the end is cut."""
        hold = Hold(pattern, side, after_bytes)
        with self._lock:
            self._holds.append(hold)
        try:
            yield hold
        finally:
            with self._lock, suppress(ValueError):
                self._holds.remove(hold)
            hold.cut()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):  # either side broke off, and so the other one sees it
            head = _read_head(client)
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                hold = self._hold_of(head)
                sending = threading.Thread(target=_pass_on, args=(client, server, hold, "request", head), daemon=True)
                sending.start()
                _pass_on(server, client, hold, "reply")

    def _hold_of(self, head: bytes) -> Hold | None:
        line = head.partition(b"\r\n")[0].decode()
        with self._lock:
            found = next((hold for hold in self._holds if hold.pattern.match(line)), None)
            if found is not None:
                self._holds.remove(found)
            return found


def _read_head(client: socket.socket) -> bytes:
    """What has come when all headers have; the exchange is to be the last one of its connection."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(_CHUNK_BYTES)
        if not data:
            raise ConnectionError
        head += data
    head, _, rest = head.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"connection: close"]) + b"\r\n\r\n" + rest


def _pass_on(source: socket.socket, target: socket.socket, hold: Hold | None, side: Side, first: bytes = b"") -> None:
    """Until `source` ends, or either connection breaks; what that side has lost, both have."""
    left = hold.after_bytes if hold is not None and hold.side == side else None
    try:
        data = first or source.recv(_CHUNK_BYTES)
        while data:
            if hold is not None and left is not None and len(data) > left:
                target.sendall(data[:left])
                hold.stand_still()
                if hold.is_cut:
                    break
                data, left = data[left:], None
            target.sendall(data)
            left = None if left is None else left - len(data)
            data = source.recv(_CHUNK_BYTES)
    except OSError:
        pass
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
