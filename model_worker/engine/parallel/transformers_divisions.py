"""How the weights of transformers' models are divided among ranks: their own plans, read as data, and ours beside them.

A plan names modules and parameters with a * for each index, and for each a style:

    colwise, packed_colwise     by outputs; packed: gate and up projection, one after the other
    qkv                         by outputs: queries, keys and values, one after the other
    kv_groups                   by outputs: for each KV head its query heads, key and value
    rowwise                     by inputs
    heads                       a vector of one number a head

What no plan names is whole on every rank, and so is what a plan computes in parts only to put it together again
(olmo2's attention, whose norms look at all heads; only the GPU's decoder divides it). The embedding and the output head
are divided by tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from model_worker.engine.parallel.sharding import Division, Part, inputs, outputs
from registry.errors import UnsupportedModelError

_MLP_4H = {"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"}
_ATTENTION = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.o_proj": "rowwise"}

# For families that transformers has no plan for, or one that splits nothing of what it names. Below "...layers.*."
_PLANS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
        "opt": _ATTENTION | {"self_attn.out_proj": "rowwise", "fc1": "colwise", "fc2": "rowwise"},
        "bloom": {"self_attention.query_key_value": "colwise", "self_attention.dense": "rowwise", **_MLP_4H},
        "falcon": {"self_attention.query_key_value": "falcon", "self_attention.dense": "rowwise", **_MLP_4H},
        "phi3": {
            "self_attn.qkv_proj": "qkv",
            "self_attn.o_proj": "rowwise",
            "mlp.gate_up_proj": "packed_colwise",
            "mlp.down_proj": "rowwise",
        },
        "gpt_oss": _ATTENTION | {"self_attn.sinks": "heads", "mlp.experts": "moe_tp_experts"},
        "qwen2_moe": {
            "mlp.shared_expert.gate_proj": "colwise",
            "mlp.shared_expert.up_proj": "colwise",
            "mlp.shared_expert.down_proj": "rowwise",
        },
        "deepseek_v3": {
            "self_attn.q_proj": "colwise",
            "self_attn.q_b_proj": "colwise",
            "self_attn.kv_b_proj": "colwise",
            "self_attn.o_proj": "rowwise",
        },
    }
)

_WHOLE = ("colwise_gather_output", "rowwise_split_input", "replicated_with_grad_allreduce")
_ATTENTIONS = frozenset({"self_attn", "attn", "attention", "self_attention"})
_EXPERTS = "moe_tp_experts"
_HEADS, _KV_HEADS = "attention heads", "KV heads"


class TransformersDivisions:
    """Of one model, before anything in it is divided.

    Args:
        causal_lm: transformers' module, whose linears are [outputs, inputs].

    Attributes:
        linears: by the path of the module.
        experts: by the path of a module that holds the weights of all experts, for each of its parameters.
        vectors: by the path of the parameter.
        embedding, head: paths of these two modules.
        tokens: how both are divided.

    Raises:
        UnsupportedModelError: nobody has said how this family is divided.
    """

    def __init__(self, causal_lm: Any) -> None:
        self._config = causal_lm.config
        self.linears: dict[str, Division] = {}
        self.experts: dict[str, dict[str, Division]] = {}
        self.vectors: dict[str, Division] = {}
        paths = {module: path for path, module in causal_lm.named_modules()}
        self.embedding = paths[causal_lm.get_input_embeddings()]
        self.head = paths[causal_lm.get_output_embeddings()]
        num_tokens = causal_lm.get_output_embeddings().out_features
        self.tokens = Division(False, (Part(num_tokens, num_tokens, "tokens", uneven=True),))
        for pattern, style in self._plan().items():
            self._divide(causal_lm, re.compile(pattern), style)

    def all(self) -> dict[str, Division]:
        """By the path of the module, or of the parameter where it is none of a linear layer."""
        of_experts = {
            f"{path}.{name}": division for path, those in self.experts.items() for name, division in those.items()
        }
        return {
            self.embedding: self.tokens,
            self.head: self.tokens,
            **self.linears,
            **of_experts,
            **self.vectors,
        }

    def _plan(self) -> dict[str, str]:
        """Regular expressions for the paths of modules and parameters, and their styles."""
        model_type = self._config.model_type
        theirs: Mapping[str, str] = self._config.base_model_tp_plan or {}
        ours = _PLANS.get(model_type, {})
        if not theirs and not ours:
            raise UnsupportedModelError(
                f"--tensor-parallel-size is not possible for this model: it is not known how models of type "
                f"{model_type} are divided. Serve it with 1."
            )
        plan = {r"(.*\.)?" + re.escape(name).replace(r"\*", r"\d+"): style for name, style in theirs.items()}
        return plan | {r".*\.\d+\." + re.escape(name): style for name, style in ours.items()}

    def _divide(self, causal_lm: nn.Module, pattern: re.Pattern[str], style: str) -> None:
        if style == "heads":
            for path, parameter in causal_lm.named_parameters():
                if pattern.fullmatch(path):
                    self.vectors[path] = outputs(Part(len(parameter), self._num_heads, _HEADS))
            return
        for path, module in causal_lm.named_modules():
            if not pattern.fullmatch(path):
                continue
            if style == _EXPERTS:
                self.experts[path] = _divide_experts(module)
            elif style in _WHOLE:
                self.linears.pop(path, None)
            else:
                self.linears[path] = self._linear(path, module, style)

    def _linear(self, path: str, module: Any, style: str) -> Division:
        parent, _, name = path.rpartition(".")
        attends = parent.rpartition(".")[2] in _ATTENTIONS
        num_outputs, num_inputs = module.out_features, module.in_features
        if style == "rowwise":
            return inputs(_heads(num_inputs, self._num_heads) if attends else _neurons(num_inputs))
        if style == "falcon":
            style = "kv_groups" if self._config.new_decoder_architecture else "colwise"
            if self._config.multi_query and style == "colwise":
                style = "qkv"
        if style == "qkv":
            width = num_outputs // (self._num_heads + 2 * self._num_kv_heads)
            keys = _kv_heads(self._num_kv_heads * width, self._num_kv_heads)
            return outputs(_heads(self._num_heads * width, self._num_heads), keys, keys)
        if style == "kv_groups":
            return outputs(Part(num_outputs, self._num_kv_heads, _KV_HEADS))
        if style == "packed_colwise":
            return outputs(*[_neurons(num_outputs // 2)] * 2)
        if style != "colwise":
            raise UnsupportedModelError(
                f"--tensor-parallel-size is not possible for this model: {path} would have to be divided as {style}, "
                "which is not implemented. Serve it with 1."
            )
        if not attends:
            return outputs(_neurons(num_outputs))
        if name in ("k_proj", "v_proj"):
            return outputs(_kv_heads(num_outputs, self._num_kv_heads))
        return outputs(_heads(num_outputs, self._num_heads))

    @property
    def _num_heads(self) -> int:
        return int(self._config.num_attention_heads)

    @property
    def _num_kv_heads(self) -> int:
        if self._config.model_type == "falcon":
            multi_query = self._config.multi_query and not self._config.new_decoder_architecture
            return 1 if multi_query else int(self._config.num_kv_heads)
        return int(getattr(self._config, "num_key_value_heads", None) or self._num_heads)


def _divide_experts(module: Any) -> dict[str, Division]:
    """The parameters of a module that holds all experts: [E, N, K] or [E, K, N], and biases [E, N]."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    down = module.down_proj
    size = down.shape[1 if stores_inputs_first(module) else 2]
    # gpt_oss has the outputs of gate and up projection in turns.
    in_turns = "gate_up_proj_bias" in names
    gate_up = (Part(2 * size, size, "neurons"),) if in_turns else (_neurons(size), _neurons(size))
    found = {}
    for name in names:
        parts = (_neurons(size),) if name.startswith(("down_proj", "up_proj")) else gate_up
        found[name] = Division(name.startswith("down_proj"), parts)
    return found


def stores_inputs_first(experts: Any) -> bool:
    """Whether an expert's matrices are [inputs, outputs]."""
    return bool(getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts"))


def _heads(size: int, num_heads: int) -> Part:
    return Part(size, num_heads, _HEADS)


def _kv_heads(size: int, num_kv_heads: int) -> Part:
    return Part(size, num_kv_heads, _KV_HEADS, repeats=True)


def _neurons(size: int) -> Part:
    return Part(size, size, "neurons")
