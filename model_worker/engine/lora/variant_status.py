"""What there is to say of a variant: a snapshot for operators, routers and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VariantState = Literal["registered", "on_disk", "in_host_memory", "active", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class VariantStatus:
    """The fields are those of the message of this name (controller/protocol.py), which says what they mean.

    Counters (`*_total`) only grow as long as the engine keeps the variant. `active_bytes` come on top of `host_bytes`:
    none where the model computes in host memory.
    """

    name: str
    parent: str
    digest: str | None
    path: str
    state: VariantState
    pinned: bool
    from_command_line: bool
    rank: int
    host_bytes: int
    active_bytes: int
    num_running: int
    num_waiting: int
    loads_total: int
    load_s_total: float
    activations_total: int
    evictions_total: int
    hits_total: int
    requests_total: int
    generation_tokens_total: int
    error: str | None
