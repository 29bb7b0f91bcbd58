"""Drawing on GPUs, one program for each row. Shapes and parameters as in functional.py.

    collect    the largest logit            greedy rows are done
               the NUM_ORDERED first tokens of the order, unordered: the value of the last is found digit by digit
               sum of the weights
    draw       the candidates' running sums, each compared with all; what top_k and top_p keep; the token
               or, where too many are kept: the last value to keep, bit by bit, then by ascending id

A *key* orders values as integers, and (key << 32) | (2^31 - 1 - id) tokens as the order has them. Weights are integers
in units of 2^-40, so that sums are exact whatever their order. Rows are read a few times, some blocks ahead; their
0.5 MB stay in the L2 cache.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger, smaller


@triton.jit(do_not_specialize=["vocab_size"])  # variants may have more tokens
def collect_kernel(
    logits,
    parameters,
    tokens,
    finite,
    peaks,
    totals,
    settled,
    candidates,
    vocab_size,
    NUM_ORDERED: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row). Sets finite; tokens of rows that are greedy or not finite; of the others what `draw_kernel` needs:

    peaks [R] float32; totals [R] int64, sum of the weights; settled [R] int32, how many tokens can be drawn in order;
    candidates [R, 2, NUM_ORDERED] int64, the first tokens of the order, filled up with some that have no weight, and
    the weights of these.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * vocab_size
    own = parameters + row * PARAMETERS
    peak, first = float("-inf"), 0
    num_nan = 0
    for begin in tl.range(0, vocab_size, BLOCK, num_stages=4):
        ids = begin + tl.arange(0, BLOCK)
        values = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
        is_nan = values != values
        num_nan += tl.reduce(is_nan.to(tl.int32), 0, add)
        values = tl.where(is_nan, float("-inf"), values)
        top = tl.reduce(values, 0, larger)
        lowest = tl.reduce(tl.where(values == top, ids, vocab_size), 0, smaller)
        first = tl.where(top > peak, lowest, first)
        peak = tl.where(top > peak, top, peak)
    is_finite = (num_nan == 0) & (peak > float("-inf")) & (peak < float("inf"))
    tl.store(finite + row, is_finite)
    tl.store(tokens + row, tl.where(is_finite, first, 0).to(tl.int64))
    top_k = tl.load(own + 2).to(tl.int32)
    if is_finite & (top_k > 1):
        scale, min_p = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.float32)
        if (top_k >= vocab_size) & (tl.load(own + 3) >= 1.0):
            total = tl.full((), 0, dtype=tl.int64)
            for begin in tl.range(0, vocab_size, BLOCK, num_stages=4):
                ids = begin + tl.arange(0, BLOCK)
                values = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
                total += tl.reduce(_weights(values, peak, scale, min_p), 0, add)
            tl.store(totals + row, total)
        else:
            wanted = min(NUM_ORDERED, vocab_size)
            last, num_ties = _last_key(source, vocab_size, wanted, BLOCK)
            of_row = candidates + row * (2 * NUM_ORDERED)
            total = _collect(source, of_row, last, num_ties, peak, scale, min_p, vocab_size, NUM_ORDERED, BLOCK)
            places = tl.arange(0, NUM_ORDERED)
            nothing = _keys(tl.full((NUM_ORDERED,), float("-inf"), dtype=tl.float32)).to(tl.int64) << 32
            tl.store(of_row + places, nothing, mask=places >= wanted)
            tl.store(of_row + NUM_ORDERED + places, tl.full((NUM_ORDERED,), 0, dtype=tl.int64), mask=places >= wanted)
            tl.store(totals + row, total)
            everything = (vocab_size <= NUM_ORDERED) | (_values(last) == float("-inf"))
            tl.store(settled + row, tl.where(everything, vocab_size, wanted - num_ties))
        tl.store(peaks + row, peak)


@triton.jit(do_not_specialize=["vocab_size"])  # variants may have more tokens
def draw_kernel(
    logits,
    parameters,
    tokens,
    finite,
    peaks,
    totals,
    settled,
    candidates,
    vocab_size,
    NUM_ORDERED: tl.constexpr,
    PARAMETERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Program (row): the token of a row that is finite and not greedy."""
    row = tl.program_id(0).to(tl.int64)
    own = parameters + row * PARAMETERS
    top_k, top_p, uniform = tl.load(own + 2).to(tl.int32), tl.load(own + 3), tl.load(own + 4)
    if tl.load(finite + row) & (top_k > 1):
        scale, min_p = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.float32)
        peak, total = tl.load(peaks + row), tl.load(totals + row)
        source = logits + row * vocab_size
        if (top_k >= vocab_size) & (top_p >= 1.0):
            none = tl.full((), -2147483648, dtype=tl.int32)
            token = _draw_by_id(source, none, total - total, total, uniform, peak, scale, min_p, vocab_size, BLOCK)
        else:
            of_row = candidates + row * (2 * NUM_ORDERED)
            order = tl.load(of_row + tl.arange(0, NUM_ORDERED))
            weights = tl.load(of_row + NUM_ORDERED + tl.arange(0, NUM_ORDERED))
            running, rank = _running(of_row, order, weights, NUM_ORDERED, PIECE)
            eligible = (weights > 0) & (rank < top_k)
            if top_k < vocab_size:
                total = tl.reduce(tl.where(eligible, running, 0), 0, larger)
            wanted = top_p * total.to(tl.float64)
            kept = eligible & (((running - weights).to(tl.float64) < wanted) | (rank == 0))
            num_kept = tl.reduce(kept.to(tl.int32), 0, add)
            if (top_k >= vocab_size) & (num_kept > tl.load(settled + row)):
                last, mass = _last_by_weight(source, wanted, peak, scale, min_p, vocab_size, BLOCK)
                above = _weight_from(source, last + 1, peak, scale, min_p, vocab_size, BLOCK)
                token = _draw_by_id(source, last, mass - above, mass, uniform, peak, scale, min_p, vocab_size, BLOCK)
            else:
                mass = tl.reduce(tl.where(kept, running, 0), 0, larger)
                beyond = kept & (running > _target(mass, uniform))
                nothing = tl.full((NUM_ORDERED,), -9223372036854775808, dtype=tl.int64)
                chosen = tl.reduce(tl.where(beyond, order, nothing), 0, larger)
                token = (0x7FFFFFFF - (chosen & 0x7FFFFFFF)).to(tl.int32)
        tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _keys(values):
    """float32 -> int32 in the same order; -0.0 is 0.0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _values(keys):
    """What `_keys` made the keys of."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(values, peak, scale, min_p):
    """Weights of float32 logits, int64 in units of 2^-40."""
    weights = tl.exp((values - peak) * scale)
    weights = tl.where(weights >= min_p, weights, 0.0)
    return (weights * 1099511627776.0 + 0.5).to(tl.int64)


