"""A traced step: every operation has one row, and tracing leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.model_parts import OpKind
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.trace import TraceRow
from model_worker.inspection.measured_step import StepShape, fits, time_step, trace_step
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, make_tiny_plan

HIDDEN, INNER = 32, 48  # of the tiny models


def load(name: str, path: Path, *, num_blocks: int = 128) -> ModelRunner:
    torch.set_num_threads(1)
    build_tiny_model(name).save_pretrained(path)
    config = EngineConfig(CacheConfig(block_size=8, num_blocks=num_blocks), SchedulerConfig(max_num_batched_tokens=64))
    return ModelRunner(make_tiny_plan(path), config)


def _row(rows: tuple[TraceRow, ...], layer: int | None, name: str) -> TraceRow:
    (row,) = [row for row in rows if (row.layer, row.name) == (layer, name)]
    return row


def test_the_rows_of_a_decode_step(tmp_path: Path) -> None:
    trace = trace_step(load("llama", tmp_path), StepShape("decode", 3, 20), num_runs=2)
    kinds = Counter(row.kind for row in trace.rows)
    assert kinds == {
        OpKind.PREPARE: 1, OpKind.EMBEDDING: 1, OpKind.ROTARY: 1, OpKind.NORM: 2 * 2 + 1, OpKind.QKV: 2 * 3,
        OpKind.ATTENTION: 2, OpKind.ATTENTION_OUTPUT: 2, OpKind.GATE_UP: 2 * 2, OpKind.ACTIVATION: 2, OpKind.DOWN: 2,
        OpKind.BETWEEN: 2 * 3 + 1, OpKind.HEAD: 1, OpKind.SAMPLE: 1,
    }  # fmt: skip
    assert [row.begin_ns for row in trace.rows] == sorted(row.begin_ns for row in trace.rows)
    assert all(row.self_ns >= 0 for row in trace.rows)
    assert 0 < sum(row.self_ns for row in trace.rows) <= trace.traced_ns

    up = _row(trace.rows, 1, "mlp.up_proj")
    assert (up.inputs, up.outputs, up.dtype) == (((3, HIDDEN),), ((3, INNER),), "float32")
    assert (up.weight_bytes, up.bytes_moved) == (HIDDEN * INNER * 4, (HIDDEN * INNER + 3 * (HIDDEN + INNER)) * 4)
    assert up.flops == 2 * 3 * HIDDEN * INNER

    attention = _row(trace.rows, 0, "self_attn.paged_attention")
    assert attention.inputs == ((3, 4, 8), (3, 2, 8), (3, 2, 8))
    query_and_out, new_kv = 2 * 3 * 4 * 8, 3 * 2 * 2 * 8  # K and V of 2 heads of 8
    assert attention.bytes_moved == (query_and_out + 2 * new_kv + 20 * new_kv) * 4
    assert attention.flops == 2 * 2 * 3 * 20 * 4 * 8

    head = _row(trace.rows, None, "lm_head")
    assert (head.inputs, head.outputs) == (((3, HIDDEN),), ((3, VOCAB_SIZE),))
    assert _row(trace.rows, None, "model.embed_tokens").weight_bytes == 3 * HIDDEN * 4


def test_prefill_sees_half_of_the_pairs_and_samples_one_row(tmp_path: Path) -> None:
    trace = trace_step(load("llama", tmp_path), StepShape("prefill", 1, 24), num_runs=1)
    attention = _row(trace.rows, 0, "self_attn.paged_attention")
    assert attention.flops == 2 * 2 * (24 * 25 // 2) * 4 * 8
    assert _row(trace.rows, None, "lm_head").inputs == ((1, HIDDEN),)
    assert _row(trace.rows, None, "model.embed_tokens").outputs == ((24, HIDDEN),)


def test_a_window_bounds_what_attention_reads(tmp_path: Path) -> None:
    trace = trace_step(load("qwen2-mixed-window", tmp_path), StepShape("decode", 1, 40), num_runs=1)
    windowed, full = [row.bytes_moved for row in trace.rows if row.kind is OpKind.ATTENTION]
    assert full - windowed == (40 - 20) * 2 * 2 * 8 * 4


def test_only_the_experts_that_were_chosen_count(tmp_path: Path) -> None:
    trace = trace_step(load("qwen3_moe", tmp_path), StepShape("decode", 1, 8), num_runs=1)
    expert = 3 * HIDDEN * 24  # gate, up and down
    for row in (row for row in trace.rows if row.kind is OpKind.EXPERTS):
        assert row.weight_bytes == 2 * expert * 4
        assert row.flops == 2 * 2 * expert
    assert sum(row.kind is OpKind.ROUTER for row in trace.rows) == 2


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "opt-projected", "bloom", "falcon-alibi", "deepseek_v3", "gpt_oss", "llama4-chunked"]
)
def test_every_family_can_be_traced(name: str, tmp_path: Path) -> None:
    runner = load(name, tmp_path)
    trace = trace_step(runner, StepShape("decode", 2, 9), num_runs=1)
    kinds = Counter(row.kind for row in trace.rows)
    num_layers = len(runner.model.attentions)
    assert kinds[OpKind.ATTENTION] == num_layers
    assert kinds[OpKind.QKV] >= num_layers
    assert kinds[OpKind.ATTENTION_OUTPUT] == num_layers
    assert kinds[OpKind.ACTIVATION] >= num_layers or name == "gpt_oss"  # its experts compute their own
    assert kinds[OpKind.LINEAR] == (2 if name == "opt-projected" else 0)
    assert kinds[OpKind.HEAD] == 1


def test_tracing_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    runner = load("llama", tmp_path)
    before = [(module, len(module._forward_hooks)) for module in runner.model.causal_lm.modules()]
    attentions = [module.self_attn.paged_attention for module in runner.model.causal_lm.model.layers]
    trace_step(runner, StepShape("decode", 1, 8), num_runs=1)
    assert [(module, len(module._forward_hooks)) for module in runner.model.causal_lm.modules()] == before
    assert [module.self_attn.paged_attention for module in runner.model.causal_lm.model.layers] == attentions
    with pytest.raises(RuntimeError, match="halfway"), runner.model.trace():
        raise RuntimeError("halfway")
    assert [(module, len(module._forward_hooks)) for module in runner.model.causal_lm.modules()] == before


def test_steps_that_the_cache_cannot_hold_are_told(tmp_path: Path) -> None:
    runner = load("llama", tmp_path, num_blocks=32)
    assert fits(runner, StepShape("decode", 4, 64))
    assert not fits(runner, StepShape("decode", 5, 64))
    assert fits(runner, StepShape("prefill", 1, 64))
    assert not fits(runner, StepShape("prefill", 1, 65))  # more than max_num_batched_tokens
    assert time_step(runner, StepShape("decode", 4, 64), num_runs=1).duration_ns > 0
