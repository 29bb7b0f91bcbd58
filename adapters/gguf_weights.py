"""The weights of a GGUF file under Hugging Face names, or the parts of them that are wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.gguf_architectures import Rearrangement, find_architecture
from adapters.stretches import Select, Stretches
from compression.gguf import dequantize, read_grouped
from compression.gguf.dequantize import split_blocks
from compression.grouped_weight import GroupedWeight
from registry.checkpoint import Checkpoint
from registry.errors import CheckpointError
from registry.ggml_types import GGML_TYPES
from registry.tensor_header import TensorHeader

Bytes: TypeAlias = npt.NDArray[np.uint8]

_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


def read_gguf(
    checkpoint: Checkpoint, config: Mapping[str, Any], kept_types: Collection[str], select: Select
) -> Iterator[tuple[str, Tensor | GroupedWeight]]:
    """See `adapters.weights.iterate_weights`.

    Args:
        kept_types: types whose blocks are given as they are, where whole rows have kept their order.
    """
    architecture = find_architecture(checkpoint.metadata)
    (file,) = checkpoint.files
    try:
        data = np.memmap(file, np.uint8, mode="r")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    for header in checkpoint.tensors.values():
        translated = architecture.translate(header.name)
        if translated is None:
            continue
        name, rearrange = translated
        stored = data[header.offset_bytes : header.offset_bytes + header.num_bytes]
        if rearrange is not None and not rearrange.moves_whole_rows:
            weight = rearrange.apply(dequantize(stored, header.dtype, header.shape), config)
            wanted = select(name, tuple(weight.shape))
            yield name, weight if wanted is None else wanted.cut(weight)
            continue
        yield name, _read(stored, header, rearrange, config, header.dtype in kept_types, select(name, header.shape))


def _read(
    stored: Bytes,
    header: TensorHeader,
    rearrange: Rearrangement | None,
    config: Mapping[str, Any],
    can_keep: bool,
    wanted: Stretches | None,
) -> Tensor | GroupedWeight:
    """A tensor whose rows may have to be put into another order, or what is wanted of it."""
    shape = header.shape
    rows: Tensor | None = None  # of the file, in the order in which they are wanted
    if rearrange is not None:
        rows = rearrange.apply(torch.arange(shape[0]), config)
    if wanted is not None and wanted.axis == 0:
        rows = wanted.cut(torch.arange(shape[0]) if rows is None else rows)
        stored = _blocks(stored, header)[rows.numpy()].reshape(-1)
        shape, wanted, rows = (len(rows), *shape[1:]), None, None
    elif wanted is not None and wanted.are_multiples_of(_TYPES[header.dtype].block_size):
        in_blocks = wanted.in_units_of(_TYPES[header.dtype].block_size)
        blocks = _blocks(stored, header)
        stored = np.concatenate([blocks[:, start:end] for start, end in in_blocks.ranges], axis=1).reshape(-1)
        shape, wanted = wanted.of_shape(shape), None
    grouped = read_grouped(stored, header.dtype, shape) if can_keep else None
    if grouped is not None:
        kept = grouped if rows is None else grouped.map_rows(lambda each: each[rows])
        return kept if wanted is None else wanted.cut_grouped(kept)
    weight = dequantize(stored, header.dtype, shape)
    weight = weight if rows is None else weight[rows]
    return weight if wanted is None else wanted.cut(weight)


def _blocks(stored: Bytes, header: TensorHeader) -> Bytes:
    """Of a vector or matrix. -> [rows, blocks of a row, bytes of a block]"""
    kind = _TYPES[header.dtype]
    return split_blocks(stored, kind, header.shape).reshape(header.shape[0], -1, kind.block_bytes)
