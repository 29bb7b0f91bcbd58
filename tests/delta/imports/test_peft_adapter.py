from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from delta.__main__ import main
from delta.delta_config import read_delta_config
from tests.delta.tiny_llama import save_tiny_llama


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
