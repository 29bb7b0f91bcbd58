"""What is said of a load, against checkpoints that were changed on purpose."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapters import plan_load
from model_worker.engine.load_report import LoadReport, Outcome
from model_worker.engine.loader import load_model
from model_worker.inspection.load_summary import FusedWeights, LeftOut, LoadSummary, summarize_load
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


def _summary(path: Path) -> LoadSummary:
    plan, report = make_tiny_plan(path), LoadReport()
    load_model(plan, torch.device("cpu"), report)
    return summarize_load(plan, report, resident_bytes=0)


def test_shards_and_speed(tmp_path: Path) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    summary = _summary(tmp_path)
    assert len(summary.files) > 1
    assert summary.file_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert summary.total_s > 0
    assert summary.bytes_per_s > 0
    (count,) = summary.outcomes
    assert (count.outcome, count.num_tensors) == (Outcome.FILLED, 2 * 9 + 3)


def test_fused_experts(tmp_path: Path) -> None:
    build_tiny_model("mixtral").save_pretrained(tmp_path)
    assert set(_summary(tmp_path).fused) == {
        FusedWeights("model.layers.*.mlp.experts.gate_up_proj", 2, 2 * 4 * 2),
        FusedWeights("model.layers.*.mlp.experts.down_proj", 2, 2 * 4),
    }


def test_what_is_in_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "model"
    build_tiny_model("llama-tied").save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, path / "model.safetensors")
    summary = _summary(path)
    assert summary.ties == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert LeftOut("model.layers.*.self_attn.rotary_emb.inv_freq", 2, "computed from the config instead") in (
        summary.left_out
    )
    (tied,) = [left for left in summary.left_out if "tied" in left.reason]
    assert tied.num_tensors == 1
    assert [count.outcome for count in summary.outcomes] == [Outcome.FILLED, Outcome.TIED, Outcome.IGNORED]


def test_a_gguf_file(smollm2_gguf: Path) -> None:
    plan, report = plan_load(smollm2_gguf), LoadReport()
    report.seconds["read"] = 2.0
    summary = summarize_load(plan, report, resident_bytes=0)
    assert [file.name for file in summary.files] == [smollm2_gguf.name]
    assert summary.bytes_per_s == smollm2_gguf.stat().st_size / 2
    assert summary.left_out == ()
