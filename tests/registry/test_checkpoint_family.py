from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.checkpoint import read_checkpoint
from registry.checkpoint_family import checkpoint_family, require_served
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.gguf_bytes import U32, gguf, key_value, tensor_info, text_value


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file({"a": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def configure(directory: Path, config: object) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def test_by_config(directory: Path) -> None:
    configure(directory, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    assert checkpoint_family(read_checkpoint(directory)).name == "qwen3"
    configure(directory, {"model_type": "qwen3"})
    assert checkpoint_family(read_checkpoint(directory)).name == "qwen3"


def test_the_name_of_the_directory_means_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "llama-vicuna-mistral"
    directory.mkdir()
    save_file({"a": np.zeros(1, dtype=np.float32)}, directory / "model.safetensors")
    configure(directory, {"model_type": "gpt2"})
    assert checkpoint_family(read_checkpoint(directory)).name == "gpt2"


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "names no model_type"), ({"model_type": 1}, "names no model_type"), ([], "JSON list"),
     ({"model_type": "llama", "architectures": [1]}, "not a list of names")],
)  # fmt: skip
def test_damaged_config(directory: Path, config: object, message: str) -> None:
    configure(directory, config)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_family(read_checkpoint(directory))


def test_missing_config(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        checkpoint_family(read_checkpoint(directory))


def test_refused(directory: Path) -> None:
    configure(directory, {"model_type": "mamba"})
    with pytest.raises(UnsupportedModelError, match="mamba models are not served: it keeps a recurrent"):
        require_served(checkpoint_family(read_checkpoint(directory)))


@pytest.mark.parametrize(
    ("key_values", "family"),
    [
        ([text_value("general.architecture", "llama")], "llama"),
        ([text_value("general.architecture", "llama"), key_value("llama.expert_count", U32, b"\x08\0\0\0")], "mixtral"),
        ([text_value("general.architecture", "qwen2moe")], "qwen2_moe"),
    ],
)
def test_gguf(tmp_path: Path, key_values: list[bytes], family: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(key_values, [tensor_info("a", (8,))], bytes(32)))
    assert checkpoint_family(read_checkpoint(path)).name == family


def test_gguf_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([], [tensor_info("a", (8,))], bytes(32)))
    with pytest.raises(CheckpointError, match=r"names no general\.architecture"):
        checkpoint_family(read_checkpoint(path))
