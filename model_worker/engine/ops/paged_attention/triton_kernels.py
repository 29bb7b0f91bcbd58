"""Paged attention on GPUs: one kernel for prompts and decoding, one that merges splits of the context, and writing.

A *tile* is up to TILE_ROWS rows, (query token, head) pairs of one sequence and one KV head: the heads that share keys
read them once. Its keys [begin, end) may be computed by several programs, *splits*, of `split_keys` each:

    rows      query 0: heads 0 ... NUM_SHARED - 1 | query 1: heads ... | ... | unused
    keys      begin ............................................................................ end
              split 0              | split 1              | ... | the last active split |         no more: they leave

Softmax is computed with powers of 2: scores are multiplied by log2(e) (`factor`), and a partial result is normalized
and has the logarithm, to base 2, of its sum of weights.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tiles, seq_lens, index):
    """-> sequence, first row of the batch, number of rows, position of the first; of decode steps without a table."""
    if tiles is None:
        sequence, first_row, num_rows, first_position = index, index, 1, tl.load(seq_lens + index) - 1
    else:
        tile = tiles + index * 4
        sequence, first_row = tl.load(tile), tl.load(tile + 1)
        num_rows, first_position = tl.load(tile + 2), tl.load(tile + 3)
    return sequence, first_row, num_rows, first_position


@triton.jit
def _first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """As `Visibility.first_visible`; 0 for position -1 also."""
    first = position * 0
    if WINDOW is not None:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK is not None:
        first = tl.maximum(first, position - position % CHUNK)
    return first


@triton.jit
def _split_keys(num_keys, num_splits, min_split_keys, TILE_KEYS: tl.constexpr):
    """Keys of each split but the last active one, a multiple of TILE_KEYS."""
    share = tl.maximum((num_keys + num_splits - 1) // num_splits, min_split_keys)
    return (share + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS


@triton.jit
def _bias(slopes, positions, multiplier):
    """As `Alibi.bias`, in powers of 2. slopes [M], positions [M or 1, N] -> [M, N] float32"""
    rounded = positions.to(slopes.dtype).to(tl.float32)
    product = (slopes.to(tl.float32)[:, None] * rounded).to(slopes.dtype).to(tl.float32)
    return product * (multiplier * _LOG2E)


@triton.jit
def _attend(
    q,
    out,
    peak,
    total,
    key_cache,
    value_cache,
    table,
    begin,
    end,
    row_positions,
    factor,
    softcap,
    slopes,
    alibi_multiplier,
    key_stride,
    value_stride,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take keys [begin, end) into the running softmax of a tile; if not MASKED, they fill tiles and each row sees all.

    q [M, BLOCK_KEY_DIM], out [M, BLOCK_VALUE_DIM] not normalized, peak and total [M]; key_cache and value_cache point
    to the KV head in the first slot; slopes [M] of the rows, or None. -> out, peak, total
    """
    key_dims, value_dims = tl.arange(0, BLOCK_KEY_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    for start in tl.range(begin, end, TILE_KEYS):
        positions = start + tl.arange(0, TILE_KEYS)
        inside = positions < end
        if MASKED:
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0)
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        keys = key_cache + slots[:, None] * key_stride + key_dims[None, :]
        values = value_cache + slots[:, None] * value_stride + value_dims[None, :]
        if MASKED:
            k = tl.load(keys, mask=inside[:, None] & (key_dims < KEY_DIM)[None, :], other=0.0)
            v = tl.load(values, mask=inside[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0)
        else:
            k = _load_rows(keys, key_dims, KEY_DIM, BLOCK_KEY_DIM)
            v = _load_rows(values, value_dims, VALUE_DIM, BLOCK_VALUE_DIM)
        scores = tl.dot(q, tl.trans(k.to(PRODUCT_DTYPE)), input_precision=PRECISION)
        if softcap is not None:
            # softcap * tanh(x / softcap) = softcap * (1 - 2 / (1 + exp(2 x / softcap)))
            scores = tl.exp2(scores * (2 * factor / softcap))
            scores = (softcap * _LOG2E) * (1 - 2 / (1 + scores))
        elif slopes is not None:
            scores *= factor
        if slopes is not None:
            own = _bias(slopes, row_positions[:, None], alibi_multiplier)
            scores += _bias(slopes, positions[None, :], alibi_multiplier) - own
        if MASKED:
            visible = inside[None, :] & (positions[None, :] <= row_positions[:, None])
            if WINDOW is not None or CHUNK is not None:
                visible &= positions[None, :] >= _first_visible(row_positions, WINDOW, CHUNK)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        # Scores that are not scaled yet are scaled on the way, in one instruction with the subtraction.
        scale = factor if (softcap is None and slopes is None) else 1.0
        new_peak = tl.maximum(peak, tl.reduce(scores, 1, larger) * scale)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores * scale - shift[:, None])
        fading = tl.exp2(peak - shift)
        total = total * fading + tl.reduce(weights, 1, add)
        out = tl.dot(weights.to(PRODUCT_DTYPE), v.to(PRODUCT_DTYPE), out * fading[:, None], input_precision=PRECISION)
        peak = new_peak
    return out, peak, total


