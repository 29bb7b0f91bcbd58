"""Weights of which only a part is wanted: the part of what would be read of the whole, whatever the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.load_plan import LoadPlan
from adapters.stretches import Stretches
from adapters.weights import Weight, iterate_weights
from compression.gguf import GROUPED_TYPES, dequantize
from compression.grouped_weight import GroupedWeight
from compression.int8 import quantize_int8
from registry.checkpoint import read_checkpoint
from tests.fakes.load_plans import make_plan
from tests.fakes.tiny_gguf import write_gguf

QUERY, DOWN, NORM = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
)
SECOND_HALF = {
    QUERY: Stretches(0, ((32, 64),)),
    DOWN: Stretches(1, ((256, 512),)),
    NORM: None,
}
PIECES = {
    QUERY: Stretches(0, ((0, 16), (48, 64))),
    DOWN: Stretches(1, ((0, 32), (64, 128))),  # blocks of 256 would be cut
    NORM: Stretches(0, ((8, 20),)),
}
UNEVEN = {QUERY: Stretches(1, ((3, 50),)), DOWN: Stretches(1, ((1, 40),)), NORM: None}


def _gguf_plan(path: Path, dtype: str) -> LoadPlan:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {
            "blk.0.attn_q.weight": (64, 64),
            "blk.0.ffn_down.weight": (8, 512),
            "blk.0.attn_norm.weight": (64,),
        }.items()
    }
    checkpoint = read_checkpoint(write_gguf(path / "tiny.gguf", "llama", {}, tensors, dtype=dtype))
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return dataclasses.replace(make_plan(), checkpoint=checkpoint, config=config, kept_types=GROUPED_TYPES)


def _dense(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, GroupedWeight) else weight


@pytest.mark.parametrize("wanted", [SECOND_HALF, PIECES, UNEVEN], ids=["half", "pieces", "uneven"])
@pytest.mark.parametrize("keep_blocks", [False, True], ids=["numbers", "blocks"])
@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q8_0", "F16"])
def test_of_a_gguf_file(dtype: str, keep_blocks: bool, wanted: dict[str, Stretches | None], tmp_path: Path) -> None:
    plan = _gguf_plan(tmp_path, dtype)
    whole = dict(iterate_weights(plan))
    found = dict(iterate_weights(plan, keep_blocks=keep_blocks, select=lambda name, shape: wanted[name]))
    assert found.keys() == whole.keys()
    for name, weight in found.items():
        stretches = wanted[name]
        expected = _dense(whole[name])
        assert torch.equal(_dense(weight), expected if stretches is None else stretches.cut(expected)), name
    keeps = keep_blocks and dtype in GROUPED_TYPES
    assert isinstance(found[QUERY], GroupedWeight) == (keeps and wanted is not UNEVEN)


def test_of_a_gguf_file_only_that_is_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = 0

    def counted(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
        nonlocal num_bytes
        num_bytes += len(data)
        return dequantize(data, dtype, shape)

    monkeypatch.setattr("adapters.gguf_weights.dequantize", counted)
    plan = _gguf_plan(tmp_path, "Q8_0")
    for _ in iterate_weights(plan, select=lambda name, shape: SECOND_HALF[name]):
        pass
    assert num_bytes == (64 * 64 // 2 + 8 * 512 // 2) // 32 * 34 + 64 * 4


@pytest.mark.parametrize("wanted", [SECOND_HALF, UNEVEN], ids=["half", "uneven"])
def test_of_safetensors_a_view_of_the_mapped_file(wanted: dict[str, Stretches | None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {QUERY: torch.randn(64, 64), DOWN: torch.randn(8, 512), NORM: torch.randn(64)}
    save_file(whole, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    plan = dataclasses.replace(make_plan(), checkpoint=read_checkpoint(tmp_path))
    for name, tensor in iterate_weights(plan, select=lambda name, shape: wanted[name]):
        stretches = wanted[name]
        assert isinstance(tensor, Tensor)
        assert torch.equal(tensor, whole[name] if stretches is None else stretches.cut(whole[name]))
        assert stretches is None or tensor._base is not None


def test_groups_that_are_cut_become_numbers() -> None:
    weight = quantize_int8(torch.randn(8, 128))
    for stretches, keeps in (
        (Stretches(0, ((1, 2), (5, 8))), True),
        (Stretches(1, ((32, 64), (96, 128))), True),
        (Stretches(1, ((16, 64),)), False),
    ):
        found = stretches.cut_grouped(weight)
        assert isinstance(found, GroupedWeight) == keeps
        assert torch.equal(_dense(found), stretches.cut(weight.dequantize()))
        assert tuple(found.shape) == stretches.of_shape(tuple(weight.shape))
