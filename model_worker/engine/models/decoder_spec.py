"""What the native decoder has to know of a model: the Llama shape, and the ways in which its families vary it.

    x = embed_multiplier * embedding[token]
    layer:   a = attention(rotate(q, k), v),  [q k v] = W_qkv norm_in(x) + b        norms of q and k before the rotation
             x = x + residual_multiplier * norm_out(W_o a + b)
             x = x + residual_multiplier * norm_out(mlp(norm_in(x)))
             mlp(n) = W_down (act(W_gate n) * W_up n), or a weighted sum of some such experts (ops/experts)
    logits = cap(W_head norm(x) / logits_divisor)

norm_in or norm_out is absent in most families. What a family computes is data here, because importing transformers'
modeling code takes seconds; tests/model_worker/engine/models/test_decoder_spec.py compares it with theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.decoder_config import DECODER_MODEL_TYPES, complete_config
from model_worker.engine.models.rope_frequencies import Rope, make_rope
from model_worker.engine.models.rope_limits import refuse_batch_dependent_rope
from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.paged_attention import AttentionParams
from model_worker.engine.ops.paged_attention.operation import MAX_HEAD_DIM
from registry.errors import UnsupportedModelError

# Every family here is compared with transformers in tests/model_worker/engine/test_parity.py.
NATIVE_MODEL_TYPES = DECODER_MODEL_TYPES
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
_GEMMA = frozenset({"gemma", "gemma2", "gemma3_text"})


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
        norm_rounds_first: what is normalized is rounded to the model's dtype before it is multiplied with the weight.
        qk_norm: queries and keys are normalized, each head for itself ("head") or all together ("row"); None: not.
        input_norms: names of the norms before attention and before the MLP; None: absent.
        output_norms: names of the norms after attention and after the MLP; None: absent.
        fused_names: the checkpoint holds qkv and gate-up as one tensor each (phi3).
        tied_head: the output head is the embedding.
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
    norm_rounds_first: bool = True
    qk_norm: str | None = None
    input_norms: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    output_norms: tuple[str, str] | None = None
    fused_names: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None

    @property
    def has_experts(self) -> bool:
        return any(layer.mixture is not None for layer in self.layers)


def read_spec(config: Mapping[str, Any], max_model_len: int) -> DecoderSpec:
    """The spec of a model.

    Args:
        config: the dict of config.json.
        max_model_len: most positions that will ever be used.

    Raises:
        UnsupportedModelError: the native decoder does not compute this model; says what it lacks.
        CheckpointError: the config holds a value that it cannot have.
    """
    model_type = config["model_type"]
    if model_type not in NATIVE_MODEL_TYPES:
        raise UnsupportedModelError(f"The native decoder does not know model type {model_type!r}.")
    config = complete_config(config)
    activation = _ACTIVATIONS.get(str(config.get("hidden_activation", config.get("hidden_act"))))
    if activation is None:
        raise UnsupportedModelError("The native decoder knows the activations silu and gelu_pytorch_tanh only.")
    if config.get("use_bidirectional_attention", False):
        raise UnsupportedModelError("The native decoder knows causal attention only.")
    if config["head_dim"] > MAX_HEAD_DIM:
        raise UnsupportedModelError(f"The native decoder knows attention heads of up to {MAX_HEAD_DIM} numbers only.")
    ropes = _ropes(config, max_model_len)
    gemma = model_type in _GEMMA
    sandwich = model_type in ("gemma2", "gemma3_text")
    output_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    input_norms: tuple[str, str] | None = ("input_layernorm", "post_attention_layernorm")
    if sandwich:
        input_norms = ("input_layernorm", "pre_feedforward_layernorm")
    elif model_type == "olmo2":
        input_norms = None
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        norm_epsilon=config["rms_norm_eps"],
        activation=activation,
        layers=tuple(_layer(config, index, ropes) for index in range(config["num_hidden_layers"])),
        ropes=ropes,
        norm_offset=1.0 if gemma else 0.0,
        norm_rounds_first=not gemma and model_type != "olmo2",
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmo2": "row"}.get(model_type),
        input_norms=input_norms,
        output_norms=output_norms if sandwich or model_type == "olmo2" else None,
        fused_names=model_type == "phi3",
        qkv_bias=model_type == "qwen2" or config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        tied_head=config["tie_word_embeddings"],
        embed_multiplier=config["hidden_size"] ** 0.5 if gemma else config.get("embedding_multiplier", 1.0),
        residual_multiplier=config.get("residual_multiplier", 1.0),
        logits_divisor=config.get("logits_scaling", 1.0),
        logits_softcap=config.get("final_logit_softcapping"),
    )


def _layer(config: Mapping[str, Any], index: int, ropes: Mapping[str, Rope]) -> LayerSpec:
    layer_type = config["layer_types"][index] if "layer_types" in config else "all"
    # A family that names its layers has the window in some of them, another one in all.
    has_window = layer_type in ("sliding_attention", "all") and config.get("use_sliding_window", True)
    window = config.get("sliding_window") if has_window else None
    if layer_type == "sliding_attention" and window is None:
        raise UnsupportedModelError(f"Layer {index} has a sliding window, whose size the config does not say.")
    rope = layer_type if layer_type in ropes else "all"
    return LayerSpec(
        attention=AttentionParams(
            scale=_attention_scale(config),
            sliding_window=window,
            # gemma3_text has the setting, too, but transformers' modeling code does not look at it.
            softcap=config["attn_logit_softcapping"] if config["model_type"] == "gemma2" else None,
        ),
        rope=rope if "no_rope_layers" not in config or config["no_rope_layers"][index] else None,
        mixture=_mixture(config, index),
    )


def _attention_scale(config: Mapping[str, Any]) -> float:
    if "attention_multiplier" in config:
        return float(config["attention_multiplier"])
    return float(config.get("query_pre_attn_scalar", config["head_dim"]) ** -0.5)


def _mixture(config: Mapping[str, Any], index: int) -> Mixture | None:
    num_experts = config.get("num_local_experts", 0)
    if num_experts == 0 or index in config.get("mlp_only_layers", ()):
        return None
    if (index + 1) % config.get("decoder_sparse_step", 1) != 0:
        return None
    return Mixture(
        num_experts=num_experts,
        num_chosen=config["num_experts_per_tok"],
        intermediate_size=config.get("moe_intermediate_size", config["intermediate_size"]),
        normalize=config.get("norm_topk_prob", True),
    )


def _ropes(config: Mapping[str, Any], max_model_len: int) -> dict[str, Rope]:
    """By layer type where a model has several, else under "all"."""
    settings = config["rope_parameters"]
    by_kind = settings if config["model_type"] == "gemma3_text" else {"all": settings}
    ropes = {}
    for kind, rope in by_kind.items():
        if kind != "all" and kind not in config["layer_types"]:
            continue
        refuse_batch_dependent_rope(rope, max_model_len)
        ropes[kind] = make_rope(
            rope,
            head_dim=config["head_dim"],
            default_is_partial=config["model_type"] == "phi3",
            max_position_embeddings=config["max_position_embeddings"],
        )
    return ropes
