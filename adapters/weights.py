"""The weights of a checkpoint, one tensor at a time, under Hugging Face names, whatever the file format.

Memory beyond the model that is being filled: one tensor (for `.bin`, one shard where the file cannot be mapped).
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from adapters.gguf_architectures import find_architecture
from adapters.gguf_weights import read_gguf
from adapters.load_plan import LoadPlan
from adapters.stretches import Select, Stretches, select_all
from compression.grouped_weight import GroupedWeight
from delta.artifact import open_delta
from delta.delta_stack import DeltaStack
from registry.checkpoint import Checkpoint
from registry.errors import CheckpointError

Weight: TypeAlias = torch.Tensor | GroupedWeight


def iterate_weights(
    plan: LoadPlan, *, keep_blocks: bool = False, select: Select = select_all
) -> Iterator[tuple[str, Weight]]:
    """Every weight of the planned model with the plan's deltas added, in the order of the files.

    Dtypes are the stored ones (GGUF: float32), not the plan's; converting is the caller's work. A tensor may be mapped
    from the file: copy it, do not write to it.

    Args:
        keep_blocks: give matrices of `plan.kept_types` as `GroupedWeight`, unless there are deltas, which belong to
            numbers.
        select: what is wanted of each, asked just before it is read. The rest is not read, except where it is needed:
            under deltas, and of GGUF blocks that would be cut.

    Raises:
        CheckpointError: a truncated or unsafe file, a tensor that the model does not have, a delta for another base.
    """
    if not plan.deltas:
        yield from _read(plan.checkpoint, plan.config, plan.kept_types if keep_blocks else frozenset(), select)
        return
    with ExitStack() as stack:
        deltas = DeltaStack([stack.enter_context(open_delta(path)) for path in plan.deltas])
        for name, tensor in read_weights(plan.checkpoint, plan.config):
            merged = deltas.apply(name, tensor)
            yield name, _selected(merged, select(name, tuple(merged.shape)))
        deltas.check_complete()


def read_weights(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a checkpoint as it is stored, under Hugging Face names; for GGUF, dequantized to float32.

    Raises:
        CheckpointError: a truncated or unsafe file, or a tensor that the model does not have.
    """
    for name, weight in _read(checkpoint, config, frozenset(), select_all):
        assert isinstance(weight, torch.Tensor)  # no type is kept in blocks
        yield name, weight


def _read(
    checkpoint: Checkpoint, config: Mapping[str, Any], kept_types: Collection[str], select: Select
) -> Iterator[tuple[str, Weight]]:
    if checkpoint.format == "gguf":
        return read_gguf(checkpoint, config, kept_types, select)
    mapped = _read_safetensors(checkpoint) if checkpoint.format == "safetensors" else _read_bin(checkpoint.files)
    return ((name, _selected(tensor, select(name, tuple(tensor.shape)))) for name, tensor in mapped)


def _selected(tensor: torch.Tensor, wanted: Stretches | None) -> torch.Tensor:
    """Of a mapped tensor, a part that is mapped too, so that of the file nothing else is read."""
    return tensor if wanted is None else wanted.cut(tensor)


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """The names that `read_weights` gives, in any order, without reading what can be left unread."""
    if checkpoint.format == "gguf":
        architecture = find_architecture(checkpoint.metadata)
        translated = (architecture.translate(name) for name in checkpoint.tensors)
        return [pair[0] for pair in translated if pair is not None]
    if checkpoint.format == "safetensors":
        return list(checkpoint.tensors)
    return [name for name, _ in _read_bin(checkpoint.files)]


def _read_safetensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    names: dict[Path, list[str]] = {}
    for header in sorted(checkpoint.tensors.values(), key=lambda header: header.offset_bytes):
        names.setdefault(header.file, []).append(header.name)
    for file in checkpoint.files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in names.get(file, ()):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error


def _read_bin(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    seen: dict[str, Path] = {}
    for file in files:
        weights = _load_pickle(file)
        for name in list(weights):
            if name in seen:
                raise CheckpointError(f"tensor {name!r} is both in {seen[name].name} and in {file.name}")
            seen[name] = file
            yield name, weights.pop(name)


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = _load_mapped(file)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors, which could run code, so it was not loaded. "
            "Use the model's safetensors release"
        ) from error
    except Exception as error:  # On damaged bytes the unpickler raises almost anything: KeyError, AssertionError, ...
        raise CheckpointError(f"{file} is truncated or not a PyTorch checkpoint; download it again") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{file} is not a mapping of names to tensors; it is no model checkpoint")
    return dict(loaded)


def _load_mapped(file: Path) -> Any:
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
