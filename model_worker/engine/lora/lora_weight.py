"""How a request names what it wants of a combination of adapters."""

from __future__ import annotations

from typing import NamedTuple


class LoraWeight(NamedTuple):
    """An adapter, by its public name; its update of the base is multiplied by `scale`."""

    name: str
    scale: float = 1.0
