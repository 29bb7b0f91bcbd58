"""Embeddings of variants on GPUs. Shapes and tables as in functional.py."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numbers"])  # a graph's begin wherever those of a step end
def embed_rows_kernel(
    tokens,
    x,
    table,
    numbers,
    num_tokens,
    size,
    MAX_PLANES: tl.constexpr,
    HEADER_COLUMNS: tl.constexpr,
    PLANE_COLUMNS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, columns): x[row, columns] as the variant of the row has it."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(numbers + row)
    if number > 0:
        entry = table + (number - 1) * TABLE_COLUMNS
        token = tl.load(tokens + row)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        has_column = columns < size
        target = x + row * size + columns
        known = min(token, num_tokens - 1)
        total = tl.load(target, mask=has_column, other=0.0).to(tl.float32)
        for plane in range(MAX_PLANES):
            of_plane = entry + HEADER_COLUMNS + plane * PLANE_COLUMNS
            address = tl.load(of_plane)
            if address != 0:
                bits = address.to(tl.pointer_type(tl.uint8))
                u = tl.load(tl.load(of_plane + 1).to(tl.pointer_type(tl.float32)) + known)
                v = tl.load(of_plane + 2).to(tl.pointer_type(tl.float32))
                packed = tl.load(bits + known * ((size + 7) // 8) + columns // 8, mask=has_column, other=0).to(tl.int32)
                signs = (((packed >> (columns % 8)) & 1) * 2 - 1).to(tl.float32)
                total += signs * tl.load(v + columns, mask=has_column, other=0.0) * u
        num_given = tl.load(entry + 4)
        given = tl.load(entry).to(tl.pointer_type(tl.int64))
        first = num_given * 0  # of the given tokens, the first that is not smaller
        end = num_given
        while first < end:
            middle = (first + end) // 2
            is_smaller = tl.load(given + middle) < token
            first = tl.where(is_smaller, middle + 1, first)
            end = tl.where(is_smaller, end, middle)
        if tl.load(given + first, mask=first < num_given, other=-1) == token:
            rows = tl.load(entry + 1).to(tl.pointer_type(x.dtype.element_ty))
            total = tl.load(rows + first * size + columns, mask=has_column, other=0.0).to(tl.float32)
        rank = tl.load(entry + 5)
        if token < num_tokens:
            a = tl.load(entry + 2).to(tl.pointer_type(x.dtype.element_ty))
            b = tl.load(entry + 3).to(tl.pointer_type(x.dtype.element_ty))
            for index in range(rank):
                factor = tl.load(a + known * rank + index).to(tl.float32)
                total += factor * tl.load(b + columns * rank + index, mask=has_column, other=0.0).to(tl.float32)
        tl.store(target, total.to(x.dtype.element_ty), mask=has_column)
