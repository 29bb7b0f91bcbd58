"""The GPU's decoder, of which a rank keeps its share only."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from adapters.stretches import Stretches
from compression.grouped_weight import GroupedWeight
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.token_embedding import TokenEmbedding
from model_worker.engine.models.decoder_parameters import EMBEDDING, HEAD, parameter_shapes
from model_worker.engine.models.decoder_spec import DecoderSpec, LayerSpec
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.parallel.sharding import (
    Division,
    Part,
    Share,
    check_divisions,
    check_groups,
    inputs,
    outputs,
)
from model_worker.engine.parallel.token_hooks import add_up_rows, gather_logits


class DividedDecoder:
    """The share of one rank.

    Args:
        spec: of the whole model.
        group: of all ranks.
        in_groups: weights will be quantized in groups of their inputs.

    Attributes:
        spec: of this rank: its heads and its share of each MLP; the vocabulary is whole.
        num_tokens: rows that it has of the embedding and of the head.
        divisions: by module, or by parameter where it is that of a norm.

    Raises:
        UnsupportedModelError: this model cannot be divided among so many.
    """

    def __init__(self, spec: DecoderSpec, group: RankGroup, *, in_groups: bool) -> None:
        self._group = group
        self._share = Share(group.rank, group.size)
        self._tokens = outputs(Part(spec.vocab_size, spec.vocab_size, "tokens", uneven=True))
        self.divisions = _divisions(spec, self._tokens)
        check_divisions(self.divisions, group.size)
        if in_groups:
            check_groups(self.divisions, group.size)
        self.num_tokens = self._tokens.size(self._share)
        self.spec = replace(
            spec,
            num_heads=spec.num_heads // group.size,
            num_kv_heads=max(1, spec.num_kv_heads // group.size),
            intermediate_size=spec.intermediate_size // group.size,
            layers=tuple(_divided_layer(layer, group.size) for layer in spec.layers),
        )

    def add_hooks(self, embedding: TokenEmbedding, head: FusedLinear) -> None:
        """Both modules have this rank's tokens, and are called for all."""
        add_up_rows(embedding, self._tokens, self._group)
        gather_logits(head, self._tokens, self._group)

    def share_of(self, name: str, num_axes: int, *, half: int | None) -> Stretches | None:
        """See `DividedModel.share_of`."""
        module, _, kind = name.rpartition(".")
        division = self.divisions.get(module, self.divisions.get(name))
        if division is None or (kind == "bias" and division.by_inputs):
            return None
        if half is not None:
            division = division.part(half)
        axis = num_axes - 1 if division.by_inputs else max(0, num_axes - 2)  # of [N, K], [E, N, K] or [N]
        return division.stretches(self._share, axis)

    def own(self, name: str, tensor: Tensor | GroupedWeight) -> Tensor | GroupedWeight:
        """This rank's share, as it computes with it: what all add up is only once what is added to it."""
        module, _, kind = name.rpartition(".")
        division = self.divisions.get(module)
        if isinstance(tensor, Tensor) and kind == "bias" and division is not None and division.by_inputs:
            return tensor if self._share.rank == 0 else tensor.new_zeros(tensor.shape)
        return tensor


def _divisions(spec: DecoderSpec, tokens: Division) -> dict[str, Division]:
    found = {EMBEDDING.removesuffix(".weight"): tokens, HEAD.removesuffix(".weight"): tokens}
    for name, shape in parameter_shapes(spec).items():
        module = name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        if len(shape) == 3:
            found[name] = _division_of_experts(kind, shape)
        elif (division := _division(spec, kind)) is not None:
            found[module] = division
        elif spec.qk_norm == "row" and kind in ("q_norm", "k_norm"):
            found[name] = outputs(_heads(spec) if kind == "q_norm" else _kv_heads(spec))
    return found


def _division(spec: DecoderSpec, kind: str) -> Division | None:
    heads, kv_heads = _heads(spec), _kv_heads(spec)
    neurons = Part(spec.intermediate_size, spec.intermediate_size, "neurons")
    known = {
        "q_proj": outputs(heads),
        "k_proj": outputs(kv_heads),
        "v_proj": outputs(kv_heads),
        "qkv_proj": outputs(heads, kv_heads, kv_heads),
        "o_proj": inputs(heads),
        "gate_proj": outputs(neurons),
        "up_proj": outputs(neurons),
        "gate_up_proj": outputs(neurons, neurons),
        "down_proj": inputs(neurons),
    }
    return known.get(kind)


def _division_of_experts(kind: str, shape: tuple[int, ...]) -> Division:
    """Of a parameter [E, 2 I, H] or [E, H, I]: each rank has some neurons of every expert."""
    size = shape[2] if kind == "down_proj" else shape[1] // 2
    neurons = Part(size, size, "neurons")
    return inputs(neurons) if kind == "down_proj" else outputs(neurons, neurons)


def _divided_layer(layer: LayerSpec, num_ranks: int) -> LayerSpec:
    if (mixture := layer.mixture) is None:
        return layer
    return replace(layer, mixture=replace(mixture, intermediate_size=mixture.intermediate_size // num_ranks))


def _heads(spec: DecoderSpec) -> Part:
    return Part(spec.num_heads * spec.head_dim, spec.num_heads, "attention heads")


def _kv_heads(spec: DecoderSpec) -> Part:
    return Part(spec.num_kv_heads * spec.head_dim, spec.num_kv_heads, "KV heads", repeats=True)
