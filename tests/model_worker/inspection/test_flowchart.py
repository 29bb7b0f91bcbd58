"""The flowchart says what the trace did, in its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.engine.model_parts import OpKind
from model_worker.inspection.flowchart import Flowchart, draw_flowchart, layer_ranges
from model_worker.inspection.measured_step import StepShape, trace_step
from model_worker.inspection.text_report import format_flowchart
from tests.model_worker.inspection.test_measured_step import load


def _chart(name: str, path: Path) -> Flowchart:
    trace = trace_step(load(name, path), StepShape("decode", 3, 20), num_runs=1)
    chart = draw_flowchart(trace)
    assert chart.total_ns == sum(row.self_ns for row in trace.rows)
    return chart


def test_a_llama(tmp_path: Path) -> None:
    chart = _chart("llama", tmp_path)
    assert [section.layers for section in chart.sections] == [(), (0, 1), ()]
    before, layers, after = chart.sections
    assert [block.kind for block in before.blocks] == [
        OpKind.PREPARE, OpKind.EMBEDDING, OpKind.ROTARY, OpKind.BETWEEN
    ]  # fmt: skip
    assert [(block.kind, block.names) for block in layers.blocks] == [
        (OpKind.NORM, ("input_layernorm",)),
        (OpKind.QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (OpKind.ATTENTION, ("self_attn.paged_attention",)),
        (OpKind.ATTENTION_OUTPUT, ("self_attn.o_proj",)),
        (OpKind.NORM, ("post_attention_layernorm",)),
        (OpKind.GATE_UP, ("mlp.gate_proj",)),
        (OpKind.ACTIVATION, ("mlp.act_fn",)),
        (OpKind.GATE_UP, ("mlp.up_proj",)),
        (OpKind.DOWN, ("mlp.down_proj",)),
        (OpKind.BETWEEN, ("residual", "self_attn", "mlp")),
    ]
    qkv = layers.blocks[1]
    assert (qkv.inputs, qkv.outputs) == (("[T, 32]",), ("[T, 32]", "[T, 16]", "[T, 16]"))
    assert [block.kind for block in after.blocks] == [OpKind.NORM, OpKind.HEAD, OpKind.SAMPLE]
    assert after.blocks[1].outputs == ("[R, 128]",)


def test_layers_that_differ_are_sections_of_their_own(tmp_path: Path) -> None:
    # Every second layer is a mixture, and every fourth has no rotary and no norm of queries and keys.
    chart = _chart("llama4-chunked", tmp_path)
    assert [section.layers for section in chart.sections] == [(), (0, 2), (1,), (3,), ()]
    dense, mixture = chart.sections[1:3]
    assert OpKind.EXPERTS not in {block.kind for block in dense.blocks}
    assert {OpKind.EXPERTS, OpKind.ROUTER} <= {block.kind for block in mixture.blocks}


def test_as_text(tmp_path: Path) -> None:
    lines = format_flowchart(_chart("llama", tmp_path)).splitlines()
    assert lines[0] == "Flow of decode, T = 3 tokens"
    assert "  ┌ layers 0-1, 2 times" in lines
    (down,) = [line for line in lines if line.startswith("  │ down")]
    assert "mlp.down_proj" in down
    assert down.endswith("[T, 48] → [T, 32]")


@pytest.mark.parametrize(
    ("layers", "text"), [((0,), "0"), ((0, 1, 2), "0-2"), ((0, 2, 4), "0, 2, 4"), ((1, 2, 5, 6), "1-2, 5-6")]
)
def test_ranges(layers: tuple[int, ...], text: str) -> None:
    assert layer_ranges(layers) == text
