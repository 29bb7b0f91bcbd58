"""Low-rank terms of segments on GPUs. Shapes and tables as in the package's docstring; sums are float32.

Functions of Triton's own library that are kernels themselves (`tl.cdiv`, `tl.zeros`) are not called: the interpreter
knows them only where Triton was imported for it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table", "num_rows", "num_segments"])  # a layer's table begins anywhere
def shrink_kernel(
    x,
    t,
    tiles,
    table,
    num_rows,
    num_inputs,
    num_parts,
    num_segments,
    max_rank,
    x_stride,
    TILE_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    SPLIT_INPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, part and ranks, split): t[split, part, rows, ranks] = x[rows, of split] A[ranks, of split]^T

    x [T, K], t [splits, P, T, max_rank] float32, tiles [num_tiles, 3], table [P, S, TABLE_COLUMNS].
    """
    tile = tiles + tl.program_id(0) * 3
    segment, count = tl.load(tile), tl.load(tile + 2)
    rank_blocks = (max_rank + BLOCK_RANKS - 1) // BLOCK_RANKS
    part = tl.program_id(1) // rank_blocks
    first_rank = tl.program_id(1) % rank_blocks * BLOCK_RANKS
    split = tl.program_id(2)
    entry = table + (part * num_segments + segment) * TABLE_COLUMNS
    rank = tl.load(entry + 2, mask=count > 0, other=0).to(tl.int32)
    if first_rank < rank:
        a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
        rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, TILE_ROWS)
        has_row = tl.arange(0, TILE_ROWS) < count
        ranks = first_rank + tl.arange(0, BLOCK_RANKS)
        has_rank = ranks < rank
        sums = tl.full((TILE_ROWS, BLOCK_RANKS), 0.0, dtype=tl.float32)
        for begin in range(split * SPLIT_INPUTS, min(split * SPLIT_INPUTS + SPLIT_INPUTS, num_inputs), BLOCK_INPUTS):
            inputs = begin + tl.arange(0, BLOCK_INPUTS)
            has_input = inputs < num_inputs
            x_tile = tl.load(
                x + rows[:, None] * x_stride + inputs[None, :], mask=has_row[:, None] & has_input[None, :], other=0.0
            )
            a_tile = tl.load(
                a + ranks[None, :] * num_inputs + inputs[:, None],
                mask=has_rank[None, :] & has_input[:, None],
                other=0.0,
            )
            sums = tl.dot(x_tile.to(tl.float32), a_tile.to(tl.float32), sums, input_precision=PRECISION)
        target = t + ((split * num_parts + part).to(tl.int64) * num_rows + rows[:, None]) * max_rank + ranks[None, :]
        tl.store(target, sums, mask=has_row[:, None] & has_rank[None, :])


@triton.jit(do_not_specialize=["table", "num_rows", "num_segments"])  # as above
def expand_kernel(
    t,
    out,
    tiles,
    table,
    num_rows,
    num_segments,
    max_rank,
    out_stride,
    NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, columns, part): out[rows, columns] += (sum over splits of t[split, part, rows]) B[columns]^T

    t [splits, P, T, max_rank] float32, out [T, N], tiles [num_tiles, 3], table [P, S, TABLE_COLUMNS].
    """
    tile = tiles + tl.program_id(0) * 3
    segment, count = tl.load(tile), tl.load(tile + 2)
    part, num_parts = tl.program_id(2), tl.num_programs(2)
    entry = table + (part * num_segments + segment) * TABLE_COLUMNS
    width = tl.load(entry + 4, mask=count > 0, other=0).to(tl.int32)
    first_output = tl.program_id(1) * BLOCK_OUTPUTS
    if first_output < width:
        rank, first_column = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3)
        b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(out.dtype.element_ty)), 16)
        rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, TILE_ROWS)
        has_row = tl.arange(0, TILE_ROWS) < count
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        has_output = outputs < width
        sums = tl.full((TILE_ROWS, BLOCK_OUTPUTS), 0.0, dtype=tl.float32)
        for begin in range(0, rank, BLOCK_RANKS):
            ranks = begin + tl.arange(0, BLOCK_RANKS)
            has_rank = ranks < rank
            t_tile = tl.full((TILE_ROWS, BLOCK_RANKS), 0.0, dtype=tl.float32)
            for split in range(NUM_SPLITS):
                plane = (split * num_parts + part).to(tl.int64) * num_rows
                t_tile += tl.load(
                    t + (plane + rows[:, None]) * max_rank + ranks[None, :],
                    mask=has_row[:, None] & has_rank[None, :],
                    other=0.0,
                )
            b_tile = tl.load(
                b + outputs[None, :] * rank + ranks[:, None], mask=has_rank[:, None] & has_output[None, :], other=0.0
            )
            sums = tl.dot(t_tile, b_tile.to(tl.float32), sums, input_precision=PRECISION)
        target = out + rows[:, None] * out_stride + (first_column + outputs)[None, :]
        mask = has_row[:, None] & has_output[None, :]
        tl.store(target, (tl.load(target, mask=mask, other=0.0) + sums).to(out.dtype.element_ty), mask=mask)
