"""A checkpoint of random weights in the shape of an 8B Llama 3.1, with a tokenizer of made-up words.

Norms are 1 and matrices are drawn with a deviation of 0.02, so that activations stay in range; what such a model says
means nothing, what it costs is what the real one costs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

DEVICE = "cuda"
"""Where the benchmarks for GPUs compute."""
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SHARD_BYTES = 2 << 30
_DEVIATION = 0.02
_INDEX = "model.safetensors.index.json"


def write_checkpoint(directory: Path, config: dict[str, Any], device: str) -> Path:
    """Write it to `directory`, or leave it as it is where it is there already. -> directory

    Args:
        device: that draws the numbers.
    """
    if (directory / _INDEX).is_file():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(config["vocab_size"]).save(str(directory / "tokenizer.json"))
    generator = torch.Generator(device).manual_seed(0)
    placed: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    num_shards = total_bytes = 0

    def write() -> None:
        nonlocal num_shards
        num_shards += 1
        name = f"model-{num_shards:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in parameter_shapes(config):
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
            tensor = drawn.normal_(0.0, _DEVIATION, generator=generator).cpu()
        shard[name] = tensor
        total_bytes += tensor.nbytes
        if sum(each.nbytes for each in shard.values()) >= _SHARD_BYTES:
            write()
    if shard:
        write()
    # Last: a checkpoint that was not finished has no index.
    index = {"metadata": {"total_size": total_bytes}, "weight_map": placed}
    (directory / _INDEX).write_text(json.dumps(index))
    return directory


def parameter_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def decoder_matrix_numbers(config: dict[str, Any]) -> int:
    """Numbers of the matrices that every token goes through; without embedding and head."""
    shapes = parameter_shapes(config)
    return sum(shape[0] * shape[1] for name, shape in shapes if len(shape) == 2 and ".layers." in name)


def head_numbers(config: dict[str, Any]) -> int:
    return int(config["vocab_size"] * config["hidden_size"])


def kv_bytes_per_token(config: dict[str, Any], number_bytes: int = 2) -> int:
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * number_bytes)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """A token for each byte, and for each further id a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(vocab_size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
