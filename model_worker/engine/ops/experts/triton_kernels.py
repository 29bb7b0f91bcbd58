"""Mixtures of experts on GPUs. Shapes and the order of pairs as in functional.py; sums are float32."""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger, smaller


@triton.jit
def select_kernel(
    logits,
    choices,
    weights,
    num_experts,
    NUM_CHOSEN: tl.constexpr,
    NORMALIZES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
):
    """Program (row): its choices, in descending order, of equal ones the first.

    logits [T, num_experts]; choices [T, NUM_CHOSEN] int32, weights [T, NUM_CHOSEN] float32
    """
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_EXPERTS)
    is_expert = experts < num_experts
    values = tl.load(logits + row * num_experts + experts, mask=is_expert, other=-float("inf")).to(tl.float32)
    shares = tl.exp(values - tl.reduce(values, 0, larger))
    shares = shares / tl.reduce(shares, 0, add)
    shares = tl.where(shares >= 0.0, shares, 0.0)  # what is no number would be no expert either
    shares = tl.where(is_expert, shares, -1.0)
    ranks = tl.arange(0, BLOCK_CHOSEN)
    chosen = tl.full((BLOCK_CHOSEN,), 0, dtype=tl.int32)
    of_chosen = tl.full((BLOCK_CHOSEN,), 0.0, dtype=tl.float32)
    for rank in range(NUM_CHOSEN):
        share = tl.reduce(shares, 0, larger)
        expert = tl.reduce(tl.where(shares == share, experts, BLOCK_EXPERTS), 0, smaller)
        chosen = tl.where(ranks == rank, expert, chosen)
        of_chosen = tl.where(ranks == rank, share, of_chosen)
        shares = tl.where(experts == expert, -1.0, shares)
    if NORMALIZES:
        of_chosen = of_chosen / tl.reduce(of_chosen, 0, add)
    target = row * NUM_CHOSEN + ranks
    tl.store(choices + target, chosen, mask=ranks < NUM_CHOSEN)
    tl.store(weights + target, of_chosen, mask=ranks < NUM_CHOSEN)


@triton.jit(do_not_specialize=["num_pairs"])
def group_kernel(
    choices, starts, tokens, places, num_pairs, num_experts, NUM_CHOSEN: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    """Program (expert): where its pairs begin, which are before it, and its pairs one after another.

    choices [T, NUM_CHOSEN]; starts [num_experts + 1], tokens [num_pairs], places [T, NUM_CHOSEN], all int32
    """
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_PAIRS)
    before = tl.full((BLOCK_PAIRS,), 0, dtype=tl.int32)
    for first in range(0, num_pairs, BLOCK_PAIRS):
        chosen = tl.load(choices + first + lanes, mask=first + lanes < num_pairs, other=num_experts)
        before += (chosen < expert).to(tl.int32)
    place = tl.reduce(before, 0, add)
    tl.store(starts + expert, place)
    if expert == num_experts - 1:
        tl.store(starts + num_experts, num_pairs)
    for first in range(0, num_pairs, BLOCK_PAIRS):
        pairs = first + lanes
        is_own = tl.load(choices + pairs, mask=pairs < num_pairs, other=num_experts) == expert
        counts = tl.associative_scan(is_own.to(tl.int32), 0, add)
        own = place + counts - 1
        tl.store(tokens + own, pairs // NUM_CHOSEN, mask=is_own)
        tl.store(places + pairs, own, mask=is_own)
        place += tl.reduce(is_own.to(tl.int32), 0, add)


@triton.jit(do_not_specialize=["num_tiles"])
def expert_linear_kernel(
    x,
    weight,
    starts,
    tokens,
    out,
    num_tiles,
    num_experts,
    num_outputs,
    num_inputs,
    x_stride,
    GATHERS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of an expert's pairs, block of outputs): out[pairs, outputs] = x[their rows] W[expert, outputs]^T

    x [T, num_inputs] where rows are gathered, else [P, num_inputs]; weight [num_experts, num_outputs, num_inputs];
    starts [num_experts + 1], tokens [P]; out [P, num_outputs]. There are at most `num_tiles` tiles; which expert's a
    tile is, is found in `starts`. Programs that run at the same time share rows and weights: those of GROUP_TILES tiles
    and a block of outputs come one after another.
    """
    num_blocks = (num_outputs + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    of_group = GROUP_TILES * num_blocks
    first_tile = tl.program_id(0) // of_group * GROUP_TILES
    num_in_group = min(num_tiles - first_tile, GROUP_TILES)
    tile = first_tile + tl.program_id(0) % of_group % num_in_group
    first_output = tl.program_id(0) % of_group // num_in_group * BLOCK_OUTPUTS
    experts = tl.arange(0, BLOCK_EXPERTS)
    is_expert = experts < num_experts
    counts = tl.load(starts + experts + 1, mask=is_expert, other=0) - tl.load(starts + experts, mask=is_expert, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.associative_scan(tiles, 0, add)
    expert = tl.reduce((ends <= tile).to(tl.int32), 0, add)
    if expert < num_experts:
        own_first = tl.reduce(tl.where(experts == expert, ends - tiles, 0), 0, add)
        pairs = tl.load(starts + expert) + (tile - own_first) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        has_pair = pairs < tl.load(starts + expert + 1)
        if GATHERS:
            rows = tl.load(tokens + pairs, mask=has_pair, other=0).to(tl.int64)
        else:
            rows = pairs.to(tl.int64)
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        has_output = outputs < num_outputs
        own = weight + (expert.to(tl.int64) * num_outputs + outputs[None, :]) * num_inputs
        sums = tl.full((BLOCK_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
        for begin in range(0, num_inputs, BLOCK_INPUTS):
            inputs = begin + tl.arange(0, BLOCK_INPUTS)
            has_input = inputs < num_inputs
            x_tile = tl.load(
                x + rows[:, None] * x_stride + inputs[None, :], mask=has_pair[:, None] & has_input[None, :], other=0.0
            )
            w_tile = tl.load(own + inputs[:, None], mask=has_input[:, None] & has_output[None, :], other=0.0)
            sums = tl.dot(x_tile.to(PRODUCT_DTYPE), w_tile.to(PRODUCT_DTYPE), sums, input_precision=PRECISION)
        target = out + pairs.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=has_pair[:, None] & has_output[None, :])


@triton.jit
def combine_kernel(y, places, weights, out, size, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, columns): out[row, columns] = sum over i of weights[row, i] * y[places[row, i], columns]

    y [P, size]; places [T, NUM_CHOSEN] int32, weights [T, NUM_CHOSEN] float32; out [T, size]
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    sums = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for rank in tl.static_range(NUM_CHOSEN):  # all are under way at once
        place = tl.load(places + row * NUM_CHOSEN + rank).to(tl.int64)
        values = tl.load(y + place * size + columns, mask=mask, other=0.0).to(tl.float32)
        sums += tl.load(weights + row * NUM_CHOSEN + rank) * values
    tl.store(out + row * size + columns, sums.to(out.dtype.element_ty), mask=mask)
