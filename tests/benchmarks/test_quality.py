from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model_worker.engine.ops.cpu.build import find_compiler


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("quality")


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_quantized_weights_are_compared_and_written_down(script: ModuleType, smollm2_dir: Path, tmp_path: Path) -> None:
    text, path = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("The capital of France is Paris, and the capital of Italy is Rome. " * 4)
    flags = ["--model-path", str(smollm2_dir), "--text", str(text), "--window", "40", "--precision", "float32,int4"]
    assert script.main([*flags, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["num_tokens"] == 61
    exact, rounded = report["results"]
    assert (exact["precision"], exact["kl"], exact["top1_agreement"]) == ("float32", 0.0, 1.0)
    assert (rounded["precision"], rounded["weights"]) == ("int4", "int4")
    assert 0.0 < rounded["kl"] < 0.05
    assert rounded["weights_bytes"] < 0.2 * exact["weights_bytes"]
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.1)


@pytest.mark.parametrize("flags", [["--precision", "int3"], ["--json", "/nonexistent/result.json"]])
def test_bad_flags_are_a_usage_error(script: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--model-path", "m", *flags])
    assert "error" in capsys.readouterr().err


def test_a_shifted_checkpoint_is_the_same_function(script: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    script.write_shifted(tmp_path / "model", tmp_path / "shifted", 5)
    shifted = LlamaForCausalLM.from_pretrained(tmp_path / "shifted")
    for name, weight in shifted.state_dict().items():
        assert not torch.equal(weight, model.state_dict()[name]), name
    tokens = torch.randint(50, (1, 20))
    with torch.no_grad():
        assert torch.allclose(shifted(tokens).logits, model(tokens).logits, atol=1e-5)


def test_only_the_plain_llama_shape_can_be_shifted(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="qwen2"):
        script.write_shifted(tmp_path, tmp_path / "shifted", 1)
