"""Where adapters come from, and the forms that they take on their way to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model_worker.engine.lora.lora_entry import Held
from model_worker.engine.lora.variant import Bound


class Terms(Protocol):
    """What has to be known of `delta.variant_terms.VariantTerms`."""

    @property
    def digest(self) -> str: ...

    @property
    def max_rank(self) -> int: ...

    @property
    def adds_only(self) -> bool: ...

    @property
    def num_extra_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LoraSource:
    """
        files ──read, compose──► terms ──hold──► in host memory ──bind──► active

    All are called on the loader's thread, but for `bind` where it is only a change of name.

    Attributes:
        read: a directory, strictly, for this base model.
        compose: terms and their scales to one.
        hold: terms to what is kept in host memory.
        bind: that to the form in which the model computes.
        binds_in_place: that is the same.
    """

    read: Callable[[Path], Terms]
    compose: Callable[[Sequence[tuple[Any, float]]], Terms]
    hold: Callable[[Any], Held]
    bind: Callable[[Any], Bound]
    binds_in_place: bool

    @property
    def active_bytes(self) -> int | None:
        """What being active takes beside host memory, where that is the same for all."""
        return 0 if self.binds_in_place else None
