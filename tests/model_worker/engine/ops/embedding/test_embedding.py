"""Rows of an embedding on every machine level: the kernel does what `reference` says, and writes nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compression.grouped_weight import GroupedWeight
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.embedding import Embedding
from model_worker.engine.ops.linear import WeightFormat, pack

_DTYPES = {
    WeightFormat.FLOAT32: torch.float32,
    WeightFormat.BFLOAT16: torch.bfloat16,
    WeightFormat.FLOAT16: torch.float16,
}
_VOCAB_SIZE = 75  # the last panel is not full
_UNTOUCHED = -77.0


def _weight(format: WeightFormat, size: int) -> Tensor | GroupedWeight:
    weight = torch.randn(_VOCAB_SIZE, size)
    if format is WeightFormat.INT8:
        return quantize_int8(weight)
    if format is WeightFormat.INT4:
        return quantize_int4(weight)
    weight[3, 0], weight[3, 1], weight[4, 0] = 1e-6, -0.0, 6e4  # subnormal in float16, and next to its largest
    return weight.to(_DTYPES[format])


def _step(token_ids: Tensor) -> Step:
    empty = Step.of_rows(len(token_ids))
    return Step(token_ids, empty.positions, empty.slot_mapping, empty.block_tables, empty.query_start, empty.seq_lens)


@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda format: format.name)
@pytest.mark.parametrize("size", [32, 160])
@pytest.mark.parametrize("multiplier", [1.0, 12.5])
def test_every_row(team: Team, format: WeightFormat, size: int, multiplier: float) -> None:
    torch.manual_seed(0)
    weight = _weight(format, size)
    token_ids = torch.cat([torch.arange(_VOCAB_SIZE), torch.randint(_VOCAB_SIZE, (5,))])
    whole = torch.full((len(token_ids) + 1, size + 3), _UNTOUCHED)
    operation = Embedding("embedding", pack(weight), whole[:-1, :size], multiplier)
    Program(team, [operation]).run(_step(token_ids))
    rows = weight.dequantize() if isinstance(weight, GroupedWeight) else weight.float()
    torch.testing.assert_close(operation.out, rows[token_ids] * multiplier, rtol=1e-6, atol=1e-6)
    got = operation.out.clone()
    operation.reference(_step(token_ids))
    torch.testing.assert_close(got, operation.out, rtol=1e-6, atol=1e-6)
    operation.out.fill_(_UNTOUCHED)
    assert (whole == _UNTOUCHED).all()


@pytest.mark.parametrize("format", _DTYPES, ids=lambda format: format.name)
def test_rows_of_any_length(team: Team, format: WeightFormat) -> None:
    torch.manual_seed(0)
    for size in (1, 7, 33):
        weight = torch.randn(_VOCAB_SIZE, size).to(_DTYPES[format])
        out = torch.zeros(3, size)
        Program(team, [Embedding("embedding", pack(weight), out)]).run(_step(torch.tensor([0, 33, 74])))
        assert torch.equal(out, weight.float()[[0, 33, 74]])


def test_no_rows(team: Team) -> None:
    out = torch.full((2, 32), _UNTOUCHED)
    weight = pack(torch.randn(_VOCAB_SIZE, 32))
    Program(team, [Embedding("embedding", weight, out)]).run(_step(torch.empty(0, dtype=torch.int64)))
    assert (out == _UNTOUCHED).all()


@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda format: format.name)
def test_tokens_without_a_row_get_nothing(team: Team, format: WeightFormat) -> None:
    weight, token_ids = _weight(format, 32), torch.tensor([1, _VOCAB_SIZE, 2, 2**40, _VOCAB_SIZE - 1])
    operation = Embedding("embedding", pack(weight), torch.full((5, 32), _UNTOUCHED), 2.0)
    Program(team, [operation]).run(_step(token_ids))
    got = operation.out.clone()
    operation.reference(_step(token_ids))
    torch.testing.assert_close(got, operation.out, rtol=1e-6, atol=1e-6)
    assert (got[[1, 3]] == 0).all()
    assert (got[[0, 2, 4]] != 0).any(dim=1).all()
