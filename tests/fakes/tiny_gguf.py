"""Tiny Hugging Face models and vocabularies as GGUF files, by the `gguf` package's own names and writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, and 12345 tokens don't fit!",
    "def main():\n    return [x ** 2 for x in range(100)]\n\n\n  # naïve café — “quotes” Привет, мир!",
    "Hello world, hello   worlds; we'll see they're I'D YOU'LL 99.5% <=> a+b=c ~ ^ | $5",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level BPE of 400 tokens with three special ones in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The `tokenizer.` keys of a GGUF file for a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "F32",
) -> Path:
    """Write a GGUF file: matrices as `dtype`, vectors as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[dtype if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensors_of(model: Any, architecture: str, *, permuted_heads: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A model's weights under GGUF names, stored as llama.cpp's converter stores them.

    Args:
        permuted_heads: Hugging Face projection name -> number of heads whose rotary rows are interleaved.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = parameter.detach().float().numpy()
        projection = name.split(".")[-2]
        if projection in permuted_heads:
            heads = permuted_heads[projection]
            split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = split.swapaxes(1, 2).reshape(weight.shape)
        if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            weight = weight.T
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        tensors[gguf_name] = np.ascontiguousarray(weight)
    return tensors
