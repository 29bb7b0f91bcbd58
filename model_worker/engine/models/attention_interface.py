"""Our attention behind transformers' `AttentionInterface`.

A model whose config names `PAGED_ATTENTION` calls `attention_forward` from each of its attention modules. What answers
is an attribute of that module: at first an `AttentionProbe`, which notes what the layer asks for, later the layer's
`PagedAttention`. Nothing is kept outside the model, so several models can live in one process.

The name is registered with the attention functions only, not with the mask functions: transformers then builds no
masks at all, which is right, because which keys a token sees is decided by `PagedAttention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from model_worker.engine.layers.attention import ForwardContext, KVShape, PagedAttention, QueryTemperature
from model_worker.engine.ops.paged_attention import Alibi, AttentionParams
from registry.errors import UnsupportedModelError

PAGED_ATTENTION = "rootgraft_paged"
ATTRIBUTE = "paged_attention"  # of each attention module
EXTRAS = "paged_attention_extras"  # set by patches

_ALIGNMENT = 16  # numbers, whose multiples Triton tells from others

# What models pass along that changes nothing here: positions, caches and packing are described by our own metadata.
_WITHOUT_EFFECT = frozenset(
    {
        "alibi",
        "cache_position",
        "dropout",
        "is_causal",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionExtras:
    """What a patch found out about a layer that transformers does not pass to the attention function."""

    alibi: Alibi | None = None
    query_temperature: QueryTemperature | None = None


class Attention(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


@dataclass(eq=False)
class AttentionProbe:
    """Stands in for the attention of all layers during the dry run and notes each call.

    Attributes:
        calls: the modules that called, in order, with the constants of their layers.
    """

    context: ForwardContext
    calls: list[tuple[nn.Module, PagedAttention]] = field(default_factory=list)

    def record(self, module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Tensor:
        """query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv] -> zeros [T, H, Dv]"""
        extras: AttentionExtras = getattr(module, EXTRAS, AttentionExtras())
        scale = arguments.get("scaling")
        layer_type = _layer_type(module)
        window = arguments.get("sliding_window")
        alibi = extras.alibi  # made before the model had a device
        if alibi is not None and alibi.slopes.device != query.device:
            alibi = replace(alibi, slopes=alibi.slopes.to(query.device))
        if layer_type == "sliding_attention" and window is None:
            raise UnsupportedModelError(f"{type(module).__name__} has a sliding window that it does not pass on")
        params = AttentionParams(
            scale=query.shape[2] ** -0.5 if scale is None else float(scale),
            sliding_window=window,
            chunk_size=module.config.attention_chunk_size if layer_type == "chunked_attention" else None,
            softcap=arguments.get("softcap"),
            sinks=arguments.get("s_aux"),
            alibi=alibi,
        )
        shape = KVShape(num_kv_heads=key.shape[1], key_dim=key.shape[2], value_dim=value.shape[2])
        self.calls.append((module, PagedAttention(self.context, params, shape, extras.query_temperature)))
        return value.new_zeros(query.shape[0], query.shape[1], value.shape[2])


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """The attention function: query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> ([1, T, H, Dv], None)"""
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    attention = getattr(module, ATTRIBUTE)
    if isinstance(attention, AttentionProbe):
        _refuse_unknown(module, attention_mask, arguments)
        out = attention.record(module, q, k, v, arguments)
    else:
        out = attention(*map(_aligned, (q, k, v)))
    return out[None], None


def _aligned(rows: Tensor) -> Tensor:
    """[T, heads, D], with strides of which the same is known for any T: kernels are compiled for what divides them."""
    return rows if rows.shape[2] % _ALIGNMENT == 0 or not rows.is_cuda else rows.reshape(-1).view(rows.shape)


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, arguments: dict[str, Any]) -> None:
    unknown = {name for name, value in arguments.items() if value is not None} - _WITHOUT_EFFECT
    if attention_mask is not None:
        unknown.add("attention_mask")
    if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unknown.add("is_causal=False")
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for attention with {', '.join(sorted(unknown))}, which is not implemented."
        )


def _layer_type(module: nn.Module) -> str | None:
    """What the config says about this layer: "full_attention", "sliding_attention", "chunked_attention", or nothing."""
    types: Any = getattr(getattr(module, "config", None), "layer_types", None)
    index: Any = getattr(module, "layer_idx", None)
    return None if types is None or index is None else str(types[index])


AttentionInterface.register(PAGED_ATTENTION, attention_forward)
