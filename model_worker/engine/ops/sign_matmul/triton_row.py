"""One row times a plane of signs on GPUs, by tensor cores, with the bits where they are.

S is 2 M - 1 with M of zeros and ones. A word of bits, masked, is four numbers of 8 bits, M 2^j of four inputs (-M 2^7
where j is 7), and the left operand of a product of such numbers. So a bit takes a quarter of a logical operation.

The right operand is v x 2^(7 - j), which leaves all products in one unit: that of v x is 2^-23 times the power of two
beyond the largest of a block of 1,024 inputs. So it is a whole number of 23 to 30 bits, and has four digits of 8, the
operand's four columns. The sums of these products are exact, and those of blocks are added in float32. What is lost of
a v x is its rest, less than 2^(j - 29) of the block's largest, and the result loses twice that.

Each warp has blocks of its own, of all outputs of the program, and the digits, some 25 instructions an input, are made
once for these.
"""

import triton
import triton.language as tl

from model_worker.engine.ops.reductions import add, larger

_EVEN_BYTES, _ODD_BYTES = tl.constexpr(0x00FF00FF), tl.constexpr(-0xFF0100)
_LOW_HALF, _HIGH_HALF = tl.constexpr(0xFFFF), tl.constexpr(-0x10000)
_LEAST_EXPONENT = tl.constexpr(30)  # so that the inverse of the unit is a normal number


