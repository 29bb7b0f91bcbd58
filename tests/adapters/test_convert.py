"""Converted directories load in transformers with the same weights, ids and answers; nothing half-written remains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapters.convert import convert_checkpoint
from adapters.gguf import config_from_gguf
from adapters.tokenizer import load_tokenizer
from adapters.weights import read_weights
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError, InternalError, InvalidRequestError, UnsupportedModelError
from tests.fakes.tiny_gguf import byte_level_metadata, tensors_of, train_byte_level, write_gguf


def _quiet(line: str) -> None:
    pass


@pytest.fixture
def tiny_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny_model: Any) -> Path:
    vocabulary = byte_level_metadata(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm")
    metadata = {
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.chat_template": "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    tensors = tensors_of(tiny_model, "llama", permuted_heads={"q_proj": 4, "k_proj": 2})
    return write_gguf(tmp_path / "tiny.gguf", "llama", metadata | vocabulary, tensors)


def test_gguf_becomes_a_directory_that_transformers_loads(tmp_path: Path, tiny_gguf: Path, tiny_model: Any) -> None:
    lines: list[str] = []
    convert_checkpoint(tiny_gguf, tmp_path / "out", report=lines.append)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.float32  # as stored
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.generation_config.eos_token_id == 2

    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tiny_gguf)
    for text in ("Hello 123 world", "<|im_start|>x<|im_end|>\n"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>Hi<|im_end|>"
    assert any("tensors" in line for line in lines)
    assert str(tmp_path / "out") in lines[-1]


def test_dtype_and_shards(tmp_path: Path, tiny_gguf: Path, tiny_model: Any) -> None:
    convert_checkpoint(tiny_gguf, tmp_path / "out", dtype="bfloat16", report=_quiet, max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_bin_keeps_its_companion_files(tmp_path: Path, tiny_model: Any, dtype: str | None) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    torch.save(tiny_model.state_dict(), source / "pytorch_model.bin")
    tiny_model.config.save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "notes.py").write_text("import nothing")
    convert_checkpoint(source, tmp_path / "out", dtype=dtype, report=_quiet)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.float16 if dtype else torch.float32
    assert all(torch.equal(weights[name], value.to(expected)) for name, value in tiny_model.state_dict().items())
    if dtype:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == expected


def _assert_nothing_left(directory: Path, *names: str) -> None:
    assert sorted(file.name for file in directory.iterdir()) == sorted(names)


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(tiny_gguf, tmp_path / "out", report=_quiet)
    assert not list((tmp_path / "out").iterdir())
    _assert_nothing_left(tmp_path, "out", "tiny.gguf")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": np.zeros((400, 8), np.float32),
        "blk.0.ffn_gate_inp.weight": np.zeros((4, 8), np.float32),
    }
    metadata = {
        "llama.context_length": 8,
        "llama.embedding_length": 8,
        "llama.block_count": 1,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }
    vocabulary = byte_level_metadata(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm")
    path = write_gguf(tmp_path / "bad.gguf", "llama", metadata | vocabulary, tensors)
    with pytest.raises(CheckpointError, match="ffn_gate_inp"):
        convert_checkpoint(path, tmp_path / "out", report=_quiet)
    path = write_gguf(path, "llama", metadata | vocabulary | {"tokenizer.ggml.pre": "other"}, tensors)
    with pytest.raises(UnsupportedModelError, match="other"):
        convert_checkpoint(path, tmp_path / "out", report=_quiet)
    _assert_nothing_left(tmp_path, "bad.gguf")


def test_requests_that_make_no_sense(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(InvalidRequestError, match="int8"):
        convert_checkpoint(tiny_gguf, tmp_path / "out", dtype="int8", report=_quiet)
    with pytest.raises(CheckpointError, match="create it first"):
        convert_checkpoint(tiny_gguf, tmp_path / "no" / "out", report=_quiet)
    convert_checkpoint(tiny_gguf, tmp_path / "out", report=_quiet)
    with pytest.raises(InvalidRequestError, match="safetensors already"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", report=_quiet)


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InternalError, match="no space left"):
        convert_checkpoint(tiny_gguf, tmp_path / "out", report=_quiet)
    _assert_nothing_left(tmp_path, "tiny.gguf")


def test_the_small_model(
    smollm2_gguf: Path, smollm2_dir: Path, smollm2_token_vectors: list[tuple[str, list[int]]]
) -> None:
    converted = load_file(smollm2_dir / "model.safetensors")
    assert len(converted) == 272
    checkpoint = read_checkpoint(smollm2_gguf)
    for name, weight in read_weights(checkpoint, config_from_gguf(checkpoint)):
        assert torch.equal(converted[name], weight.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for text, ids in smollm2_token_vectors:
        assert tokenizer(text)["input_ids"] == ids
    model, info = AutoModelForCausalLM.from_pretrained(smollm2_dir, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
