"""A model of transformers of which a rank keeps its share only.

    before the weights are there     parameters, linears and attention modules become as large as the share is
    while they are filled            each rank takes its share of every tensor
    in a step                        hooks add up what ranks have a part of, and put the head's columns together

A hook is around whatever computes a module, also a variant's stand-in, which so knows nothing of ranks.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.stretches import Stretches
from model_worker.engine.layers.linear import Linear
from model_worker.engine.models.attention_interface import EXTRAS, AttentionExtras
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.parallel.sharding import Division, Share, check_divisions
from model_worker.engine.parallel.token_hooks import add_up_rows, gather_logits
from model_worker.engine.parallel.transformers_divisions import TransformersDivisions, stores_inputs_first

# What attention modules count for themselves.
_COUNTS = {
    "BloomAttention": ("num_heads",),
    "FalconAttention": ("num_heads", "num_kv_heads"),
    "GPT2Attention": ("num_heads", "split_size"),
    "OPTAttention": ("num_heads",),
    "Phi3Attention": ("num_key_value_heads",),
    "DeepseekV3Attention": ("num_heads",),
}


class DividedModule:
    """The share of one rank.

    Args:
        causal_lm: transformers' module on meta, with our linears and patches; it is changed.
        group: of all ranks.

    Attributes:
        divisions: by module or parameter, see `TransformersDivisions.all`.

    Raises:
        UnsupportedModelError: this model cannot be divided among so many.
    """

    def __init__(self, causal_lm: Any, group: RankGroup) -> None:
        self._group = group
        self._share = Share(group.rank, group.size)
        found = TransformersDivisions(causal_lm)
        self.divisions = found.all()
        check_divisions(self.divisions, group.size)
        self._shapes = {name: tensor.shape for name, tensor in causal_lm.state_dict(keep_vars=True).items()}
        self._inputs_first: set[str] = set()
        for path, division in found.linears.items():
            self._narrow_linear(causal_lm.get_submodule(path), division)
        for path, of_experts in found.experts.items():
            self._narrow_experts(path, causal_lm.get_submodule(path), of_experts)
        for path, division in found.vectors.items():
            module, _, name = path.rpartition(".")
            _narrow(causal_lm.get_submodule(module), name, 0, division, self._share)
        self._narrow_embedding(causal_lm.get_submodule(found.embedding), found.tokens)
        self._narrow_head(causal_lm.get_submodule(found.head), found.tokens)
        for module in causal_lm.modules():
            self._narrow_attention(module)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor on meta of the shape that a checkpoint has for a parameter."""
        return torch.empty(self._shapes[name], dtype=tensor.dtype, device="meta")

    def share_of(self, name: str, num_axes: int, *, half: int | None = None) -> Stretches | None:
        """What this rank has of a parameter, of one of its experts, or of a half of one; None: all of it."""
        division = self._division(name)
        if division is None or (name.endswith("bias") and division.by_inputs):
            return None
        if half is not None:
            division = division.part(half)
        return division.stretches(self._share, self._axis(name, division) % num_axes)

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's share, as it computes with it: what all add up is only once what is added to it."""
        division = self._division(name)
        if division is not None and name.endswith("bias") and division.by_inputs and self._share.rank > 0:
            return torch.zeros_like(tensor)
        return tensor

    def _division(self, name: str) -> Division | None:
        path, _, kind = name.rpartition(".")
        return self.divisions.get(path) if kind in ("weight", "bias") else self.divisions.get(name)

    def _axis(self, name: str, division: Division) -> int:
        """From the end, because an expert's tensor comes with others or alone."""
        if len(self._shapes[name]) == 1 or name.endswith("bias"):
            return -1
        return -1 if division.by_inputs != (name in self._inputs_first) else -2

    def _narrow_linear(self, linear: Linear, division: Division) -> None:
        if division.by_inputs:
            linear.in_features = division.size(self._share)
            _narrow(linear, "weight", 1, division, self._share)
            linear.register_forward_hook(self._add_up)
        else:
            self._narrow_outputs(linear, division)

    def _narrow_outputs(self, linear: Linear, division: Division) -> None:
        linear.out_features = division.size(self._share)
        _narrow(linear, "weight", 0, division, self._share)
        if linear.bias is not None:
            _narrow(linear, "bias", 0, division, self._share)

    def _narrow_experts(self, path: str, experts: nn.Module, divisions: dict[str, Division]) -> None:
        for name, division in divisions.items():
            if stores_inputs_first(experts):
                self._inputs_first.add(f"{path}.{name}")
            if not (name.endswith("bias") and division.by_inputs):
                _narrow(experts, name, self._axis(f"{path}.{name}", division), division, self._share)
        experts.register_forward_hook(self._add_up)

    def _narrow_embedding(self, embedding: nn.Embedding, tokens: Division) -> None:
        _narrow(embedding, "weight", 0, tokens, self._share)
        embedding.num_embeddings = tokens.size(self._share)
        embedding.padding_idx = None
        add_up_rows(embedding, tokens, self._group)

    def _narrow_head(self, head: Linear, tokens: Division) -> None:
        self._narrow_outputs(head, tokens)
        gather_logits(head, tokens, self._group)

    def _narrow_attention(self, module: Any) -> None:
        num_ranks = self._share.num_ranks
        for name in _COUNTS.get(type(module).__name__, ()):
            setattr(module, name, max(1, getattr(module, name) // num_ranks))
        if type(module).__name__ == "Phi3Attention":
            module.config = copy.copy(module.config)
            module.config.num_attention_heads //= num_ranks
        extras: AttentionExtras | None = getattr(module, EXTRAS, None)
        if extras is not None and extras.alibi is not None:
            slopes = extras.alibi.slopes.chunk(num_ranks)[self._share.rank]
            setattr(module, EXTRAS, replace(extras, alibi=replace(extras.alibi, slopes=slopes)))

    def _add_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._group.all_reduce(output)


def _narrow(module: nn.Module, name: str, axis: int, division: Division, share: Share) -> None:
    """A parameter on meta becomes as large as the share is."""
    shape = list(module._parameters[name].shape)  # type: ignore[union-attr]
    shape[axis] = division.size(share)
    dtype = module._parameters[name].dtype  # type: ignore[union-attr]
    module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
