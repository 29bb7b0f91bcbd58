"""What a variant in memory is worth, and which ones go when there is no room. Pure Python; no torch, no own clock.

    value(v) = (rate(v) + num_waiting(v) / 1 s) * reload_s(v) / num_bytes(v)

is the time per second and byte that is saved by keeping v: how often it is asked for, times what each time costs if it
is not there. A request that waits counts as one a second, so that what is certain goes before what is likely. This is
the greedy-dual rule with frequencies that fade (Cao and Irani, USITS'97; Arlitt et al., 2000), without its inflation
clock, whose work the fading does. The same code is compared with Belady's optimum in benchmarks/residency.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

_MEMORY_S = 1800.0  # a request counts for 1/e of its weight after so long
_MIN_RELOAD_S = 1e-4  # below the resolution of what is measured: a variant that costs nothing is still worth its rate

K = TypeVar("K")


class RequestRate:
    """Requests per second, of which older ones count less:  rate(t) = sum over requests i of exp((t_i - t) / T) / T."""

    __slots__ = ("_memory_s", "_rate", "_since_s")

    def __init__(self, memory_s: float = _MEMORY_S) -> None:
        self._memory_s = memory_s
        self._rate = 0.0
        self._since_s = 0.0

    def observe(self, now_s: float) -> None:
        """A request came."""
        self._rate = self.at(now_s) + 1 / self._memory_s
        self._since_s = now_s

    def at(self, now_s: float) -> float:
        return self._rate * math.exp((self._since_s - now_s) / self._memory_s)


def value_of_keeping(*, rate: float, num_waiting: int, reload_s: float, num_bytes: int) -> float:
    """Seconds saved per second and byte.

    Args:
        rate: requests per second.
        num_waiting: requests that wait for it now.
        reload_s: what bringing it back takes.
        num_bytes: that it occupies.
    """
    return (rate + num_waiting) * max(reload_s, _MIN_RELOAD_S) / max(1, num_bytes)


class Resident(NamedTuple, Generic[K]):
    """Something in memory that may go.

    Attributes:
        value: of keeping it.
        order: decides between equal values: the lower one goes first.
        num_bytes: that become free.
    """

    key: K
    value: float
    order: int
    num_bytes: int


def choose_victims(residents: Iterable[Resident[K]], *, num_places: int, num_bytes: int) -> list[K] | None:
    """The ones of least value that together free so many places and bytes; None: all of them do not.

    Those of the chosen that turn out not to be needed stay, the most valuable first.
    """
    if num_places <= 0 and num_bytes <= 0:
        return []
    chosen: list[Resident[K]] = []
    for resident in sorted(residents, key=lambda resident: resident[1:3]):
        if num_places <= 0 and num_bytes <= 0:
            break
        chosen.append(resident)
        num_places -= 1
        num_bytes -= resident.num_bytes
    if num_places > 0 or num_bytes > 0:
        return None
    for resident in reversed(chosen.copy()):
        if num_places < 0 and num_bytes + resident.num_bytes <= 0:
            chosen.remove(resident)
            num_places += 1
            num_bytes += resident.num_bytes
    return [resident.key for resident in chosen]
