"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", "K", "M", "B", "T")


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`"""
    return _scaled(num_bytes, 1024, _BYTE_UNITS)


def format_count(count: float) -> str:
    """`134.5 M`"""
    return _scaled(count, 1000, _COUNT_UNITS)


def format_ms(duration_ns: float) -> str:
    """Milliseconds, with three digits that count."""
    ms = duration_ns / 1e6
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def format_share(share: float) -> str:
    return f"{100 * share:.1f} %"


def format_list(texts: Sequence[str], most: int = 4) -> str:
    """The first of them and how many more there are; what repeats is said once, with its count."""
    distinct = [text if texts.count(text) == 1 else f"{text} ×{texts.count(text)}" for text in dict.fromkeys(texts)]
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value /= base
        index += 1
    digits = 0 if index == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {units[index]}".rstrip()
