"""The native decoder under inspection: fused weights and operations, and what they read."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import plan_load
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.load_report import Outcome
from model_worker.engine.model_parts import OpKind
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models import native_decoder, native_operations
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.build import build_library, find_compiler
from model_worker.engine.ops.cpu.machine_level import machine_levels
from model_worker.engine.ops.cpu.program import KernelLibrary, new_buffer
from model_worker.inspection.footprint import measure_footprint
from model_worker.inspection.html_report import format_html
from model_worker.inspection.inspection import Inspection, InspectRequest, inspect_model
from model_worker.inspection.load_summary import FusedWeights
from model_worker.inspection.text_report import format_text
from registry.paths import default_cache_dir
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

HIDDEN, INNER, ROWS = 32, 48, 3


@pytest.fixture(scope="module")
def kernels() -> KernelLibrary:
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    level = machine_levels()[0]
    return KernelLibrary(build_library(level, default_cache_dir(os.environ)), level)


def _inspect(path: Path, kernels: KernelLibrary, *, quantization: str | None = None) -> Inspection:
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(path)
    config = EngineConfig(
        CacheConfig(block_size=8, num_blocks=32), SchedulerConfig(max_num_batched_tokens=64), model_impl="native"
    )
    plan = replace(make_tiny_plan(path), quantization=quantization)
    request = InspectRequest(rows=(ROWS,), contexts=(20,), memory_bytes=10**6)
    return inspect_model(plan, config, request, name="tiny", kernels=kernels)


def test_fused_operations(tmp_path: Path, kernels: KernelLibrary) -> None:
    inspection = _inspect(tmp_path, kernels)
    assert inspection.model.implementation == "NativeDecoder"
    assert inspection.trace is not None
    rows = inspection.trace.decode.rows
    assert Counter(row.kind for row in rows) == {
        OpKind.PREPARE: 1, OpKind.EMBEDDING: 1, OpKind.ROTARY: 2 + 1, OpKind.NORM: 2 * 2 + 1, OpKind.QKV: 2,
        OpKind.ATTENTION: 2, OpKind.ATTENTION_OUTPUT: 2, OpKind.GATE_UP: 2, OpKind.DOWN: 2, OpKind.HEAD: 1,
        OpKind.SAMPLE: 1,
    }  # fmt: skip
    (qkv,) = [row for row in rows if (row.layer, row.kind) == (1, OpKind.QKV)]
    assert (qkv.inputs, qkv.outputs) == (((ROWS, HIDDEN),), ((ROWS, 2 * HIDDEN),))
    assert qkv.flops == 2 * ROWS * HIDDEN * 2 * HIDDEN
    assert qkv.weight_bytes == HIDDEN * 2 * HIDDEN * 4
    assert 0 < sum(row.self_ns for row in rows) <= inspection.trace.decode.traced_ns
    assert "layers 0-1, 2 times" in format_text(inspection)
    assert "layers 0-1, 2 times" in format_html(inspection)


def test_fused_weights(tmp_path: Path, kernels: KernelLibrary) -> None:
    load = _inspect(tmp_path, kernels).load
    assert load is not None
    assert set(load.fused) == {FusedWeights("layers.*.gate_up", 2, 4), FusedWeights("layers.*.qkv", 2, 6)}
    assert {count.outcome: count.num_tensors for count in load.outcomes} == {Outcome.FILLED: 11, Outcome.FUSED: 10}


@pytest.mark.parametrize("model", ["llama", "gemma2", "mixtral", "qwen3_moe"])
def test_activations_are_an_estimate_from_above(
    model: str, tmp_path: Path, kernels: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[torch.Tensor] = []

    def note(*size: int) -> torch.Tensor:
        allocated.append(new_buffer(*size))
        return allocated[-1]

    for module in (native_decoder, native_operations):
        monkeypatch.setattr(module, "new_buffer", note)
    build_tiny_model(model).save_pretrained(tmp_path)
    config = EngineConfig(CacheConfig(num_blocks=32), SchedulerConfig(max_num_batched_tokens=256), model_impl="native")
    plan = make_tiny_plan(tmp_path)
    ModelRunner(plan, config, kernels=kernels)  # computes a step, for which it allocates the buffers
    footprint = measure_footprint(plan, contexts=(), block_size=16, max_num_batched_tokens=256, free_bytes=0)
    buffers_bytes = sum(buffer.nbytes for buffer in allocated)
    assert buffers_bytes < footprint.activations_bytes < 3 * buffers_bytes


def test_the_planned_weights_are_what_the_engine_has(smollm2_gguf: Path, kernels: KernelLibrary) -> None:
    config = EngineConfig(CacheConfig(num_blocks=8), model_impl="native")
    plan = plan_load(smollm2_gguf, native_model_types=NATIVE_MODEL_TYPES)
    request = InspectRequest(sections=("footprint", "trace"), rows=(1,), contexts=(16,))
    inspection = inspect_model(plan, config, request, name="small", kernels=kernels)
    assert inspection.trace is not None
    assert inspection.footprint is not None
    matrices_bytes = sum(row.weight_bytes for row in inspection.trace.decode.rows)  # the embedding as the head
    assert inspection.footprint.planned_bytes == pytest.approx(matrices_bytes, rel=0.001)


def test_quantized_weights_show_in_the_trace(tmp_path: Path, kernels: KernelLibrary) -> None:
    inspection = _inspect(tmp_path, kernels, quantization="int8")
    assert inspection.trace is not None
    rows = inspection.trace.decode.rows
    (gate_up,) = [row for row in rows if (row.layer, row.kind) == (0, OpKind.GATE_UP)]
    assert gate_up.dtype == "int8"
    assert gate_up.weight_bytes < 2 * INNER * HIDDEN * 4
    if kernels.level.has_integer_dot:
        assert OpKind.QUANTIZE in {row.kind for row in rows}
        assert "--series-quantize" in format_html(inspection)
        *_, head_input, head, _ = inspection.flowcharts[0].sections[-1].blocks
        assert (head_input.kind, head.kind) == (OpKind.QUANTIZE, OpKind.HEAD)
        assert head_input.inputs == head.inputs == ("[R, 32]",)