@triton.jit
def of_row(
    row,
    entry,
    first_output,
    width,
    num_blocks,
    num_inputs,
    top_bits,
    NUM_WARPS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """u ((v x) S^T) of the row of x at `row`. -> [outputs]

    top_bits: 0x80808080, no constant: with one, the compiler sees which byte becomes which, and moves each alone.
    """
    words = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
    u = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    warp, input_pairs = tl.arange(0, NUM_WARPS), tl.arange(0, 64)
    # Words are loaded as tensor cores have them: each of eight outputs has four threads, each of them four words.
    output = (tl.arange(0, BLOCK_OUTPUTS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :])[:, None, :, None, None]
    word = (tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :])[None, None, None, :, :]
    has_output = output < width - first_output
    words_of_tile = words + first_output.to(tl.int64) * (num_blocks * 32)
    places = output * (num_blocks * 32) + word
    sums = tl.full((NUM_WARPS, BLOCK_OUTPUTS, 4), 0.0, dtype=tl.float32)
    of_x = tl.full((NUM_WARPS, 64), 0.0, dtype=tl.float32)
    for first_block in tl.range(0, num_blocks, NUM_WARPS, num_stages=1):  # not through shared memory
        inputs = (first_block + warp)[:, None] * 1024 + input_pairs[None, :]
        values = ()  # [warps, 64] each, the inputs of a bit of the words' halves
        peaks = tl.full((NUM_WARPS, 64), 0.0, dtype=tl.float32)
        for bit in tl.static_range(16):
            has_input = inputs < num_inputs - bit * 64
            scale = tl.load(v + inputs + bit * 64, mask=has_input, other=0.0)
            value = tl.load(row + inputs + bit * 64, mask=has_input, other=0.0).to(tl.float32) * scale
            values = values + (value,)  # noqa: RUF005 - Triton knows no starred elements
            of_x += value
            peaks = tl.maximum(peaks, tl.abs(value))
        block = (first_block + warp)[None, :, None, None, None]
        has_word = has_output & (block < num_blocks)
        low = tl.load(words_of_tile + (places + block * 32), mask=has_word, other=0)
        high = tl.load(words_of_tile + (places + block * 32 + 16), mask=has_word, other=0)
        packed = _in_order(low, high, NUM_WARPS, BLOCK_OUTPUTS)
        peak = tl.reduce(peaks, 1, larger).to(tl.int32, bitcast=True)
        exponent = tl.maximum(peak >> 23, _LEAST_EXPONENT)
        to_unit = ((276 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        of_block = tl.full((NUM_WARPS, BLOCK_OUTPUTS, 4), 0, dtype=tl.int32)
        for bit in tl.static_range(8):
            factor = to_unit * (2.0 ** (7 - bit) if bit < 7 else -1.0)
            digits = _digits(
                (values[bit] * factor).to(tl.int32), (values[bit + 8] * factor).to(tl.int32), top_bits, NUM_WARPS
            )
            masked = packed & ((0x01010101 << bit) - (bit // 7 << 32))
            bits = tl.reshape(_bytes(masked), (NUM_WARPS, BLOCK_OUTPUTS, 128))
            of_block = tl.dot(bits, digits, of_block, out_dtype=tl.int32)
        from_unit = ((exponent - 29) << 23).to(tl.float32, bitcast=True)
        sums += of_block.to(tl.float32) * from_unit[:, None, None]
    of_digit = ((tl.arange(0, 4) * 8 + 127) << 23).to(tl.float32, bitcast=True)
    total = tl.reduce(tl.reduce(sums * of_digit[None, None, :], 2, add), 0, add)
    less = tl.reduce(tl.reduce(of_x, 1, add), 0, add)
    outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
    return (2.0 * total - less) * tl.load(u + outputs, mask=outputs < width, other=0.0)


@triton.jit
def _in_order(low, high, NUM_WARPS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr):
    """Words of both halves of a block, [outputs / 8, warps, 8, 4, 4] each -> [warps, outputs, 32]

    The four of a thread come to be four apart, as a product's operand has a thread's words. `_digits` follows.
    """
    low = tl.reshape(tl.permute(low, (1, 0, 2, 4, 3)), (NUM_WARPS, BLOCK_OUTPUTS, 16))
    high = tl.reshape(tl.permute(high, (1, 0, 2, 4, 3)), (NUM_WARPS, BLOCK_OUTPUTS, 16))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (NUM_WARPS, BLOCK_OUTPUTS, 32))


@triton.jit
def _digits(first, second, top_bits, NUM_WARPS: tl.constexpr):
    """Digits -128 to 127 of whole numbers in the order of `_in_order`'s bytes. -> [warps, 128, 4] int8, lowest first

    first, second [warps, 64] int32, less than 2^30: of the inputs of the lower and of the upper byte of words' halves.
    """
    # The bytes of n + 0x80808080 are the digits of n, plus 128.
    byte_0, byte_2 = tl.split(tl.reshape(first + top_bits, (NUM_WARPS, 32, 2)))
    byte_1, byte_3 = tl.split(tl.reshape(second + top_bits, (NUM_WARPS, 32, 2)))
    even_01 = (byte_0 & _EVEN_BYTES) | ((byte_1 << 8) & _ODD_BYTES)
    even_23 = (byte_2 & _EVEN_BYTES) | ((byte_3 << 8) & _ODD_BYTES)
    odd_01 = ((byte_0 >> 8) & _EVEN_BYTES) | (byte_1 & _ODD_BYTES)
    odd_23 = ((byte_2 >> 8) & _EVEN_BYTES) | (byte_3 & _ODD_BYTES)
    digit_0 = (even_01 & _LOW_HALF) | (even_23 << 16)
    digit_1 = (odd_01 & _LOW_HALF) | (odd_23 << 16)
    digit_2 = ((even_01 >> 16) & _LOW_HALF) | (even_23 & _HIGH_HALF)
    digit_3 = ((odd_01 >> 16) & _LOW_HALF) | (odd_23 & _HIGH_HALF)
    words = tl.join(tl.join(digit_0, digit_2), tl.join(digit_1, digit_3)) ^ top_bits
    words = tl.permute(tl.reshape(words, (NUM_WARPS, 2, 4, 4, 4)), (0, 1, 3, 2, 4))
    return tl.reshape(tl.permute(_bytes(tl.reshape(words, (NUM_WARPS, 32, 4))), (0, 1, 3, 4, 2)), (NUM_WARPS, 128, 4))


@triton.jit
def _bytes(words):
    """[..., N] int32 -> [..., N, 2, 2] int8, lowest first"""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.join(even, odd)
