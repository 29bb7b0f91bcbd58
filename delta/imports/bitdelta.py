"""BitDelta's `diff.pt`: a dictionary that torch.save wrote, with names of the model's modules and parameters.

    MODULE.mask     [K / 32, N] int32: bit k % 32 of row k // 32, the lowest first, is 1 where W' - W is not negative
    MODULE.coeff    number: W' = W + coeff ∘ (2 mask - 1)
    MODULE.A, .B    [K, r] and [r, N]: W' = W + (A B)ᵀ
    MODULE.weight, other parameters    W' itself

Source: https://github.com/FasterDecoding/BitDelta, bitdelta/diff.py (save_diff, load_diff) and the packing in
bitdelta/binary_gemm_kernel.py; arXiv 2402.10193.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delta.codecs.codec import Term
from delta.codecs.lowrank import low_rank_term
from delta.codecs.sign import SIGN
from delta.imports.write_import import check_shape
from registry.errors import CheckpointError

_BITS_OF_MASK = 32


class BitDeltaChanges:
    """`Changes` of a diff.pt, whose tensors are mapped from the file."""

    source = "BitDelta diff.pt"

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError: it cannot be read, or holds something else than tensors."""
        self._file = file
        self._tensors = _load(file)
        self._used: set[str] = set()

    def change(self, name: str, before: Tensor) -> tuple[Term, ...] | Tensor | None:
        module = name.removesuffix(".weight")
        if name in self._tensors:
            whole = self._take(name)
            if whole.ndim != before.ndim or whole.shape[1:] != before.shape[1:]:
                check_shape(self.source, name, whole, tuple(before.shape))
            return whole.to(before.dtype)
        if module == name:
            return None
        terms = []
        if f"{module}.mask" in self._tensors:
            terms.append(self._sign_term(module, before))
        if f"{module}.A" in self._tensors:
            num_rows, num_columns = before.shape
            a = self._take(f"{module}.A")
            check_shape(self.source, f"{module}.A", a, (num_columns, *a.shape[1:]))
            b = check_shape(self.source, f"{module}.B", self._take(f"{module}.B"), (a.shape[-1], num_rows))
            terms.append(low_rank_term(a.T.float(), b.T.float()))
        return tuple(terms) or None

    def check_all_used(self) -> None:
        if unused := sorted(self._tensors.keys() - self._used):
            raise CheckpointError(
                f"{self._file} changes {len(unused)} tensors that this base does not have ({', '.join(unused[:3])}); "
                "give the base that it was made from"
            )

    def _sign_term(self, module: str, before: Tensor) -> Term:
        if before.ndim != 2 or before.shape[1] % _BITS_OF_MASK:
            raise CheckpointError(f"{self._file}: {module}.mask belongs to a matrix of another shape than the base's")
        num_rows, num_columns = before.shape
        mask = self._take(f"{module}.mask")
        check_shape(self.source, f"{module}.mask", mask, (num_columns // _BITS_OF_MASK, num_rows))
        if mask.dtype != torch.int32:
            raise CheckpointError(f"{self._file}: {module}.mask is of type {mask.dtype} instead of int32")
        scale = check_shape(self.source, f"{module}.coeff", self._take(f"{module}.coeff").reshape(()), ())
        # The bytes of a little-endian number are its bits from the lowest up: just the order of `SignPlane`.
        bits = mask.T.contiguous().view(torch.uint8)
        return Term(SIGN.name, {"bits": bits, "row_scale": scale.float().expand(num_rows).contiguous()})

    def _take(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self._file} lacks {name!r}; it is not whole")
        self._used.add(name)
        tensor = self._tensors[name].detach()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self._file}: {name!r} holds values that are not finite")
        return tensor


def _load(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is no whole file of tensors written by torch.save ({reason:.200})") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file} does not hold tensors by name; is it a diff.pt of BitDelta?")
    return content
