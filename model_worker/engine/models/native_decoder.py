"""Our own decoder for the Llama-shaped families, as one program of fused operations (native_operations.py draws it).

The hidden states x stay float32 from the first operation to the last, whatever the weights are; so do all sums. Every
row is computed alike whatever its neighbours are, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compression.grouped_weight import GroupedWeight
from delta.variant_terms import VariantTerms
from model_worker.engine.layers.attention import ForwardContext, KVShape
from model_worker.engine.lora.bound_variant import BoundVariant, VariantSegments
from model_worker.engine.models.decoder_fusions import decoder_fusions
from model_worker.engine.models.decoder_parameters import EMBEDDING, HEAD, parameter_shapes
from model_worker.engine.models.decoder_spec import DecoderSpec, read_spec
from model_worker.engine.models.native_attention import KV_FORMATS, NativeAttention
from model_worker.engine.models.native_operations import NativeOperations
from model_worker.engine.models.native_trace import Runner, TracedRun, run_plainly
from model_worker.engine.models.native_variants import NativeVariants
from model_worker.engine.models.native_weights import NativeWeights
from model_worker.engine.ops.cpu.program import Program, Step, Team, new_buffer
from model_worker.engine.ops.cpu.step_variants import PackedVariant, StepVariants
from model_worker.engine.trace import TraceRow

_MAX_LOGIT_ROWS = 64  # rows of logits that are computed at once: their buffer has vocab_size columns


class NativeDecoder:
    """A causal language model that computes flat batches on the CPU's kernels.

    Args:
        config: of the model, with `model_type`.
        dtype: of weights that are not quantized.
        quantization: int8, int4, or None: as the checkpoint has them.
        max_model_len: most positions that will ever be used.
        max_rows: most tokens of one step.
        team: threads and kernels.

    Attributes:
        context: the step under way; set before each call.
        attentions: one for each layer, in order.
        ties: parameter name to the name of the parameter that it is.
        fused: name of a weight to the larger one that it becomes a part of.

    Raises:
        UnsupportedModelError: the model is not of this shape.
        CheckpointError: its config holds a value that it cannot have.
    """

    decoder_prefix = "model"
    keeps_blocks = True

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        quantization: str | None,
        max_model_len: int,
        max_rows: int,
        team: Team,
    ) -> None:
        self.spec: DecoderSpec = read_spec(config, max_model_len)
        own = str(dtype).removeprefix("torch.")
        self.kv_dtypes = (own, *(name for name in KV_FORMATS if name != own))
        self.context = ForwardContext()
        self.ties: dict[str, str] = {HEAD: EMBEDDING} if self.spec.tied_head else {}
        self._parameters = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in parameter_shapes(self.spec).items()
        }
        self._max_rows = max_rows
        self._team = team
        fusions = decoder_fusions(self.spec)
        self._weights = NativeWeights(
            fusions,
            dtype=dtype,
            quantization=quantization,
            wide_keys=frozenset({"embedding", "head"}),
            dense_keys=frozenset(f"layers.{i}.router" for i in range(len(self.spec.layers))),
            team=team,
        )
        self.fused: Mapping[str, str] = self._weights.fused
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._variants = NativeVariants(
            fusions, shapes, dtype=dtype, embedding=EMBEDDING, head=HEAD, num_threads=team.num_threads
        )
        self.attentions = [
            NativeAttention(layer.attention, KVShape(self.spec.num_kv_heads, self.spec.head_dim, self.spec.head_dim))
            for layer in self.spec.layers
        ]
        self._operations = NativeOperations(
            self.spec, self._weights, self.attentions, max_rows=max_rows, level=team.library.level
        )
        self._run: Runner = run_plainly
        self._hidden = new_buffer(max_rows, self.spec.hidden_size)
        self._head_rows = new_buffer(_MAX_LOGIT_ROWS, self.spec.hidden_size)
        self._logits = new_buffer(_MAX_LOGIT_ROWS, self.spec.vocab_size)

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden] after the final norm, until the next call."""
        assert len(input_ids) <= self._max_rows, "the step is larger than the buffers"
        variants = self._variants.plan(
            self.context.variants, first_row=0, num_rows=len(input_ids), rows_per_token=self._rows_per_token
        )
        self._run(self._decoder if variants is None else self._variant_decoder, self._step(input_ids, variants))
        return self._hidden[: len(input_ids)]

    def logits(self, hidden: Tensor, variants: VariantSegments = ()) -> Tensor:
        """hidden [R, hidden] -> [R, vocab_size] float32; up to 64 rows are valid until the next call."""
        pieces: list[Tensor] = []
        for i, rows in enumerate(torch.split(hidden, _MAX_LOGIT_ROWS)):
            self._head_rows[: len(rows)] = rows
            plan = self._variants.plan(variants, first_row=i * _MAX_LOGIT_ROWS, num_rows=len(rows))
            self._run(self._head if plan is None else self._variant_head, Step.of_rows(len(rows), plan))
            logits = self._capped(self._logits[: len(rows)])
            pieces.append(logits if len(rows) == len(hidden) else logits.clone())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def extra_logits(self, hidden: Tensor, variant: BoundVariant) -> Tensor:
        """See `VariantHost.extra_logits`."""
        assert isinstance(variant, PackedVariant)
        assert variant.extra_head is not None
        return self._capped(variant.extra_head(hidden).div_(self.spec.logits_divisor))

    def _capped(self, logits: Tensor) -> Tensor:
        """In place."""
        if (cap := self.spec.logits_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    @contextmanager
    def trace(self) -> Iterator[list[TraceRow]]:
        """See `Traceable.trace`."""
        traced = TracedRun()
        self._run = traced
        try:
            yield traced.rows
        finally:
            self._run = run_plainly

    # ------------------------------------------------------------------------------------------ variants

    def base_weight(self, module: str) -> Tensor:
        """See `VariantHost.base_weight`."""
        parameter, _, last = module.rpartition(".")
        if last.isdecimal() and parameter in self._parameters:
            return self._weights.unpack_expert(parameter, int(last), len(self._parameters[parameter][0]))
        name = f"{module}.weight"
        name = self.ties.get(name, name)
        if self._parameters[name].ndim != 2:
            raise KeyError(module)
        return self._unpacked(name)

    def base_bias(self, module: str) -> Tensor:
        """See `VariantHost.base_bias`."""
        if self._parameters[f"{module}.weight"].ndim != 2:
            raise KeyError(module)
        return self._unpacked(f"{module}.bias")

    def _unpacked(self, name: str) -> Tensor:
        return self._weights.unpack(name, {part: len(tensor) for part, tensor in self._parameters.items()})

    @property
    def binds_in_host_memory(self) -> bool:
        """See `VariantHost.binds_in_host_memory`."""
        return True

    def bind(self, terms: VariantTerms) -> PackedVariant:
        """See `VariantHost.bind`."""
        return self._variants.bind(terms)

    # ------------------------------------------------------------------------------------------ weights

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See CausalModel."""
        yield from self._parameters.items()

    def is_stored_transposed(self, name: str) -> bool:
        return False

    def fill(
        self, name: str, tensor: Tensor | GroupedWeight, *, index: int | None = None, half: int | None = None
    ) -> None:
        """See CausalModel."""
        if index is None:
            self._weights.put(name, tensor)
        else:
            self._weights.put_expert(name, index, half, tensor)

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        """See CausalModel."""
        return self._weights.holds(name, tensor)

    def finish(self) -> None:
        """See CausalModel; the programs are put together when they are first run, because the KV cache comes later."""

    # ------------------------------------------------------------------------------------------ programs

    @cached_property
    def _decoder(self) -> Program:
        """Tokens to hidden states."""
        return Program(self._team, list(self._operations.decoder(self._hidden)))

    @cached_property
    def _head(self) -> Program:
        """Hidden states to logits."""
        return Program(self._team, list(self._operations.head(self._head_rows, self._logits)))

    @cached_property
    def _variant_decoder(self) -> Program:
        """The same, for steps in which rows have variants."""
        return Program(self._team, list(self._variants.with_variants(self._decoder.operations)))

    @cached_property
    def _variant_head(self) -> Program:
        return Program(self._team, list(self._variants.with_variants(self._head.operations)))

    @property
    def _rows_per_token(self) -> int:
        """Most rows that an operation has for each token: among experts, one for each that was chosen."""
        return max((layer.mixture.num_chosen for layer in self.spec.layers if layer.mixture is not None), default=1)

    def _step(self, input_ids: Tensor, variants: StepVariants | None) -> Step:
        """The step under way, with the block tables and slots of all layer groups."""
        groups = [self.context.of_group(group) for group in range(1 + len(self.context.further_groups))]
        metadata, _ = groups[0]
        return Step(
            input_ids=input_ids,
            positions=metadata.positions,
            slot_mapping=torch.stack([slots for _, slots in groups]),
            block_tables=torch.stack([metadata.block_tables for metadata, _ in groups]),
            query_start=torch.tensor(metadata.query_start),
            seq_lens=torch.tensor(metadata.seq_lens),
            variants=variants,
        )
