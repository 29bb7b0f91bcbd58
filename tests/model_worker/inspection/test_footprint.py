"""Sizes against those of checkpoints whose every tensor is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import plan_load
from model_worker.engine.model_parts import Part
from model_worker.inspection.footprint import BatchLimit, Footprint, measure_footprint
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, make_tiny_plan

HIDDEN, INNER, LAYERS = 32, 48, 2
ATTENTION = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2)  # q, o; k and v with half of the heads
MLP = LAYERS * 3 * HIDDEN * INNER
NORM = (2 * LAYERS + 1) * HIDDEN
KV_PER_TOKEN = LAYERS * 2 * 2 * 8  # K and V, 2 heads of 8


def _footprint(name: str, path: Path, *, free_bytes: int = 10**6) -> Footprint:
    build_tiny_model(name).save_pretrained(path)
    return measure_footprint(
        make_tiny_plan(path), contexts=(10, 64), block_size=16, max_num_batched_tokens=64, free_bytes=free_bytes
    )


def _sizes(footprint: Footprint, precision: str) -> dict[Part, int]:
    return {part.part: part.bytes_by_precision[precision] for part in footprint.parts}


def test_every_part_in_every_precision(tmp_path: Path) -> None:
    footprint = _footprint("llama", tmp_path)
    embedding = VOCAB_SIZE * HIDDEN
    values = {
        Part.EMBEDDING: embedding,
        Part.ATTENTION: ATTENTION,
        Part.MLP: MLP,
        Part.NORM: NORM,
        Part.HEAD: embedding,
    }
    assert {part.part: part.num_parameters for part in footprint.parts} == values
    assert footprint.num_parameters == sum(tensor.numel() for tensor in build_tiny_model("llama").state_dict().values())
    assert _sizes(footprint, "float32") == {part: 4 * count for part, count in values.items()}
    assert _sizes(footprint, "bfloat16") == {part: 2 * count for part, count in values.items()}
    assert _sizes(footprint, "float16") == _sizes(footprint, "bfloat16")
    groups = {
        Part.ATTENTION: ATTENTION // 32,
        Part.MLP: LAYERS * 2 * INNER,  # gate and up; rows of 48, as the down projection has them, are no whole groups
    }
    down = 2 * LAYERS * HIDDEN * INNER
    kept = {Part.EMBEDDING: VOCAB_SIZE * 34, Part.HEAD: VOCAB_SIZE * 34, Part.NORM: 2 * NORM}
    for precision, group_bytes in (("int8", 34), ("int4", 20)):
        quantized = {part: group_bytes * count for part, count in groups.items()}
        quantized[Part.MLP] += down
        assert _sizes(footprint, precision) == kept | quantized
    assert footprint.weights_bytes("float32") == 4 * footprint.num_parameters
    assert not footprint.tied_head


def test_what_is_stored_is_what_the_file_holds(tmp_path: Path) -> None:
    footprint = _footprint("mixtral", tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert sum(part.stored_bytes or 0 for part in footprint.parts) == stored == footprint.weights_bytes("float32")


def test_a_tied_head_is_counted_with_the_embedding(tmp_path: Path) -> None:
    footprint = _footprint("llama-tied", tmp_path)
    assert footprint.tied_head
    assert Part.HEAD not in {part.part for part in footprint.parts}
    assert _sizes(footprint, "int4")[Part.EMBEDDING] == VOCAB_SIZE * 34


def test_experts_are_quantized_and_their_router_is_not(tmp_path: Path) -> None:
    experts = {part.part: part for part in _footprint("qwen3_moe", tmp_path).parts}[Part.EXPERTS]
    router, inner = LAYERS * 4 * HIDDEN, 24
    assert experts.num_parameters == LAYERS * 4 * 3 * HIDDEN * inner + router
    gate_up, down = LAYERS * 4 * 2 * inner * 34, LAYERS * 4 * HIDDEN * inner * 2  # rows of 24 are no whole groups
    assert experts.bytes_by_precision["int8"] == gate_up + down + 2 * router


def test_what_a_family_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    footprint = _footprint("deepseek_v3", tmp_path)
    experts = {part.part: part for part in footprint.parts}[Part.EXPERTS]
    assert experts.bytes_by_precision["bfloat16"] == 2 * experts.num_parameters + 2 * 4  # 4 correction biases


def test_kv_and_the_largest_batch(tmp_path: Path) -> None:
    footprint = _footprint("llama", tmp_path, free_bytes=10**6)
    assert footprint.kv_bytes_per_token == {
        "float32": 4 * KV_PER_TOKEN, "16 bits": 2 * KV_PER_TOKEN, "8 bits": KV_PER_TOKEN
    }  # fmt: skip
    free = 10**6 - footprint.weights_bytes("int8") - footprint.activations_bytes
    assert BatchLimit("int8", "16 bits", 10, free // (2 * KV_PER_TOKEN * 16)) in footprint.batches
    assert BatchLimit("int8", "8 bits", 64, free // (KV_PER_TOKEN * 64)) in footprint.batches
    assert {(limit.weights, limit.kv) for limit in footprint.batches} == {
        ("float32", "float32"), ("float32", "8 bits"),
        *((name, kv) for name in ("bfloat16", "float16", "int8", "int4") for kv in ("16 bits", "8 bits")),
    }  # fmt: skip


def test_no_batch_fits_where_the_weights_do_not(tmp_path: Path) -> None:
    footprint = _footprint("llama", tmp_path, free_bytes=1000)
    assert {limit.num_sequences for limit in footprint.batches} == {0}


def test_pickled_checkpoints_have_no_headers_and_the_same_size(tmp_path: Path) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path)
    plan = make_tiny_plan(tmp_path)
    without = replace(plan, checkpoint=replace(plan.checkpoint, format="bin", tensors={}))
    sizes = [
        measure_footprint(p, contexts=(), block_size=16, max_num_batched_tokens=64, free_bytes=0)
        for p in (plan, without)
    ]
    assert sizes[0].weights_bytes("int4") == sizes[1].weights_bytes("int4")
    assert {part.stored_bytes for part in sizes[1].parts} == {None}


def test_a_gguf_file_is_counted_part_by_part(smollm2_gguf: Path) -> None:
    plan = plan_load(smollm2_gguf, memory_bytes=2**40)
    footprint = measure_footprint(
        plan, contexts=(), block_size=16, max_num_batched_tokens=512, free_bytes=0
    )  # fmt: skip
    stored = {part.part: part.stored_bytes for part in footprint.parts}
    assert sum(size or 0 for size in stored.values()) == sum(h.num_bytes for h in plan.checkpoint.tensors.values())
    assert stored[Part.EMBEDDING] == 49152 * 576 // 32 * 34  # Q8_0
    assert Part.HEAD not in stored
    assert footprint.weights_bytes("bfloat16") == 269_030_016


def test_no_precision_is_shown_that_the_engine_refuses(tmp_path: Path) -> None:
    """Families that the native decoder does not compute have no int8 or int4, and no KV cache of 8 bits."""
    footprint = _footprint("gpt2", tmp_path)
    assert footprint.precisions == ("float32", "bfloat16", "float16")
    assert set(footprint.kv_bytes_per_token) == {"float32", "16 bits"}
    assert {limit.kv for limit in footprint.batches} == {"float32", "16 bits"}


@pytest.mark.parametrize("name", ["gpt2", "opt-projected", "bloom", "gpt_oss", "falcon-alibi"])
def test_other_families_add_up(name: str, tmp_path: Path) -> None:
    weights = build_tiny_model(name).state_dict()
    distinct = {tensor.data_ptr(): tensor for tensor in weights.values() if tensor.dtype == torch.float32}
    expected = sum(math.prod(tensor.shape) for tensor in distinct.values())
    assert _footprint(name, tmp_path).num_parameters == expected
