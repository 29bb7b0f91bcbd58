"""The loader says what became of every tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model_worker.engine.load_report import LoadReport, Outcome
from model_worker.engine.loader import load_model
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


def _load(name: str, path: Path, **more: torch.Tensor) -> LoadReport:
    build_tiny_model(name).save_pretrained(path)
    if more:
        save_file(load_file(path / "model.safetensors") | more, path / "model.safetensors")
    report = LoadReport()
    load_model(make_tiny_plan(path), torch.device("cpu"), report)
    return report


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    report = _load("llama", tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.name: tensor.num_bytes for tensor in report.tensors} == {
        name: tensor.nbytes for name, tensor in stored.items()
    }
    ignored = [tensor for tensor in report.tensors if tensor.outcome is Outcome.IGNORED]
    assert [(tensor.name, tensor.weight) for tensor in ignored] == [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None)
    ]
    assert {tensor.outcome for tensor in report.tensors} == {Outcome.FILLED, Outcome.IGNORED}
    assert report.ties == {}
    assert report.seconds.keys() == {"build", "read", "fill", "finish"}
    assert min(report.seconds.values()) >= 0


def test_experts_become_one_weight(tmp_path: Path) -> None:
    experts = [tensor for tensor in _load("mixtral", tmp_path).tensors if ".experts." in tensor.name]
    assert {tensor.outcome for tensor in experts} == {Outcome.FUSED}
    assert len(experts) == 2 * 4 * 3  # layers, experts, matrices
    assert len({tensor.weight for tensor in experts}) == 2 * 2


def test_a_second_copy_of_a_tied_weight_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model"
    build_tiny_model("llama-tied").save_pretrained(path)
    head = load_file(path / "model.safetensors")["model.embed_tokens.weight"].clone()
    report = _load("llama-tied", path, **{"lm_head.weight": head})
    assert report.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [tensor.outcome for tensor in report.tensors].count(Outcome.TIED) == 1
