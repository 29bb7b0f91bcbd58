"""A progress bar in bytes with the time left, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from registry.digest import Progress


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Yields a function to be called with the bytes done and all; nothing is shown where stderr is no terminal."""
    with tqdm(desc=description, unit="B", unit_scale=True, unit_divisor=1000, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
