from __future__ import annotations

import pytest
import torch

from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.ops.cpu.program import Operation, Program, Step, Team
from model_worker.engine.ops.experts import (
    CombineExperts,
    ExpertLinear,
    ExpertPlan,
    GatherRows,
    GroupByExpert,
    SelectExperts,
)
from model_worker.engine.ops.linear import Activation, PackedWeight, QuantizedRows, QuantizeRows, pack

SIZE, INNER = 64, 96
_QUANTIZERS = {"int8": quantize_int8, "int4": quantize_int4}


def _weight(num_experts: int, num_outputs: int, num_inputs: int, form: str) -> PackedWeight:
    packed = []
    for _ in range(num_experts):
        matrix = torch.randn(num_outputs, num_inputs) * 0.1
        packed.append(pack(_QUANTIZERS[form](matrix) if form in _QUANTIZERS else matrix))
    data = torch.cat([one.data for one in packed])
    return PackedWeight(data, packed[0].format, num_experts * num_outputs, num_inputs)


def _operations(num_rows: int, num_experts: int, num_chosen: int, form: str, team: Team) -> list[Operation]:
    plan = ExpertPlan.allocate(num_rows, num_experts, num_chosen)
    num_pairs = num_rows * num_chosen
    logits, x = torch.randn(num_rows, num_experts), torch.randn(num_rows, SIZE)
    logits[0] = 0.0  # equal ones
    rows, activated, results = torch.zeros(num_pairs, SIZE), torch.zeros(num_pairs, INNER), torch.zeros(num_pairs, SIZE)
    integers = form != "float32" and team.library.level.has_integer_dot
    quantized = [QuantizedRows.allocate(num_pairs, size) if integers else None for size in (SIZE, INNER)]
    gate_up, down = _weight(num_experts, 2 * INNER, SIZE, form), _weight(num_experts, SIZE, INNER, form)
    operations: list[Operation] = [
        SelectExperts("select", logits, plan, normalize=num_chosen % 2 == 0),
        GroupByExpert("group", plan),
        GatherRows("gather", x, plan, rows),
    ]
    if quantized[0] is not None:
        operations.append(QuantizeRows("gate_up.input", rows, quantized[0], num_chosen))
    operations.append(ExpertLinear("gate_up", rows, gate_up, activated, plan, Activation.SILU, quantized[0]))
    if quantized[1] is not None:
        operations.append(QuantizeRows("down.input", activated, quantized[1], num_chosen))
    operations.append(ExpertLinear("down", activated, down, results, plan, Activation.NONE, quantized[1]))
    operations.append(CombineExperts("combine", results, plan, torch.randn(num_rows, SIZE), 0.5))
    return operations


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (4, 2), (16, 3), (64, 8)])
@pytest.mark.parametrize("num_rows", [1, 3, 40, 150])
@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_a_mixture_is_what_its_definition_says(
    team: Team, num_rows: int, num_experts: int, num_chosen: int, form: str
) -> None:
    """Operation by operation, on the kernels' own inputs, so that a rounding does not send a token elsewhere."""
    operations = _operations(num_rows, num_experts, num_chosen, form, team)
    step = Step.of_rows(num_rows)
    for operation in operations:
        before = _outputs(operation)
        saved = [tensor.clone() for tensor in before]
        operation.reference(step)
        expected = [tensor.clone() for tensor in _outputs(operation)]
        for tensor, old in zip(before, saved, strict=True):
            tensor.copy_(old)
        Program(team, [operation]).run(step)
        for found, wanted in zip(_outputs(operation), expected, strict=True):
            if found.dtype == torch.int8:
                assert (found.int() - wanted.int()).abs().max() <= 1  # a tie may be rounded either way
            elif not isinstance(operation, QuantizeRows):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def _outputs(operation: Operation) -> list[torch.Tensor]:
    if isinstance(operation, SelectExperts):
        return [operation.plan.experts, operation.plan.weights]
    if isinstance(operation, GroupByExpert):
        return [operation.plan.starts, operation.plan.tokens, operation.plan.places]
    if isinstance(operation, QuantizeRows):
        return [operation.out.values, operation.out.scales, operation.out.sums]
    assert isinstance(operation, GatherRows | ExpertLinear | CombineExperts)
    return [operation.out]


def test_more_experts_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(AssertionError):
        ExpertPlan.allocate(2, num_experts=4, num_chosen=5)
