"""`replace`: the tensor itself."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.codecs.codec import Parts
from delta.codecs.part_checks import check_names, check_part


class Replace:
    """W' = tensor. A `WholeCodec`.

    Parts: tensor, of the fine-tune's dtype and shape.
    """

    name = "replace"

    def encode(self, base: Tensor | None, target: Tensor) -> Parts:
        return {"tensor": target}

    def check(self, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_names(parts, "tensor")
        check_part(parts, "tensor", (dtype,), shape)

    def decode(self, base: Tensor | None, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return parts["tensor"]


REPLACE = Replace()
