"""What a table says of attention goes before the defaults, and every choice computes the same, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from model_worker.engine.ops.paged_attention.triton_tiles import OP, shape_class, tile_shapes, tuned_shapes
from model_worker.engine.ops.tuning.attention_problems import attention_problems, candidate_shapes
from model_worker.engine.ops.tuning.tuned_table import TunedTable

DEFAULTS = tile_shapes(4, 128, torch.bfloat16, has_227_kib=True)


@pytest.fixture(scope="module")
def _kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("paged_attention")


def test_what_was_measured_goes_before_the_defaults() -> None:
    few, many = DEFAULTS
    options = {"num_shared": 4, "head_dim": 128, "kv_dtype": torch.bfloat16}
    assert tuned_shapes(DEFAULTS, TunedTable(), **options) == DEFAULTS
    table = TunedTable({OP: {shape_class(few, **options): {"tile_keys": 128, "num_stages": 2}}})
    tuned, same = tuned_shapes(DEFAULTS, table, **options)
    assert (tuned.tile_keys, tuned.num_stages, tuned.num_warps) == (128, 2, few.num_warps)
    assert same == many
    assert tuned_shapes(DEFAULTS, table, **{**options, "kv_dtype": torch.float8_e4m3fn}) == DEFAULTS


def test_candidates_begin_with_the_default_and_have_it_once() -> None:
    for shape in DEFAULTS:
        first, *others = candidate_shapes(shape)
        assert first["tile_keys"] == shape.tile_keys
        assert first not in others
        assert len(others) > 20


@pytest.mark.usefixtures("_kernels")
def test_every_kind_of_choice_is_checked() -> None:
    torch.manual_seed(0)
    problems = list(attention_problems(torch.device("cpu"), heads=(4, 2), head_dim=16, decode=(2, 90), prompt=70))
    assert [problem.shape_class[:8] for problem in problems] == ["few rows", "many row"]
    for problem in problems:
        for choice in problem.candidates[::9][:3]:
            problem.check(choice)
