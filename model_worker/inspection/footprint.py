"""How much memory a model needs in each precision, computed from its config and headers; no weight is read.

    batch(context) = (free - weights - activations) // (KV of one token * context in whole blocks)

int8 and int4 are those of `adapters.quantization`: matrices whose rows are whole groups of 32 in 34 or 20 bytes a
group, embedding and head in 8 bits in either; everything else keeps 16 bits. They and a KV cache of 8 bits are left out
for families that the native decoder does not compute, because no other code computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.gguf_architectures import find_architecture
from adapters.load_plan import LoadPlan
from adapters.memory import estimate_memory
from adapters.model_adapter import find_model_adapter
from adapters.quantization import GROUP_BYTES
from compression.grouped_weight import GROUP, can_quantize
from model_worker.engine.layers.linear import Linear
from model_worker.engine.model_parts import Part, part_of
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.models.transformers_model import TransformersModel


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are kept.

    Attributes:
        name: as on the command line.
        value_bytes: of a value of what is not quantized, and of one of the KV cache and the activations.
        quantization: what matrices are rounded to; None: not rounded.
    """

    name: str
    value_bytes: int
    quantization: str | None = None


PRECISIONS = (
    Precision("float32", 4),
    Precision("bfloat16", 2),
    Precision("float16", 2),
    Precision("int8", 2, "int8"),
    Precision("int4", 2, "int4"),
)
_KV_PRECISIONS: Mapping[str, int] = {"float32": 4, "16 bits": 2, "8 bits": 1}
"""Bytes of one key or value element; scales of 8-bit elements are not counted."""


@dataclass(frozen=True, slots=True)
class PartFootprint:
    """The weights of one part of the model.

    Attributes:
        stored_bytes: in the checkpoint's files; None: its format has no headers.
        bytes_by_precision: in memory.
    """

    part: Part
    num_parameters: int
    stored_bytes: int | None
    bytes_by_precision: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """The largest batch of sequences of `context` tokens that fits; 0: not even one, or not the weights."""

    weights: str
    kv: str
    context: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the model needs and what there is.

    Attributes:
        parts: those that the model has.
        tied_head: the output head is the embedding's matrix, and counted there.
        planned_bytes: weights as they would be loaded, by the estimate of the plan.
        kv_bytes_per_token: by precision of the KV cache, over all layers.
        activation_tokens: tokens of the largest step.
        activations_bytes: of that step; an estimate from above.
        free_bytes: memory that may be taken.
        batches: for each precision of weights and of the KV cache and each context.
    """

    parts: tuple[PartFootprint, ...]
    tied_head: bool
    planned_bytes: int
    kv_bytes_per_token: Mapping[str, int]
    activation_tokens: int
    activations_bytes: int
    free_bytes: int
    batches: tuple[BatchLimit, ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of those that this model can have."""
        return tuple(self.parts[0].bytes_by_precision)

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    def weights_bytes(self, precision: str) -> int:
        return sum(part.bytes_by_precision[precision] for part in self.parts)


def measure_footprint(
    plan: LoadPlan, *, contexts: Sequence[int], block_size: int, max_num_batched_tokens: int, free_bytes: int
) -> Footprint:
    """The footprint of a planned model.

    Args:
        contexts: lengths of sequences to state the largest batch for.
        block_size: tokens of a KV cache block.
        max_num_batched_tokens: tokens of the largest step.
        free_bytes: memory that may be taken.
    """
    # In bfloat16, so that what the family keeps in float32 whatever the precision can be told from the rest.
    model = TransformersModel(
        plan.config, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=plan.max_model_len
    )
    is_native = plan.config["model_type"] in NATIVE_MODEL_TYPES
    precisions = [precision for precision in PRECISIONS if is_native or precision.quantization is None]
    kv_sizes = {name: size for name, size in _KV_PRECISIONS.items() if is_native or size > 1}
    adapter = find_model_adapter(plan.config)
    activations_bytes = estimate_memory(
        plan.checkpoint,
        adapter,
        dtype=plan.dtype,
        stored_dtype=plan.dtype,
        max_num_batched_tokens=max_num_batched_tokens,
    ).activations_bytes
    kv = {name: adapter.kv_values_per_token * size for name, size in kv_sizes.items()}
    parts = _parts(plan, model, precisions)
    weights = {p.name: sum(part.bytes_by_precision[p.name] for part in parts) for p in precisions}
    batches = [
        BatchLimit(
            precision.name,
            kv_name,
            context,
            max(0, free_bytes - weights[precision.name] - activations_bytes)
            // (kv[kv_name] * -(-context // block_size) * block_size),
        )
        for precision in precisions
        for kv_name, size in kv_sizes.items()
        if size in (precision.value_bytes, 1)
        for context in contexts
    ]
    return Footprint(
        parts=parts,
        tied_head=any(part_of(name) is Part.HEAD for name in model.ties),
        planned_bytes=plan.memory.weights_bytes,
        kv_bytes_per_token=kv,
        activation_tokens=max_num_batched_tokens,
        activations_bytes=activations_bytes,
        free_bytes=free_bytes,
        batches=tuple(batches),
    )


def _parts(plan: LoadPlan, model: TransformersModel, precisions: Sequence[Precision]) -> tuple[PartFootprint, ...]:
    stored = _stored_bytes(plan)
    values: dict[Part, int] = {}
    sizes: dict[Part, dict[str, int]] = {}
    for name, weight in model.weights():
        part = part_of(name)
        values[part] = values.get(part, 0) + weight.numel()
        of_part = sizes.setdefault(part, dict.fromkeys((p.name for p in precisions), 0))
        for precision in precisions:
            of_part[precision.name] += _weight_bytes(model, name, weight, precision)
    return tuple(
        PartFootprint(part, values[part], None if stored is None else stored.get(part, 0), sizes[part])
        for part in Part
        if part in values
    )


def _weight_bytes(model: TransformersModel, name: str, weight: Tensor, precision: Precision) -> int:
    if precision.quantization is not None and _can_quantize(model, name, weight):
        in_8_bits = part_of(name) in (Part.EMBEDDING, Part.HEAD)
        return weight.numel() // GROUP * GROUP_BYTES["int8" if in_8_bits else precision.quantization]
    return weight.numel() * max(precision.value_bytes, 4 if weight.dtype == torch.float32 else 0)


def _can_quantize(model: TransformersModel, name: str, weight: Tensor) -> bool:
    """Whether this is a matrix of a linear layer, of the token embedding or of experts, with rows of whole groups."""
    if weight.ndim == 3:
        return part_of(name) is Part.EXPERTS and weight.shape[-1] % GROUP == 0
    module = model.causal_lm.get_submodule(name.rpartition(".")[0])
    is_matrix = isinstance(module, Linear) or module is model.causal_lm.get_input_embeddings()
    return is_matrix and can_quantize(weight.shape)


def _stored_bytes(plan: LoadPlan) -> dict[Part, int] | None:
    """Bytes of each part in the files."""
    checkpoint = plan.checkpoint
    if not checkpoint.tensors:
        return None
    architecture = find_architecture(checkpoint.metadata) if checkpoint.format == "gguf" else None
    stored: dict[Part, int] = {}
    for header in checkpoint.tensors.values():
        name: str | None = header.name
        if architecture is not None:
            translated = architecture.translate(header.name)
            name = None if translated is None else translated[0]
        if name is not None:
            part = part_of(name)
            stored[part] = stored.get(part, 0) + header.num_bytes
    return stored
