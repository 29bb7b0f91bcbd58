"""The checks one by one, where a whole checkpoint would say no more."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from tokenizers import AddedToken, Tokenizer, models

from adapters.checks import check_stored_types, check_vocabulary, resolve_max_model_len
from adapters.model_adapter import ModelAdapter, find_model_adapter
from adapters.tokenizer import Tokenizer as ModelTokenizer
from registry.checkpoint import Checkpoint, TensorHeader
from registry.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from registry.ggml_types import SUPPORTED_GGML_TYPES

PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def checkpoint(format: str, **tensors: tuple[str, tuple[int, ...]]) -> Checkpoint:
    headers = {
        name.replace("__", "."): TensorHeader(name, Path("f"), dtype, shape, 0, 1)
        for name, (dtype, shape) in tensors.items()
    }
    return Checkpoint(Path("model"), format, (Path("f"),), MappingProxyType(headers), {})


def tokenizer(size: int, added: int = 0) -> ModelTokenizer:
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    backend.add_special_tokens([AddedToken(f"<{index}>", special=True) for index in range(added)])
    backend.decoder = None
    return ModelTokenizer(backend, bos_token_id=None, eos_token_id=None, pad_token_id=None)


@pytest.mark.parametrize("dtype", sorted(SUPPORTED_GGML_TYPES))
def test_gguf_types_that_are_read(dtype) -> None:
    check_stored_types(checkpoint("gguf", a=(dtype, (2, 2))), {})


@pytest.mark.parametrize(
    ("format", "dtype"), [("gguf", "Q2_K"), ("gguf", "IQ4_XS"), ("safetensors", "F8_E4M3"), ("safetensors", "I8")]
)
def test_types_that_are_not(format, dtype) -> None:
    with pytest.raises(UnsupportedModelError, match=f"type {dtype} .*for example a"):
        check_stored_types(checkpoint(format, a=(dtype, (2, 2))), {})


def test_a_tokenizer_with_more_tokens_than_rows(caplog) -> None:
    rows = checkpoint("safetensors", model__embed_tokens__weight=("F32", (10, 4)))
    check_vocabulary(rows, tokenizer(8, added=2), 10)
    with pytest.raises(CheckpointError, match="11 tokens but the model's embedding only 10 rows"):
        check_vocabulary(rows, tokenizer(11), 10)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        check_vocabulary(rows, tokenizer(10, added=2), 10)
    assert "2 added tokens past the model's 10 embedding rows, from '<0>' on" in caplog.text


def adapter_with(config: dict[str, object]) -> ModelAdapter:
    return find_model_adapter(config)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"rope_type": "longrope"}])
def test_longrope_is_served_up_to_its_original_context(key, kind, caplog) -> None:
    config = {**PHI3, key: {**kind, **FACTORS, "rope_theta": 10000.0}}
    adapter = adapter_with(config)
    with caplog.at_level(logging.INFO):
        assert resolve_max_model_len(adapter, config, None) == 4096
    assert "context limited to 4096 of 131072 tokens" in caplog.text
    assert resolve_max_model_len(adapter, config, 4000) == 4000
    with pytest.raises(InvalidRequestError, match=r"4097 is more than 4096: .*longrope.*--max-model-len 4096"):
        resolve_max_model_len(adapter, config, 4097)


def test_longrope_without_its_original_context() -> None:
    config = {**PHI3, "rope_scaling": {"type": "longrope", **FACTORS}}
    adapter = adapter_with(config)
    del config["original_max_position_embeddings"]
    with pytest.raises(CheckpointError, match="needs original_max_position_embeddings"):
        resolve_max_model_len(adapter, config, None)


def test_rope_settings_of_each_kind_of_layer_are_looked_at() -> None:
    config = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
        },
    }
    adapter = adapter_with(config)
    assert [rope["rope_type"] for rope in adapter.rope_parameters] == ["default", "dynamic"]
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        resolve_max_model_len(adapter, config, None)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rope_settings_that_depend_on_the_position_alone(kind) -> None:
    adapter = replace(adapter_with(PHI3), rope_parameters=({"rope_type": kind},))
    assert resolve_max_model_len(adapter, {}, None) == 131072


@pytest.mark.parametrize(("requested", "match"), [(0, "must be positive"), (131073, "more than 131072")])
def test_context_lengths_that_are_not_possible(requested, match) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        resolve_max_model_len(adapter_with(PHI3), PHI3, requested)


def test_rope_settings_of_the_wrong_type() -> None:
    with pytest.raises(CheckpointError, match=r"rope_scaling is str|not valid"):
        adapter_with(json.loads(json.dumps({**PHI3, "rope_scaling": "linear"})))
