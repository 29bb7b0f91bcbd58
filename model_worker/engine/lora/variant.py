"""What a sequence knows of the fine-tune that computes it. Pure Python; no torch."""

from __future__ import annotations

from typing import Protocol


class Bound(Protocol):
    """What has to be known of a `BoundVariant` beside the model that made it."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_extra_tokens(self) -> int: ...


class Variant:
    """A fine-tune as long as sequences hold it, whatever its name means by then.

    Attributes:
        number: unique in the engine's life; the order of variants in a step.
        digest: identity of its content; "" until it is read for the first time.
        num_extra_tokens: by which its vocabulary is larger than the base's; known once it is read.
        bound: what the model computes with; None while it is not active.
        num_generation_tokens: sampled with it.
    """

    __slots__ = ("bound", "digest", "num_extra_tokens", "num_generation_tokens", "number")

    def __init__(self, number: int, digest: str = "") -> None:
        self.number = number
        self.digest = digest
        self.num_extra_tokens = 0
        self.bound: Bound | None = None
        self.num_generation_tokens = 0
