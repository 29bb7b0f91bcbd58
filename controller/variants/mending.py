"""What a worker needs to be told so that it has the variants that the catalog wants. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from controller.protocol import VariantStatus
from registry.catalog import VariantRecord

Step = Literal["add", "remove", "pin", "unpin"]


def next_step(wanted: VariantRecord | None, has: VariantStatus | None) -> Step | None:
    """What brings a worker's variant nearer to what is wanted; None: nothing is to be done.

    A variant that the worker was given on its command line is its own and stays as it is. One that drains is gone for
    new requests; the worker drops it by itself. While nobody knows which files are wanted, the worker is told to add
    what it has already: it reads the files again, and its answer tells their digest.

    Args:
        wanted: None: the catalog has none of that name for the worker's model.
        has: None: the worker has none of that name.
    """
    gone = has is None or has.state == "draining"
    if has is not None and has.from_command_line and not gone:
        return None
    if wanted is None:
        return None if gone else "remove"
    if has is None or gone or has.state == "failed" or wanted.digest is None or not same_files(wanted, has):
        return "add"
    if has.pinned != wanted.pinned:
        return "pin" if wanted.pinned else "unpin"
    return None


def same_files(wanted: VariantRecord, has: VariantStatus) -> bool:
    """As far as is known: digests tell, where both are, for a path can hold other files than it did."""
    if has.digest is None or wanted.digest is None:
        return has.path == wanted.path
    return has.digest == wanted.digest


def to_mend(wanted: Mapping[str, VariantRecord], has: Mapping[str, VariantStatus]) -> list[str]:
    """The names for which there is a step to take, those to be pinned first: they are to be had without waiting.

    Args:
        wanted: by name, those of the worker's models.
        has: by name.
    """
    names = [name for name in {**wanted, **has} if next_step(wanted.get(name), has.get(name)) is not None]
    return sorted(names, key=lambda name: (name not in wanted, name in wanted and not wanted[name].pinned, name))
