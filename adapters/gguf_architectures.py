"""The GGUF architectures that we read: which Hugging Face model each is, and what its tensors are called there.

Only an architecture whose tensors and metadata are all accounted for is listed; any other is refused by name.

Source: the GGUF specification's tensor names (ggml-org/ggml, docs/gguf.md) and the parameter names of the Hugging Face
model classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from registry.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """What turns a stored tensor into Hugging Face's.

    Attributes:
        apply: the tensor and the config -> the tensor.
        moves_whole_rows: only the order of rows changes, so that scales of rows may be rearranged like their weights.
    """

    apply: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]
    moves_whole_rows: bool


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One `general.architecture`.

    Attributes:
        name: as in the file, also the prefix of its metadata keys.
        model_type, architecture: of the Hugging Face config.
        tensors: GGUF name without `.weight` or `.bias` -> Hugging Face name; `blk.N.` and `{N}` are layers.
        rearrange: by GGUF name: what turns the stored tensor into Hugging Face's, given the config.
    """

    name: str
    model_type: str
    architecture: str
    tensors: Mapping[str, str]
    rearrange: Mapping[str, Rearrangement] = field(default_factory=dict)

    def translate(self, gguf_name: str) -> tuple[str, Rearrangement | None] | None:
        """Hugging Face name and rearrangement of a tensor; None for one that only repeats what the config says.

        Raises:
            CheckpointError: a tensor that this architecture does not have.
        """
        if gguf_name in _REPEATS_THE_CONFIG or _ROTARY_TABLE.fullmatch(gguf_name):
            return None
        stem, _, kind = gguf_name.rpartition(".")
        layer = _LAYER.match(stem)
        key = _LAYER.sub("blk.N.", stem)
        if kind not in ("weight", "bias") or key not in self.tensors:
            raise CheckpointError(
                f"the GGUF file has a tensor {gguf_name!r}, which a {self.name} model does not have; using the model "
                "without it would give wrong answers. Convert the model again, or use its safetensors release"
            )
        name = f"{self.tensors[key]}.{kind}"
        return name.replace("{N}", layer[1]) if layer else name, self.rearrange.get(key)


_LAYER = re.compile(r"^blk\.(\d+)\.")
# The rotary frequencies of Llama 3 are turned into rope parameters by adapters.gguf.
_REPEATS_THE_CONFIG = frozenset({"rope_freqs.weight"})
_ROTARY_TABLE = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


def find_architecture(metadata: Mapping[str, Any]) -> GgufArchitecture:
    """Raises UnsupportedModelError for a file whose architecture is not listed here, or that holds no whole model."""
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedModelError(f"the GGUF file holds a {metadata['general.type']}, not a model")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {name!r} is not supported (supported: {', '.join(GGUF_ARCHITECTURES)}). "
            "Use the model's safetensors release"
        )
    return GGUF_ARCHITECTURES[name]


def _interleaved_to_halves(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo the reordering of rotary dimensions in query and key projections.

    A `llama` file pairs rotary dimension 2i with 2i + 1, Hugging Face pairs i with i + head_dim/2:

        rows of one head, head_dim 6:   file  0 3 1 4 2 5   ->   Hugging Face  0 1 2 3 4 5
    """
    rows = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _query_rows(tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    return _interleaved_to_halves(tensor, config["num_attention_heads"])


def _key_rows(tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    return _interleaved_to_halves(tensor, config["num_key_value_heads"])


def _transposed(tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """GPT-2's Conv1D keeps its weights as [in, out]; its biases stay as they are."""
    return tensor.t() if tensor.dim() == 2 else tensor


_EMBEDDINGS_AND_HEAD = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "blk.N.attn_q": "model.layers.{N}.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.{N}.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.{N}.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.{N}.self_attn.o_proj",
}
_GATED_MLP = {
    "blk.N.ffn_gate": "model.layers.{N}.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.{N}.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.{N}.mlp.down_proj",
}
_PRE_NORMS = {
    "blk.N.attn_norm": "model.layers.{N}.input_layernorm",
    "blk.N.ffn_norm": "model.layers.{N}.post_attention_layernorm",
}
_QUERY_KEY_NORMS = {
    "blk.N.attn_q_norm": "model.layers.{N}.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.{N}.self_attn.k_norm",
}
_LLAMA_LIKE = _EMBEDDINGS_AND_HEAD | _ATTENTION | _GATED_MLP | _PRE_NORMS

GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    architecture.name: architecture
    for architecture in (
        GgufArchitecture(
            "llama",
            "llama",
            "LlamaForCausalLM",
            _LLAMA_LIKE,
            {"blk.N.attn_q": Rearrangement(_query_rows, True), "blk.N.attn_k": Rearrangement(_key_rows, True)},
        ),
        GgufArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA_LIKE),
        GgufArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", _LLAMA_LIKE | _QUERY_KEY_NORMS),
        GgufArchitecture(
            "olmo2",
            "olmo2",
            "Olmo2ForCausalLM",
            _EMBEDDINGS_AND_HEAD
            | _ATTENTION
            | _GATED_MLP
            | _QUERY_KEY_NORMS
            | {
                "blk.N.post_attention_norm": "model.layers.{N}.post_attention_layernorm",
                "blk.N.post_ffw_norm": "model.layers.{N}.post_feedforward_layernorm",
            },
        ),
        GgufArchitecture(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            {
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
                "blk.N.attn_norm": "transformer.h.{N}.ln_1",
                "blk.N.attn_qkv": "transformer.h.{N}.attn.c_attn",
                "blk.N.attn_output": "transformer.h.{N}.attn.c_proj",
                "blk.N.ffn_norm": "transformer.h.{N}.ln_2",
                "blk.N.ffn_up": "transformer.h.{N}.mlp.c_fc",
                "blk.N.ffn_down": "transformer.h.{N}.mlp.c_proj",
            },
            dict.fromkeys(
                ("blk.N.attn_qkv", "blk.N.attn_output", "blk.N.ffn_up", "blk.N.ffn_down"),
                Rearrangement(_transposed, False),
            ),
        ),
    )
}
