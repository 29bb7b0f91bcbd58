"""Whatever is wrong with an adapter's files is an error that names the file, never a wrong result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta.peft.reader import read_peft_adapter
from registry.errors import CheckpointError, RootgraftError, UnsupportedModelError
from tests.fakes.peft_adapters import TinyBase, make_adapter
from tests.fakes.tiny_models import build_tiny_model

_FUSED = ["experts.gate_up_proj", "experts.down_proj"]
_ADAPTERS = {
    "lora": ("llama", LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"])),
    "dora": ("llama", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "whole": ("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])),
    "tokens": ("llama-tied", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 1])),
    "bias": ("gpt2", LoraConfig(r=4, target_modules=["c_attn"], bias="all", lora_bias=True)),
    "experts": ("qwen3_moe", LoraConfig(r=4, target_modules=["o_proj"], target_parameters=_FUSED)),
}


def _base(model_name: str, digest: str | None = None) -> TinyBase:
    return TinyBase(build_tiny_model(model_name), digest)


def _make(kind: str, path: Path) -> TinyBase:
    model_name, config = _ADAPTERS[kind]
    model = build_tiny_model(model_name)
    make_adapter(model, config, path)
    return TinyBase(model)


def _rewrite(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    file = path / "adapter_model.safetensors"
    file.unlink()
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, file, metadata)


def _is_refused(path: Path, base: TinyBase) -> bool:
    try:
        read_peft_adapter(path, base)
    except CheckpointError as error:
        return "adapter_model.safetensors" in error.message
    return False


def _set(path: Path, **fields: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", _ADAPTERS)
def test_no_tensor_can_be_missing_renamed_reshaped_or_not_finite(kind: str, tmp_path: Path) -> None:
    base = _make(kind, tmp_path)
    read_peft_adapter(tmp_path, base)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    # PEFT writes copies of the base's embeddings beside low-rank terms for them: these say nothing new.
    names = [name for name in weights if not name.endswith("base_layer.weight")]
    for name in names:
        tensor, others = weights[name], {key: value for key, value in weights.items() if key != name}
        spoiled = tensor.clone()
        spoiled.view(-1)[-1] = random.Random(name).choice([float("nan"), float("inf"), -float("inf")])
        wrong = {
            "missing": others,
            "renamed": {**others, name.replace("layers.0", "layers.7") + ".x": tensor},
            "flat": {**others, name: torch.cat((tensor.flatten(), tensor.flatten()))},
            "cut": {**others, name: tensor[:-1]},
            "transposed": {**others, name: tensor[None]},
            "not finite": {**others, name: spoiled},
            "integers": {**others, name: tensor.long()},
            "one more": {**weights, f"{name}.again": tensor},
            "no prefix": {**others, name.removeprefix("base_model.model."): tensor},
        }
        for what, changed in wrong.items():
            _rewrite(tmp_path, changed)
            assert _is_refused(tmp_path, base), f"{name} was read although it is {what}"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_no_damaged_file_is_read(name: str, tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    make_adapter(model, _ADAPTERS["dora"][1], tmp_path, safe_serialization=name.endswith("safetensors"))
    base, file = TinyBase(model), tmp_path / name
    content = file.read_bytes()
    read_peft_adapter(tmp_path, base)
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            read_peft_adapter(tmp_path, base)
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(CheckpointError, match=name):
        read_peft_adapter(tmp_path, base)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    base = _make("dora", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": Path("/")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        read_peft_adapter(tmp_path, base)


def test_a_rank_that_contradicts_the_shapes_is_refused(tmp_path: Path) -> None:
    base = _make("lora", tmp_path)
    for fields in ({"r": 8}, {"rank_pattern": {"layers.1.*": 2}}):
        _set(tmp_path, **{"r": 4, "rank_pattern": {}} | fields)
        with pytest.raises(CheckpointError, match=r"lora_A.weight is \[4, (32|48)\], but"):
            read_peft_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens", "k_proj"]}, "k_proj.lora_A.weight is missing"),
        ({"target_modules": ["down_proj", "embed_tokens"]}, "have no place"),
        ({"layers_to_transform": [0]}, "have no place"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "have no place"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save names 'classifier'"),
        ({"modules_to_save": ["norm"]}, "norm.weight is missing"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters names 'experts.down_proj'"),
        ({"trainable_token_indices": {"lm_head": [500]}}, "goes to 500"),
        ({"trainable_token_indices": {"head": [1], "nothing": [2]}}, "is missing|names 'nothing'"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"lora_bias": True}, "lora_B.bias is missing"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(
    fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    base = _make("lora", tmp_path)
    _set(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=reason):
        read_peft_adapter(tmp_path, base)


def test_no_module_that_is_changed_is_refused(tmp_path: Path) -> None:
    base = _make("dora", tmp_path)
    _rewrite(tmp_path, {})
    _set(tmp_path, target_modules=["nothing"])
    with pytest.raises(CheckpointError, match="changes no module"):
        read_peft_adapter(tmp_path, base)


def test_two_changes_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    base = _make("lora", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}
    _rewrite(tmp_path, weights | rows)
    _set(tmp_path, trainable_token_indices=[1])
    with pytest.raises(CheckpointError, match="in two ways that exclude each other"):
        read_peft_adapter(tmp_path, base)


def test_scales_that_overflow_are_refused(tmp_path: Path) -> None:
    base = _make("dora", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    _set(tmp_path, use_dora=False, lora_alpha=2**30)
    _rewrite(tmp_path, {name: tensor * 1e31 for name, tensor in weights.items() if "magnitude" not in name})
    with pytest.raises(CheckpointError, match="values are not finite"):
        read_peft_adapter(tmp_path, base)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = _make("lora", tmp_path)
    with pytest.raises(CheckpointError, match=r"have no place|is missing|need"):
        read_peft_adapter(tmp_path, _base("gpt2"))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    _rewrite(tmp_path, weights, {"base_digest": "sha256:1"})
    read_peft_adapter(tmp_path, base)
    read_peft_adapter(tmp_path, _base("llama", "sha256:1"))
    with pytest.raises(CheckpointError, match="was trained on the base sha256:1, but this one is sha256:2"):
        read_peft_adapter(tmp_path, _base("llama", "sha256:2"))


def test_copies_of_another_bases_embeddings_are_refused(tmp_path: Path) -> None:
    base = _make("lora", tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    copy = next(name for name in weights if name.endswith("embed_tokens.base_layer.weight"))
    rounded = {**weights, copy: weights[copy].bfloat16()}
    _rewrite(tmp_path, rounded)
    read_peft_adapter(tmp_path, base)
    _rewrite(tmp_path, {**weights, copy: weights[copy] + 0.01})
    with pytest.raises(CheckpointError, match="is not the weight of this base"):
        read_peft_adapter(tmp_path, base)
    _rewrite(tmp_path, {**weights, copy: torch.cat((weights[copy], weights[copy][:1]))})
    with pytest.raises(UnsupportedModelError, match="lacks rows of lm_head"):
        read_peft_adapter(tmp_path, base)
    _rewrite(tmp_path, {**weights, copy: weights[copy][:-1]})
    with pytest.raises(CheckpointError, match="smaller vocabulary"):
        read_peft_adapter(tmp_path, base)


def test_files_that_are_not_there_or_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    base = _make("dora", tmp_path / "a")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        other = tmp_path / name.replace(".", "-")
        shutil.copytree(tmp_path / "a", other)
        (other / name).unlink()
        with pytest.raises(CheckpointError, match="adapter"):
            read_peft_adapter(other, base)
        (other / name).symlink_to(tmp_path / "a" / name)
        with pytest.raises(CheckpointError, match=name):
            read_peft_adapter(other, base)
        (other / name).unlink()
        shutil.copy(tmp_path / "a" / name, other / "inside")
        (other / name).symlink_to("inside")
        read_peft_adapter(other, base)
    with pytest.raises(CheckpointError):
        read_peft_adapter(tmp_path / "nothing", base)


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    base = _make("lora", tmp_path)
    terms = read_peft_adapter(tmp_path, base)
    before = [tensor.clone() for tensor in terms.tensors()]
    file = tmp_path / "adapter_model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert all(map(torch.equal, terms.tensors(), before))
    assert all(tensor.is_contiguous() for tensor in terms.tensors())


def test_the_dtype_of_the_file_is_kept_where_scales_are_exact(tmp_path: Path) -> None:
    base = _make("dora", tmp_path)
    _set(tmp_path, use_dora=False, lora_alpha=8)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in weights.items() if "magnitude" not in name}
    _rewrite(tmp_path, half)
    assert {tensor.dtype for tensor in read_peft_adapter(tmp_path, base).tensors()} == {torch.bfloat16}
    _set(tmp_path, lora_alpha=6.1)
    assert {tensor.dtype for tensor in read_peft_adapter(tmp_path, base).tensors()} == {torch.bfloat16, torch.float32}


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    base = _make("dora", tmp_path / "a")
    digest = read_peft_adapter(tmp_path / "a", base).digest
    assert digest.startswith("sha256:")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_peft_adapter(tmp_path / "b", base).digest == digest
    _set(tmp_path / "b", lora_alpha=9)
    assert read_peft_adapter(tmp_path / "b", base).digest != digest
    with pytest.raises(RootgraftError):
        read_peft_adapter(tmp_path / "c", base)
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() is not None
