"""How kernels combine numbers in `tl.reduce` and `tl.associative_scan`.

Triton's `tl.sum`, `tl.max` and the like cannot be called in the interpreter where Triton was imported for a compiler;
these functions, which they use, can, and the interpreter knows them from others, which it runs number by number.
"""

import triton.language as tl

add = tl.standard._sum_combine
larger = tl.standard._elementwise_max
smaller = tl.standard._elementwise_min
