"""What rank 0 and another rank say to each other, over two connections that only they have.

    steps       ◄── Assignment    Ready, or the error that loading ended with ──►    ◄── Step, Step, ...
    variants    ◄── Bind or Weight    their answer, before the next one is asked ──►

Both ends trust each other: messages are pickled. When rank 0 is gone both connections end, and so does the other rank.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Literal

from adapters.load_plan import LoadPlan
from delta.variant_terms import VariantTerms
from model_worker.engine.config import EngineConfig
from model_worker.engine.step_batch import StepBatch


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a rank is.

    Attributes:
        rank, num_ranks: among all.
        port: of the store where they meet.
        device: where it computes.
        plan, config: the model, as rank 0 loads it.
    """

    rank: int
    num_ranks: int
    port: int
    device: str
    plan: LoadPlan
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""


@dataclass(frozen=True, slots=True)
class Step:
    """To be computed.

    Attributes:
        variants: for the numbers of the batch's variants, those under which they were bound.
        dropped: variants that nobody needs any more.
    """

    batch: StepBatch
    variants: Mapping[int, int]
    dropped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bind:
    """A variant is to be kept under a number; answered by its bytes, or the RootgraftError that keeps it from that.

    Attributes:
        terms: what this rank has of it.
    """

    number: int
    terms: VariantTerms
    dropped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """This rank's share of a weight or bias of the base is wanted; answered by a tensor, None (there is none), or the
    RootgraftError that keeps it from that.
    """

    module: str
    kind: Literal["weight", "bias"]


def send(channels: Iterable[Connection], message: object) -> None:
    """`recv` of their other ends receives it.

    Raises:
        OSError: an end is gone.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
    for channel in channels:
        channel.send_bytes(buffer.getbuffer())


class _Pickler(pickle.Pickler):
    """Knows read-only mappings too, which plans have."""

    def reducer_override(self, obj: Any) -> Any:
        return (_read_only, (dict(obj),)) if isinstance(obj, MappingProxyType) else NotImplemented


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)