@triton.jit
def _load_rows(rows, dims, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Pointers [N, BLOCK_DIM] -> their first DIM columns, zeros after those"""
    if DIM == BLOCK_DIM:
        numbers = tl.load(rows)
    else:
        numbers = tl.load(rows, mask=(dims < DIM)[None, :], other=0.0)
    return numbers


# Tables of a layer group begin where those of the group before end, at any address.
@triton.jit(do_not_specialize=["block_tables", "table_stride", "num_splits", "min_split_keys", "tile_queries"])
def attend_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    tiles,
    sinks,
    slopes,
    out,
    partial_out,
    partial_log,
    scale,
    softcap,
    alibi_multiplier,
    query_stride,
    head_stride,
    table_stride,
    num_splits,
    min_split_keys,
    tile_queries,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (KV head, tile, split): attention of a tile over the keys of a split.

    query [T, H, KEY_DIM] with tokens `query_stride` and heads `head_stride` numbers apart, out [T, H, VALUE_DIM]
    contiguous; caches, block_tables and seq_lens as in functional.py; tiles [num_tiles, 4] int32, see `_tile`, or None
    in a decode step; sinks and slopes [H] or None; partial_out [num_splits, num_tiles * tile_queries, H, VALUE_DIM] and
    partial_log, without VALUE_DIM, float32. What a single active split computes goes to `out` at once.
    """
    num_heads = NUM_KV_HEADS * NUM_SHARED
    kv_head, index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first_row, num_rows, first_position = _tile(tiles, seq_lens, index)
    first_key = _first_visible(first_position, WINDOW, CHUNK)
    end = first_position + num_rows
    num_keys = end - first_key
    split_keys = _split_keys(num_keys, num_splits, min_split_keys, TILE_KEYS)
    begin = first_key + split * split_keys
    if (begin < end) | (split == 0):
        rows = tl.arange(0, TILE_ROWS)
        queries, heads = rows // NUM_SHARED, kv_head * NUM_SHARED + rows % NUM_SHARED
        has_row = queries < num_rows
        row_positions = first_position + queries
        key_dims, value_dims = tl.arange(0, BLOCK_KEY_DIM), tl.arange(0, BLOCK_VALUE_DIM)
        q_rows = (first_row + queries).to(tl.int64) * query_stride + heads.to(tl.int64) * head_stride
        q_mask = has_row[:, None] & (key_dims < KEY_DIM)[None, :]
        q = tl.load(query + q_rows[:, None] + key_dims[None, :], mask=q_mask, other=0.0).to(PRODUCT_DTYPE)
        row_slopes = None
        if slopes is not None:
            row_slopes = tl.load(slopes + heads, mask=has_row, other=0.0)
        peak = tl.full((TILE_ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.full((TILE_ROWS,), 0.0, dtype=tl.float32)
        if sinks is not None:  # noqa: SIM102 - known when it is compiled, the next one is not
            if split == 0:
                peak = tl.load(sinks + heads, mask=has_row, other=0.0).to(tl.float32) * _LOG2E
                if slopes is not None:
                    own = _bias(row_slopes, row_positions[:, None], alibi_multiplier)
                    peak -= tl.reduce(own, 1, add)
                total += 1.0
        result = tl.full((TILE_ROWS, BLOCK_VALUE_DIM), 0.0, dtype=tl.float32)
        split_end = tl.minimum(begin + split_keys, end)
        # Keys that every row sees come first: all up to the first row's position, unless a window leaves some out.
        common_end = tl.minimum(split_end, first_position + 1)
        common_end = begin + tl.maximum(common_end - begin, 0) // TILE_KEYS * TILE_KEYS
        if _first_visible(end - 1, WINDOW, CHUNK) > begin:
            common_end = begin
        keys = key_cache + kv_head * KEY_DIM
        values = value_cache + kv_head * VALUE_DIM
        table = block_tables + sequence.to(tl.int64) * table_stride
        factor = scale * _LOG2E
        for MASKED in tl.static_range(2):
            result, peak, total = _attend(
                q,
                result,
                peak,
                total,
                keys,
                values,
                table,
                common_end if MASKED else begin,
                split_end if MASKED else common_end,
                row_positions,
                factor,
                softcap,
                row_slopes,
                alibi_multiplier,
                NUM_KV_HEADS * KEY_DIM,
                NUM_KV_HEADS * VALUE_DIM,
                MASKED,
                BLOCK_SIZE,
                KEY_DIM,
                VALUE_DIM,
                BLOCK_KEY_DIM,
                BLOCK_VALUE_DIM,
                TILE_KEYS,
                WINDOW,
                CHUNK,
                PRODUCT_DTYPE,
                PRECISION,
            )
        result /= tl.where(total == 0.0, 1.0, total)[:, None]
        mask = has_row[:, None] & (value_dims < VALUE_DIM)[None, :]
        out_rows = (first_row + queries).to(tl.int64) * num_heads + heads
        targets = out + out_rows[:, None] * VALUE_DIM + value_dims[None, :]
        if split_keys >= num_keys:
            tl.store(targets, result.to(out.dtype.element_ty), mask=mask)
        else:
            partial_row = (split * tl.num_programs(1) + index) * tile_queries + queries
            partial_rows = partial_row.to(tl.int64) * num_heads + heads
            partial_targets = partial_out + partial_rows[:, None] * VALUE_DIM + value_dims[None, :]
            tl.store(partial_targets, result, mask=mask)
            tl.store(partial_log + partial_rows, peak + tl.log2(total), mask=has_row)


@triton.jit(do_not_specialize=["num_splits", "min_split_keys", "tile_queries", "num_partial_rows"])
def merge_kernel(
    partial_out,
    partial_log,
    out,
    seq_lens,
    tiles,
    num_splits,
    min_split_keys,
    tile_queries,
    num_partial_rows,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (head, query of a tile): out = the splits' results, weighted by their sums. Arguments as above."""
    head, partial_row = tl.program_id(0), tl.program_id(1)
    _, first_row, num_rows, first_position = _tile(tiles, seq_lens, partial_row // tile_queries)
    query = partial_row % tile_queries
    num_keys = first_position + num_rows - _first_visible(first_position, WINDOW, CHUNK)
    split_keys = _split_keys(num_keys, num_splits, min_split_keys, TILE_KEYS)
    if (query < num_rows) & (split_keys < num_keys):
        splits, value_dims = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_VALUE_DIM)
        active = splits * split_keys < num_keys
        rows = (splits * num_partial_rows + partial_row).to(tl.int64) * NUM_HEADS + head
        logs = tl.load(partial_log + rows, mask=active, other=float("-inf"))
        mask = active[:, None] & (value_dims < VALUE_DIM)[None, :]
        results = tl.load(partial_out + rows[:, None] * VALUE_DIM + value_dims[None, :], mask=mask, other=0.0)
        weights = tl.exp2(logs - tl.reduce(logs, 0, larger))
        merged = tl.reduce(results * weights[:, None], 0, add) / tl.reduce(weights, 0, add)
        target = out + ((first_row + query).to(tl.int64) * NUM_HEADS + head) * VALUE_DIM + value_dims
        tl.store(target, merged.to(out.dtype.element_ty), mask=value_dims < VALUE_DIM)


@triton.jit(do_not_specialize=["slot_mapping"])  # that of a layer group begins where the one before ends
def write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, numbers): the token's keys and values [heads * dim] to its slot of the caches, if it has one.

    Tokens of key and value are `key_stride` and `value_stride` numbers apart, heads `..._head_stride`.
    """
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        is_key, is_value = numbers < NUM_KV_HEADS * KEY_DIM, numbers < NUM_KV_HEADS * VALUE_DIM
        places = (numbers // KEY_DIM).to(tl.int64) * key_head_stride + numbers % KEY_DIM
        keys = tl.load(key + row * key_stride + places, mask=is_key, other=0.0)
        store(key_cache + slot * (NUM_KV_HEADS * KEY_DIM) + numbers, keys, is_key)
        places = (numbers // VALUE_DIM).to(tl.int64) * value_head_stride + numbers % VALUE_DIM
        values = tl.load(value + row * value_stride + places, mask=is_value, other=0.0)
        store(value_cache + slot * (NUM_KV_HEADS * VALUE_DIM) + numbers, values, is_value)


@triton.jit
def store(pointers, numbers, mask):
    """Store numbers in the type that the pointers have; for float8 those that are too large become its largest."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        wide = numbers.to(tl.float32)
        wide = tl.where(wide > 448.0, 448.0, tl.where(wide < -448.0, -448.0, wide))
        tl.store(pointers, wide.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(pointers, numbers.to(pointers.dtype.element_ty), mask=mask)
