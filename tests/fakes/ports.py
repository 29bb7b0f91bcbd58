"""Ports of loopback."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_PORTS = range(23_000, 32_000)  # below those that the system gives to connections, which could take one of them


def free_port() -> int:
    """A port that nobody uses, nor will get by chance before it is used, or while its server is started again."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
