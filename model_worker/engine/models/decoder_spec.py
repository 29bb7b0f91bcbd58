"""What the native decoder has to know of a model: the Llama shape, and the ways in which its families vary it.

    x = embed_multiplier * embedding[token]
    layer:   a = attention(rotate(q, k), v),  [q k v] = W_qkv norm_in(x) + b        norms of q and k before the rotation
             x = x + residual_multiplier * norm_out(W_o a + b)
             x = x + residual_multiplier * norm_out(mlp(norm_in(x)))
             mlp(n) = W_down (act(W_gate n) * W_up n), or a weighted sum of some such experts (ops/experts)
    logits = cap(W_head norm(x) / logits_divisor)

norm_in or norm_out is absent in most families. Read from transformers' own configuration and modules, so that defaults
and derived values are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.paged_attention import AttentionParams
from registry.errors import UnsupportedModelError

# Every family here is compared with transformers in tests/model_worker/engine/test_parity.py.
NATIVE_MODEL_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "mixtral",
        "olmo2",
        "smollm3",
    }
)
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
_GEMMA = frozenset({"gemma", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary frequencies that some layers share.

    Attributes:
        inverse_frequencies: [R / 2] float32; the first R elements of a head are rotated.
        attention_scaling: of cosines and sines.
    """

    inverse_frequencies: Tensor
    attention_scaling: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one layer.

    Attributes:
        num_chosen: experts that compute a token.
        normalize: their weights sum to 1.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer.

    Attributes:
        attention: scale, window, softcap.
        rope: key into `DecoderSpec.ropes`; None: no rotation.
        mixture: None: a single MLP.
    """

    attention: AttentionParams
    rope: str | None
    mixture: Mixture | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderSpec:
    """One model.

    Attributes:
        norm_offset: added to every norm's weight (gemma stores w and means 1 + w).
        qk_norm: queries and keys are normalized, each head for itself ("head") or all together ("row"); None: not.
        input_norms: names of the norms before attention and before the MLP; None: absent.
        output_norms: names of the norms after attention and after the MLP; None: absent.
        fused_names: the checkpoint holds qkv and gate-up as one tensor each (phi3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    activation: Activation
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, Rope]
    norm_offset: float = 0.0
    qk_norm: str | None = None
    input_norms: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    output_norms: tuple[str, str] | None = None
    fused_names: bool = False
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None


def read_spec(config: Any, model: nn.Module) -> DecoderSpec:
    """The spec of a model of transformers.

    Args:
        config: transformers' configuration object.
        model: its causal language model, on meta: modules, shapes and constants are read.

    Raises:
        UnsupportedModelError: the native decoder does not compute this model; says what it lacks.
    """
    model_type = config.model_type
    if model_type not in NATIVE_MODEL_TYPES:
        raise UnsupportedModelError(f"The native decoder does not know model type {model_type!r}.")
    activation = _ACTIVATIONS.get(str(getattr(config, "hidden_activation", None) or config.hidden_act))
    if activation is None:
        raise UnsupportedModelError("The native decoder knows the activations silu and gelu_pytorch_tanh only.")
    decoder: Any = model.get_submodule("model")
    ropes = _ropes(config, decoder)
    gemma = model_type in _GEMMA
    sandwich = model_type in ("gemma2", "gemma3_text")
    output_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    input_norms: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    if sandwich:
        input_norms = ("input_layernorm", "pre_feedforward_layernorm")
    elif model_type == "olmo2":
        input_norms = None
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
        norm_epsilon=config.rms_norm_eps,
        activation=activation,
        layers=tuple(_layer(config, layer, index, ropes) for index, layer in enumerate(decoder.layers)),
        ropes=ropes,
        norm_offset=1.0 if gemma else 0.0,
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmo2": "row"}.get(model_type),
        input_norms=input_norms,
        output_norms=output_norms if sandwich or model_type == "olmo2" else None,
        fused_names=model_type == "phi3",
        embed_multiplier=config.hidden_size**0.5 if gemma else getattr(config, "embedding_multiplier", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        logits_divisor=getattr(config, "logits_scaling", 1.0),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _layer(config: Any, layer: Any, index: int, ropes: dict[str, Rope]) -> LayerSpec:
    attention = layer.self_attn
    layer_type = config.layer_types[index] if getattr(config, "layer_types", None) else None
    # In these a window holds for all layers; in the other families a module knows its own.
    everywhere = config.model_type in ("mistral", "mixtral", "phi3")
    rope = str(layer_type) if layer_type in ropes else "all"
    return LayerSpec(
        attention=AttentionParams(
            scale=attention.scaling,
            sliding_window=config.sliding_window if everywhere else getattr(attention, "sliding_window", None),
            softcap=getattr(attention, "attn_logit_softcapping", None),
        ),
        rope=rope if getattr(attention, "use_rope", True) else None,
        mixture=_mixture(config, layer.mlp),
    )


def _mixture(config: Any, mlp: Any) -> Mixture | None:
    if not hasattr(mlp, "experts"):
        return None
    num_experts, double_size, _ = mlp.experts.gate_up_proj.shape
    return Mixture(
        num_experts=num_experts,
        num_chosen=config.num_experts_per_tok,
        intermediate_size=double_size // 2,
        normalize=getattr(config, "norm_topk_prob", True),
    )


def _ropes(config: Any, decoder: Any) -> dict[str, Rope]:
    """By layer type where a model has several, else under "all"; made by transformers' own class, on the host."""
    module: Any = type(decoder.rotary_emb)(config)
    if isinstance(module.rope_type, dict):
        return {
            kind: Rope(getattr(module, f"{kind}_inv_freq").float(), float(getattr(module, f"{kind}_attention_scaling")))
            for kind in module.rope_type
        }
    return {"all": Rope(module.inv_freq.float(), float(module.attention_scaling))}