@triton.jit
def _target(mass, uniform):
    """What a running sum has to exceed: uniform of the mass, below it."""
    return tl.minimum((mass.to(tl.float64) * uniform).to(tl.int64), mass - 1)


@triton.jit
def _last_key(source, vocab_size, wanted, BLOCK: tl.constexpr):
    """The key of the last of the `wanted` largest logits, and how many of those that tie with it are among them."""
    base = -128  # of the keys' leading bits: [base, base + 256) is what is left
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.full((256,), 0, dtype=tl.int32)
        for begin in tl.range(0, vocab_size, BLOCK, num_stages=4):
            ids = begin + tl.arange(0, BLOCK)
            digits = (_keys(tl.load(source + ids, mask=ids < vocab_size, other=0.0)) >> shift) - base
            inside = (ids < vocab_size) & (digits >= 0) & (digits < 256)
            counts += tl.histogram(tl.where(inside, digits, 0), 256, mask=inside)
        digit = tl.arange(0, 256)
        from_here = tl.reduce(counts, 0, add) - tl.associative_scan(counts, 0, add) + counts
        last = tl.reduce(tl.where(from_here >= wanted, digit, 0), 0, larger)
        wanted -= tl.reduce(tl.where(digit > last, counts, 0), 0, add)
        base = base + last
        if step < 3:
            base = base * 256
    return base, wanted


