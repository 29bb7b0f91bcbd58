"""Printing to a reader that may have seen enough, as `head` has after some lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printing() -> Iterator[None]:
    """At its end what was printed within it has reached the reader of stdout; once that has gone, nothing more runs."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter must not flush into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
