"""The model adapter: what one family's config means to us, whatever names the family gives its fields.

It is chosen by `model_type` and `architectures` of the config, never by a path or a name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from adapters.decoder_config import DECODER_MODEL_TYPES, complete_config
from registry.errors import CheckpointError, UnsupportedModelError
from registry.families import ModelFamily, find_family


@dataclass(frozen=True, slots=True)
class ModelAdapter:
    """One model's family and the sizes that loading it depends on.

    Attributes:
        family: the family that was chosen.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP, that of all active experts together.
        num_active_experts: that compute a token; 0: it is no mixture.
        vocab_size: rows of the embedding and of the logits.
        max_position_embeddings: most positions that the model was made for.
        kv_values_per_token: numbers that one token adds to the KV cache, over all layers.
        rope_parameters: one mapping for each kind of layer, both spellings of the config resolved; empty without rope.
    """

    family: ModelFamily
    hidden_size: int
    intermediate_size: int
    num_active_experts: int
    vocab_size: int
    max_position_embeddings: int
    kv_values_per_token: int
    rope_parameters: tuple[Mapping[str, Any], ...]


def find_model_adapter(config: Mapping[str, Any]) -> ModelAdapter:
    """The adapter of a Hugging Face config, given as the dict of config.json.

    Raises:
        CheckpointError: the config names no model_type, or its values are not valid for it.
        UnsupportedModelError: the family is unknown or refused; the message says why.
    """
    family = _family(config)
    if config["model_type"] in DECODER_MODEL_TYPES:
        full: Any = SimpleNamespace(**complete_config(config))
    else:
        full = _complete_with_transformers(config)
    head_dim = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    return ModelAdapter(
        family=family,
        hidden_size=full.hidden_size,
        intermediate_size=_intermediate_size(full),
        num_active_experts=getattr(full, "num_experts_per_tok", None) or 0,
        vocab_size=full.vocab_size,
        max_position_embeddings=_max_position_embeddings(full, family),
        kv_values_per_token=full.num_hidden_layers * _kv_values_per_layer(full, head_dim),
        rope_parameters=rope_parameters(config),
    )


def _complete_with_transformers(config: Mapping[str, Any]) -> Any:
    """transformers' own configuration object, for the families that adapters/decoder_config.py does not have."""
    # Imported here because it takes 2.4 s, which a worker with one of the other families need not spend.
    from transformers import AutoConfig

    model_type = str(config["model_type"])
    # A copy, because transformers completes the nested settings in place.
    values = {key: copy.deepcopy(config[key]) for key in config if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:
        # transformers validates each family with errors of its own; all of them mean that the file is wrong.
        raise CheckpointError(f"config.json is not valid for model_type {model_type!r}: {error}") from error


def rope_parameters(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The rotary settings of a config: `rope_parameters` (flat, or one for each kind of layer) or `rope_scaling`."""
    found: list[Mapping[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {key} is {type(value).__name__}, where an object or null belongs")
        nested = [item for item in value.values() if isinstance(item, Mapping)]
        found.extend(nested or [value])
    return tuple(found)


def _family(config: Mapping[str, Any]) -> ModelFamily:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError("config.json names no model_type, so the model's architecture is unknown")
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, Sequence) or isinstance(architectures, str):
        raise CheckpointError("config.json: architectures must be a list of names")
    try:
        family = find_family(model_type, tuple(map(str, architectures)))
    except UnsupportedModelError as error:
        if "auto_map" not in config:
            raise
        raise UnsupportedModelError(
            f"{error.message} This checkpoint brings its own modeling code (auto_map); running code from a checkpoint "
            "(trust_remote_code) is not supported. Use a release of the model that is converted to a served family."
        ) from error
    if family.refused is not None:
        raise UnsupportedModelError(f"models of the family {family.name} ({model_type}) are refused: {family.refused}")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"this {model_type} model is an encoder-decoder; only decoder models are served")
    if config.get("is_causal", True) is not True or config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"the tokens of this {model_type} model see those after them (an embedding model); only causal models are "
            "served"
        )
    return family


def _kv_values_per_layer(full: Any, head_dim: int) -> int:
    heads = full.num_attention_heads
    if full.model_type == "deepseek_v3":
        # Keys and values are cached expanded, not as the compressed latent.
        return int(heads * (full.qk_nope_head_dim + full.qk_rope_head_dim + full.v_head_dim))
    if full.model_type == "falcon":
        # The grouped architecture repeats its keys and values for every head before attention sees them.
        kv_heads = 1 if full.multi_query and not full.new_decoder_architecture else heads
    else:
        kv_heads = getattr(full, "num_key_value_heads", None) or heads
    return int(2 * kv_heads * head_dim)


def _intermediate_size(full: Any) -> int:
    names = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    dense = next((size for name in names if (size := getattr(full, name, None))), 4 * full.hidden_size)
    expert = getattr(full, "moe_intermediate_size", None)
    active = getattr(full, "num_experts_per_tok", None)
    return int(max(dense, (expert or dense) * active) if active else dense)


def _max_position_embeddings(full: Any, family: ModelFamily) -> int:
    for name in ("max_position_embeddings", "seq_length"):
        if value := getattr(full, name, None):
            return int(value)
    return family.context_length