@triton.jit
def _collect(
    source,
    target,
    last,
    num_ties,
    peak,
    scale,
    min_p,
    vocab_size,
    NUM_ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tokens above the key `last`, the first `num_ties` at it, and the weights of these.

    Returns the sum of all weights.
    """
    above = last - last
    ties = above
    total = tl.full((), 0, dtype=tl.int64)
    for begin in tl.range(0, vocab_size, BLOCK, num_stages=4):
        ids = begin + tl.arange(0, BLOCK)
        inside = ids < vocab_size
        values = tl.load(source + ids, mask=inside, other=float("-inf"))
        keys = _keys(values)
        is_above, tied = inside & (keys > last), inside & (keys == last)
        # Both are counted in one scan, as the halves of an integer: a block has less than 2^15 tokens.
        counts = is_above.to(tl.int32) + (tied.to(tl.int32) << 16)
        before = tl.associative_scan(counts, 0, add) - counts
        ties_before = ties + (before >> 16)
        places = above + (before & 0xFFFF) + tl.minimum(ties_before, num_ties)
        take = is_above | (tied & (ties_before < num_ties))
        tl.store(target + places, (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64), mask=take)
        weights = _weights(values, peak, scale, min_p)
        tl.store(target + NUM_ORDERED + places, weights, mask=take)
        in_block = tl.reduce(counts, 0, add)
        above += in_block & 0xFFFF
        ties += in_block >> 16
        total += tl.reduce(weights, 0, add)
    return total


@triton.jit
def _running(of_row, order, own_weights, NUM_ORDERED: tl.constexpr, PIECE: tl.constexpr):
    """Of each candidate: the sum of the weights up to and with it, and how many come before it.

    A thread has some candidates, and all of a piece: along the first axis nothing is exchanged between threads.
    """
    running = tl.full((NUM_ORDERED,), 0, dtype=tl.int64)
    rank = tl.full((NUM_ORDERED,), 0, dtype=tl.int32)
    for begin in range(0, NUM_ORDERED, PIECE):
        other = tl.load(of_row + begin + tl.arange(0, PIECE))
        weights = tl.load(of_row + NUM_ORDERED + begin + tl.arange(0, PIECE))
        comes_first = other[:, None] > order[None, :]
        running += tl.reduce(tl.where(comes_first, weights[:, None], 0), 0, add)
        rank += tl.reduce(comes_first.to(tl.int32), 0, add)
    return running + own_weights, rank


@triton.jit
def _weight_from(source, first, peak, scale, min_p, vocab_size, BLOCK: tl.constexpr):
    """Sum of the weights of the tokens whose keys are `first` or above."""
    mass = tl.full((), 0, dtype=tl.int64)
    for begin in tl.range(0, vocab_size, BLOCK, num_stages=4):
        ids = begin + tl.arange(0, BLOCK)
        values = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
        mass += tl.reduce(tl.where(_keys(values) >= first, _weights(values, peak, scale, min_p), 0), 0, add)
    return mass


@triton.jit
def _last_by_weight(source, wanted, peak, scale, min_p, vocab_size, BLOCK: tl.constexpr):
    """The largest key from which on the weights sum to `wanted`, and the weight of the tokens to keep.

    Of the tokens with this key only so many are kept as are needed.
    """
    low = _keys(tl.full((1,), float("-inf"), dtype=tl.float32)).to(tl.int64)  # with all that is above: enough
    low = tl.reduce(low, 0, add)
    high = tl.reduce(_keys(tl.full((1,), 0.0, dtype=tl.float32) + peak).to(tl.int64), 0, add) + 1  # not enough
    for _ in range(32):
        middle = (low + high) >> 1
        enough = _weight_from(source, middle.to(tl.int32), peak, scale, min_p, vocab_size, BLOCK) >= wanted
        high = tl.where(enough, high, middle)
        low = tl.where(enough, middle, low)
    last = low.to(tl.int32)
    above = _weight_from(source, last + 1, peak, scale, min_p, vocab_size, BLOCK)
    ties = _weight_from(source, last, peak, scale, min_p, vocab_size, BLOCK) - above
    each = _weights(_values(last), peak, scale, min_p)
    missing = wanted - above.to(tl.float64)
    num = (missing / tl.maximum(each, 1).to(tl.float64)).to(tl.int64)
    num = tl.where(num.to(tl.float64) * each.to(tl.float64) < missing, num + 1, num)
    return last, above + tl.minimum(num * each, ties)


@triton.jit
def _draw_by_id(source, last, mass_of_ties, mass, uniform, peak, scale, min_p, vocab_size, BLOCK: tl.constexpr):
    """The first token by id at which the running weight exceeds uniform of `mass`.

    Tokens below the key `last` have no weight, and those at it only as long as theirs sum to `mass_of_ties`; where that
    is 0, all that are not below it have.
    """
    target = _target(mass, uniform)
    each = _weights(_values(last), peak, scale, min_p)
    running, ties, block_mass = target - target, target - target, target - target
    begin = 0
    # Whole blocks first: only the one in which the sum is exceeded is looked at token by token.
    while (running + block_mass <= target) & (begin < vocab_size):
        running += block_mass
        ids = begin + tl.arange(0, BLOCK)
        values = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
        keys = _keys(values)
        mass_above = tl.reduce(tl.where(keys > last, _weights(values, peak, scale, min_p), 0), 0, add)
        block_ties = tl.reduce(tl.where(keys == last, each, 0), 0, add)
        block_mass = mass_above + tl.maximum(tl.minimum(block_ties, mass_of_ties - ties), 0)
        ties += block_ties
        begin += BLOCK
    begin -= BLOCK
    ids = begin + tl.arange(0, BLOCK)
    values = tl.load(source + ids, mask=ids < vocab_size, other=float("-inf"))
    keys = _keys(values)
    tied = tl.where(keys == last, each, 0)
    before = ties - tl.reduce(tied, 0, add) + tl.associative_scan(tied, 0, add)
    kept = (keys > last) | ((keys == last) & (before <= mass_of_ties))
    sums = running + tl.associative_scan(tl.where(kept, _weights(values, peak, scale, min_p), 0), 0, add)
    return tl.reduce(tl.where(sums > target, ids, vocab_size - 1), 0, smaller)
