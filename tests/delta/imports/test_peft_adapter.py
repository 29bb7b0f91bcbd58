from __future__ import annotations

import itertools
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, MixtralForCausalLM

from delta.__main__ import main
from delta.delta_config import read_delta_config
from tests.delta.tiny_llama import save_tiny_llama
from tests.fakes.tiny_models import build_tiny_model


def _train(base: Path, **config: object) -> tuple[Path, dict[str, Tensor]]:
    """An adapter with random weights, and the weights that PEFT merges it to."""
    torch.manual_seed(1)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**config))  # type: ignore
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapter = base.parent / "adapter"
    model.save_pretrained(adapter)
    merged = model.merge_and_unload()
    return adapter, {name: weight.detach() for name, weight in merged.named_parameters()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base", 0)


def test_as_a_delta_and_as_a_model(tmp_path: Path, base: Path) -> None:
    adapter, expected = _train(base, r=2, target_modules=["q_proj", "down_proj"], use_rslora=True)
    assert main(["import", "peft", str(adapter), "--base", str(base), "--out", str(tmp_path / "delta")]) == 0
    config = read_delta_config(tmp_path / "delta")
    assert {tensor.codec for tensor in config.tensors.values()} == {"lowrank"}
    assert len(config.tensors) == 4
    for variant, out in ((adapter, "merged"), (tmp_path / "delta", "applied")):
        assert main(["merge", str(variant), "--base", str(base), "--out", str(tmp_path / out)]) == 0
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            tolerance = 1e-6 if out == "merged" else 5e-3  # a delta's factors are rounded to bfloat16
            torch.testing.assert_close(found[name], weight, rtol=0, atol=tolerance)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize("targets", [{"target_parameters": ["gate_up_proj", "down_proj"]}, {"target_modules": ["w1"]}])
def test_experts_that_are_stored_one_by_one(tmp_path: Path, targets: dict[str, list[str]]) -> None:
    """PEFT has those of one parameter; adapters from before transformers 5 a pair for each projection."""
    model = build_tiny_model("mixtral")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(base / "model.safetensors")
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if "target_parameters" in targets:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], **targets))  # type: ignore
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(adapter)
        expected = {name: weight.detach() for name, weight in wrapped.merge_and_unload().named_parameters()}
    else:
        tensors = {}
        for layer, index in itertools.product(range(2), range(4)):
            a, b = torch.randn(2, 32), torch.randn(48, 2) * 0.1
            expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"][index, :48] += b @ a
            module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{index}.w1"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        adapter.mkdir()
        save_file(tensors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", **targets}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    for command in (["merge", str(adapter)], ["import", "peft", str(adapter)]):
        out = tmp_path / command[0]
        assert main([*command, "--base", str(base), "--out", str(out)]) == 0
    delta = ["--base", str(base), "--delta", str(tmp_path / "import"), "--out", str(tmp_path / "applied")]
    assert main(["apply", *delta]) == 0
    for directory, tolerance in ((tmp_path / "merge", 1e-5), (tmp_path / "applied", 1e-2)):
        found = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for name, weight in found.named_parameters():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)


def test_other_dtype(tmp_path: Path, base: Path) -> None:
    adapter, expected = _train(base, r=2, target_modules=["q_proj"])
    flags = ["--base", str(base), "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]
    assert main(["merge", str(adapter), *flags]) == 0
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name].float(), expected[name], rtol=0.01, atol=0.01)


def test_what_is_no_product_is_merged(tmp_path: Path, base: Path) -> None:
    adapter, expected = _train(base, r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"])
    assert main(["import", "peft", str(adapter), "--base", str(base), "--out", str(tmp_path / "delta")]) == 0
    delta = ["--base", str(base), "--delta", str(tmp_path / "delta"), "--out", str(tmp_path / "model")]
    assert main(["apply", *delta]) == 0
    found = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name.replace("modules_to_save.default.", "")], weight, rtol=0, atol=1e-5)


def test_an_adapter_of_another_base(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = _train(base, r=2, target_modules=["q_proj"])
    (adapter / "adapter_model.safetensors").write_bytes(b"none")
    assert main(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "merged")]) == 1
    assert capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
