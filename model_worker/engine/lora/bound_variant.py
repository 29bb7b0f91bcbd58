"""A variant in the form in which a model computes with it, and the rows of a step that use it."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from delta.variant_terms import VariantTerms


class BoundVariant(Protocol):
    """Made by `CausalModel.bind`; belongs to that model. Its memory is free when nobody holds it any more.

    Attributes:
        num_bytes: of its own memory.
        num_extra_tokens: that it has beyond the base's vocabulary.
    """

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_extra_tokens(self) -> int: ...


class VariantSegment(NamedTuple):
    """Rows [start, end) of a batch use one variant. Rows in no segment are the base's."""

    start: int
    end: int
    variant: BoundVariant


VariantSegments = tuple[VariantSegment, ...]
"""In ascending order, without overlap."""


class VariantBinder(Protocol):
    """What can be asked of a model to read and bind variants for it."""

    @property
    def binds_in_host_memory(self) -> bool:
        """What it computes with is in host memory, so that a variant need be kept there in no other form."""
        ...

    def base_weight(self, module: str) -> Tensor:
        """What the model computes with in a linear layer or embedding, on the host. -> [N, K] or [V, H] float32

        Expert 3 of a parameter that holds all experts is PARAMETER.3. -> [N, K] float32

        Raises:
            KeyError: there is no such module.
        """
        ...

    def base_bias(self, module: str) -> Tensor:
        """The bias of a linear layer that has one. -> [N] float32

        Raises:
            KeyError: there is no such module, or it has no bias.
        """
        ...

    def bind(self, terms: VariantTerms) -> BoundVariant:
        """Put a variant, read for this model, into the form in which it is computed. Any thread may call this.

        Raises:
            UnsupportedModelError: this way of computing the model has no place for one of its terms.
        """
        ...


@runtime_checkable
class VariantHost(VariantBinder, Protocol):
    """A model whose rows can use variants. `context.variants` names the rows of the next call that do."""

    def logits(self, hidden: Tensor, variants: VariantSegments = ()) -> Tensor:
        """hidden [R, hidden], whose rows use `variants` -> [R, vocab_size], until the next call."""
        ...

    def extra_logits(self, hidden: Tensor, variant: BoundVariant) -> Tensor:
        """Of the tokens that a variant has beyond the base's vocabulary. hidden [R, hidden] -> [R, E]"""
        ...
