"""Our own decoder for the Llama-shaped families on GPUs, of torch modules over the ops' functions.

    embedding ──► layer × N (gpu_layer.py) ──► norm ──► (rows) ──► head ──► logits

It computes on CPU tensors too, with the ops' references: so it is compared with transformers, and split over ranks in
tests. Activations have the model's dtype, and are rounded where transformers rounds them. Nothing in a step waits for
the device or asks it anything, so that a step can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adapters.stretches import Stretches
from compression.grouped_weight import GroupedWeight
from delta.variant_terms import VariantTerms
from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.rms_norm import RMSNorm
from model_worker.engine.layers.rotary_attention import RotaryAttention, RotaryTable
from model_worker.engine.layers.token_embedding import TokenEmbedding
from model_worker.engine.lora.bound_variant import BoundVariant, VariantSegments
from model_worker.engine.models.decoder_fusions import decoder_fusions
from model_worker.engine.models.decoder_parameters import EMBEDDING, HEAD, parameter_shapes
from model_worker.engine.models.decoder_spec import DecoderSpec, read_spec
from model_worker.engine.models.gpu_layer import DecoderLayer, make_input_norm
from model_worker.engine.models.gpu_mixture import DecoderExperts, DecoderMixture
from model_worker.engine.models.gpu_variants import GpuVariant, GpuVariants, GraphTerms
from model_worker.engine.models.gpu_weights import GpuWeights, WeightPlace
from model_worker.engine.parallel.divided_decoder import DividedDecoder
from model_worker.engine.parallel.group import OneRank, RankGroup
from model_worker.engine.parallel.sharding import Division
from model_worker.engine.trace import TraceRow
from registry.errors import UnsupportedModelError

_FLOAT8_CAPABILITY = (8, 9)


class GpuDecoder(nn.Module):
    """A causal language model that computes flat batches.

    Args:
        config: of the model, with `model_type`.
        dtype: of activations, and of weights that are not quantized.
        device: of the weights.
        quantization: int8, int4, fp8, or None: as the checkpoint has them.
        max_model_len: most positions that will ever be used.
        group: of the ranks that compute the model together.
        has_tables: variants are computed by kernels, which find them in tables; None: on GPUs.

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
        device: torch.device,
        quantization: str | None,
        max_model_len: int,
        group: RankGroup | None = None,
        has_tables: bool | None = None,
    ) -> None:
        super().__init__()
        self.spec: DecoderSpec = read_spec(config, max_model_len)
        if quantization is not None and self.spec.has_experts:
            raise UnsupportedModelError("The native decoder for GPUs does not quantize mixtures of experts.")
        if quantization == "fp8":
            _check_float8(device)
        self._group = OneRank() if group is None else group
        self._dtype = dtype
        self._device = device
        own = str(dtype).removeprefix("torch.")
        self.kv_dtypes: tuple[str, ...] = (own, "float8_e4m3fn") if _has_float8(device) else (own,)
        self.context = ForwardContext()
        self.ties: dict[str, str] = {HEAD: EMBEDDING} if self.spec.tied_head else {}
        self._parameters_by_name = {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in parameter_shapes(self.spec).items()
        }
        fusions = decoder_fusions(self.spec)
        self.fused: Mapping[str, str] = {
            name: fusion.key for fusion in fusions for name in fusion.names if len(fusion.names) > 1
        }
        self._divided: DividedDecoder | None = None
        if self._group.size > 1:
            self._divided = DividedDecoder(self.spec, self._group, in_groups=quantization in ("int8", "int4"))
            self.spec = self._divided.spec
        self._build(self.spec, self.spec.vocab_size if self._divided is None else self._divided.num_tokens)
        if self._divided is not None:
            self._divided.add_hooks(self.embed_tokens, self.lm_head)
        places = self._places()
        self._weights = GpuWeights(places, device, quantization=quantization, head=self.lm_head)
        linears = [module for module in self.modules() if isinstance(module, FusedLinear)]
        norms = [module for module in self.modules() if isinstance(module, RMSNorm)]
        head = WeightPlace(self.lm_head, "weight", 0, 0, self.lm_head.out_features)
        tied_head = {} if HEAD in places else {HEAD: head}
        self._variants = GpuVariants(
            linears,
            norms,
            {**places, **tied_head},
            device,
            dtype=dtype,
            num_tokens=len(self.embed_tokens.weight),
            has_tables=has_tables,
        )

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def attentions(self) -> list[RotaryAttention]:
        return [layer.self_attn.paged_attention for layer in self._decoder_layers]

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden] after the final norm."""
        terms = self.context.terms
        if terms is None:
            terms = self._variants.plan(self.context.variants, len(input_ids))
        if terms is not None:
            terms.begin()
        tables = {kind: rope(positions) for kind, rope in self.rotary.items()}
        residual = self.embed_tokens(input_ids, terms)
        update: Tensor | None = None
        for layer in self._decoder_layers:
            table = None if layer.rope is None else tables[layer.rope]
            update = layer(residual, update, table, terms)
        hidden: Tensor = self.norm(residual, update, terms)
        return hidden

    def logits(
        self, hidden: Tensor, variants: VariantSegments = (), *, graph_terms: GraphTerms | None = None
    ) -> Tensor:
        """See `VariantHost.logits`. -> [R, vocab_size] in the model's dtype

        Args:
            graph_terms: of the graph that is captured, in place of `variants`.
        """
        terms = graph_terms or self._variants.plan(variants, len(hidden))
        logits: Tensor = self.lm_head(hidden, terms)
        return self._scaled(logits)

    def _scaled(self, logits: Tensor) -> Tensor:
        if self.spec.logits_divisor != 1.0:
            logits = logits / self.spec.logits_divisor
        if (cap := self.spec.logits_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def trace(self) -> AbstractContextManager[list[TraceRow]]:
        """See `Traceable.trace`."""
        # Imported here because it takes transformers along, which the decoder need not wait for.
        from model_worker.engine.models.transformers_trace import trace_modules

        return trace_modules(self, self.context, self._device)

    # ------------------------------------------------------------------------------------------ variants

    def base_weight(self, module: str) -> Tensor:
        """See `VariantHost.base_weight`."""
        experts, _, last = module.rpartition(".")
        if last.isdecimal() and experts in self._parameters_by_name:
            return self._variants.on_host(lambda: self._weights.get(experts)[int(last)])
        name = f"{module}.weight"
        if name == HEAD:
            return self._variants.on_host(lambda: self.lm_head.method.weight(self.lm_head))
        if self._parameters_by_name[name].ndim != 2:
            raise KeyError(module)
        return self._variants.on_host(lambda: self._weights.get(name))

    def base_bias(self, module: str) -> Tensor:
        """See `VariantHost.base_bias`."""
        if self._parameters_by_name[f"{module}.weight"].ndim != 2:
            raise KeyError(module)
        return self._variants.on_host(lambda: self._weights.get(f"{module}.bias"))

    @property
    def binds_in_host_memory(self) -> bool:
        """See `VariantHost.binds_in_host_memory`."""
        return self._device.type == "cpu"

    def bind(self, terms: VariantTerms) -> GpuVariant:
        """See `VariantHost.bind`; waits for no copy."""
        return self._variants.bind(terms)

    def extra_logits(self, hidden: Tensor, variant: BoundVariant) -> Tensor:
        """See `VariantHost.extra_logits`."""
        assert isinstance(variant, GpuVariant)
        assert variant.extra_head is not None
        return self._scaled(variant.extra_head(hidden))

    def graph_terms(self, num_rows: int) -> tuple[GraphTerms, ...]:
        """What stands for the variants of captured graphs' steps of so many rows: `context.terms`, for `logits` too.

        From the one that computes least to the one that serves the most (`GraphTerms.serves`).
        """
        return self._variants.graph_terms(num_rows)

    # ------------------------------------------------------------------------------------------ weights

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See CausalModel."""
        yield from self._parameters_by_name.items()

    @property
    def divisions(self) -> Mapping[str, Division]:
        """How weights are divided among ranks, by module."""
        return {} if self._divided is None else self._divided.divisions

    def is_stored_transposed(self, name: str) -> bool:
        return False

    def share_of(self, name: str, num_axes: int, *, half: int | None = None) -> Stretches | None:
        """See DividedModel."""
        return None if self._divided is None else self._divided.share_of(name, num_axes, half=half)

    def fill(
        self, name: str, tensor: Tensor | GroupedWeight, *, index: int | None = None, half: int | None = None
    ) -> None:
        """See CausalModel."""
        if index is not None:
            self._weights.put_expert(name, index, half, tensor)
        else:
            self._weights.put(name, tensor if self._divided is None else self._divided.own(name, tensor))

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        """See CausalModel."""
        return self._weights.holds(name, tensor if self._divided is None else self._divided.own(name, tensor))

    def finish(self) -> None:
        """See CausalModel."""
        if self.spec.tied_head:
            self._weights.tie_head(self.embed_tokens)
        if self._device.type == "cuda":
            self._variants.warm_up()
            mixtures = {layer.mixture: place for place, layer in enumerate(self.spec.layers)}
            for place in mixtures.values():  # one of each shape
                mlp = self._decoder_layers[place].mlp
                if isinstance(mlp, DecoderMixture):
                    mlp.warm_up()

    # ------------------------------------------------------------------------------------------ internal

    def _build(self, spec: DecoderSpec, num_tokens: int) -> None:
        dtype = self._dtype
        self.embed_tokens = TokenEmbedding(num_tokens, spec.hidden_size, spec.embed_multiplier, dtype=dtype)
        self.rotary = nn.ModuleDict(
            {
                kind: RotaryTable(rope.inverse_frequencies, rope.attention_scaling, dtype=dtype, device=self._device)
                for kind, rope in spec.ropes.items()
            }
        )
        self._decoder_layers = [
            DecoderLayer(spec, index, self.context, self._group, dtype=dtype) for index in range(len(spec.layers))
        ]
        self.layers = nn.ModuleList(self._decoder_layers)
        self.norm = make_input_norm(spec, "norm", dtype)
        self.lm_head = FusedLinear(spec.hidden_size, (num_tokens,), "head", bias=False, dtype=dtype)

    def _places(self) -> dict[str, WeightPlace]:
        """Where each tensor of the checkpoint goes."""
        by_key: dict[str, nn.Module] = {"embedding": self.embed_tokens}
        for module in self.modules():
            if isinstance(module, FusedLinear | RMSNorm | DecoderExperts):
                by_key[module.key] = module
        places: dict[str, WeightPlace] = {}
        for fusion in decoder_fusions(self.spec):
            path, _, last = fusion.key.rpartition(".")
            if last in ("q_norm", "k_norm") and f"{path}.qk_norm" in by_key:
                heads = (0, self.spec.num_heads) if last == "q_norm" else (self.spec.num_heads, self.spec.num_kv_heads)
                (name,), size = fusion.names, self.spec.head_dim
                norm = by_key[f"{path}.qk_norm"]
                places[name] = WeightPlace(norm, "weight", 0, heads[0] * size, size, heads[1], fusion.offset)
                continue
            if fusion.num_experts is not None:
                (name,) = fusion.names
                places[name] = WeightPlace(by_key[path], name.rpartition(".")[2], 0, 0, fusion.num_experts)
                continue
            attribute = "bias" if last == "bias" else "weight"
            module = by_key[path if last == "bias" else fusion.key]
            first = 0
            for part, name in enumerate(fusion.names):
                num_rows = module.widths[part] if isinstance(module, FusedLinear) else len(getattr(module, attribute))
                places[name] = WeightPlace(module, attribute, part, first, num_rows, offset=fusion.offset)
                first += num_rows
        return places


def can_quantize(config: Mapping[str, Any], max_model_len: int) -> bool:
    """Whether `GpuDecoder` takes this model with a quantization.

    Args:
        config, max_model_len: as in `read_spec`.

    Raises:
        CheckpointError: as there.
    """
    try:
        return not read_spec(config, max_model_len).has_experts
    except UnsupportedModelError:
        return False


def _has_float8(device: torch.device) -> bool:
    """Whether kernels can be compiled that convert float8."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def _check_float8(device: torch.device) -> None:
    if not _has_float8(device):
        raise UnsupportedModelError(
            f"--quantization fp8 needs compute capability 8.9 or more, {torch.cuda.get_device_name(device)} has "
            "less; use int8."
        )
