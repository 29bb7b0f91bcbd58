"""What the loader and the model runner need of a model, whichever way it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from adapters.stretches import Stretches
from compression.grouped_weight import GroupedWeight
from model_worker.engine.layers.attention import AttentionLayer, ForwardContext
from model_worker.engine.trace import Traceable


class CausalModel(Traceable, Protocol):
    """A causal language model that computes flat batches.

        build ──► fill, for every tensor of the checkpoint ──► finish ──► (KV cache is given to `attentions`) ──► call

    Attributes:
        context: the step under way; set before each call.
        attentions: one for each layer, in order; known after `finish`.
        ties: parameter name to the name of the parameter that it is.
        fused: name of a weight to the larger one here that it becomes a part of; the others stay weights of their own.
        vocab_size: rows of the output head.
        decoder_prefix: the first part of the names of the decoder's weights; checkpoints of a bare decoder lack it.
        keeps_blocks: quantized blocks of a checkpoint are taken as they are.
        kv_dtypes: types that its keys and values can have; the first is its own.
    """

    context: ForwardContext
    ties: dict[str, str]
    fused: Mapping[str, str]
    keeps_blocks: bool
    kv_dtypes: tuple[str, ...]

    @property
    def attentions(self) -> Sequence[AttentionLayer]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def decoder_prefix(self) -> str: ...

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden], after the final norm, until the next call."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> [R, vocab_size], until the next call."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and meta tensor of all that a checkpoint holds; of tied parameters only the one that owns them."""
        ...

    def is_stored_transposed(self, name: str) -> bool:
        """Checkpoints hold this matrix as [in, out]."""
        ...

    def fill(
        self, name: str, tensor: Tensor | GroupedWeight, *, index: int | None = None, half: int | None = None
    ) -> None:
        """Take a weight, or of a weight [E, 2I, H] or [E, H, I] expert `index`, or its `half` (of 2I).

        The tensor may be mapped from a file; it is not changed. Of a DividedModel it is the share of this rank.
        """
        ...

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        """Whether the filled weight is what this tensor would have made of it."""
        ...

    def finish(self) -> None:
        """After all weights are filled.

        Raises:
            UnsupportedModelError: something was found that would give wrong tokens.
        """
        ...


@runtime_checkable
class DividedModel(Protocol):
    """A CausalModel that may be divided among ranks."""

    def share_of(self, name: str, num_axes: int, *, half: int | None = None) -> Stretches | None:
        """What this rank has of a weight; None: all of it.

        Args:
            num_axes: of the tensor, which is one of a single expert where there are fewer than the weight has.
            half: as in `fill`.
        """
        ...
