"""Plain differences of weights: a model directory whose tensors are W' - W, as FastChat publishes fine-tunes.

Read and written tensor by tensor, so there is no need of a mode with low memory. Source:
https://github.com/lm-sys/FastChat, fastchat/model/make_delta.py and apply_delta.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from compression.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.codecs.codec import Term
from delta.codecs.dense import DENSE
from delta.imports.write_import import check_shape
from delta.output_path import check_apart
from registry.companion_files import companion_files
from registry.digest import Progress
from registry.errors import CheckpointError
from registry.staged_directory import staged_directory


class WeightDifferences:
    """`Changes` of a directory of differences: W' = cast(fp32(W) + fp32(D)) in the base's dtype."""

    source = "weight differences"

    def __init__(self, tensors: CheckpointTensors) -> None:
        self._tensors = tensors
        self._used: set[str] = set()

    def change(self, name: str, before: Tensor) -> tuple[Term, ...] | Tensor | None:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} lacks {name!r} of the base; is it the difference to this base?")
        self._used.add(name)
        difference = check_shape(str(self._path), name, self._tensors.read(name), tuple(before.shape))
        if not difference.any():
            return None
        if before.ndim < 2 or not (before.is_floating_point() and difference.is_floating_point()):
            return (before.float() + difference.float()).to(before.dtype)
        parts = {"difference": difference}
        try:
            DENSE.check(parts, (difference.numel() // difference.shape[-1], difference.shape[-1]))
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {name!r}: {error}") from error
        return (Term(DENSE.name, {"difference": difference.reshape(-1, difference.shape[-1])}),)

    def check_all_used(self) -> None:
        # Buffers that older versions of transformers stored have no counterpart, and did not change.
        unused = [name for name in self._tensors.names() if name not in self._used and self._tensors.read(name).any()]
        if unused:
            raise CheckpointError(
                f"{self._path} changes {len(unused)} tensors that this base does not have ({', '.join(unused[:3])}); "
                "give the base that it was made from"
            )

    @property
    def _path(self) -> Path:
        return self._tensors.checkpoint.path


def make_weight_difference(
    base: Path, target: Path, out: Path, *, force: bool = False, progress: Progress | None = None
) -> None:
    """Write W' - W in the dtype of W', with the fine-tune's files, to the directory `out`.

    As with FastChat, adding it again gives the fine-tune back but for rounding: a difference of two numbers of 16 bits
    is mostly none of 16 bits. `python -m delta make` with the codec dense is exact.

    Raises:
        CheckpointError: other tensors than the base's, a file that cannot be read, or `out` exists.
        InternalError: the disk is full.
    """
    check_apart(out, base, target)
    with (
        open_checkpoint(base) as ours,
        open_checkpoint(target) as theirs,
        staged_directory(out, replaces=("config.json",) if force else ()) as staging,
    ):
        names = theirs.names()
        if set(names) != set(ours.names()):
            odd = sorted(set(names) ^ set(ours.names()))
            raise CheckpointError(f"only one of {base} and {target} has {', '.join(odd[:3])}; these are no differences")
        with SafetensorsWriter(staging, names, max_shard_bytes=MAX_SHARD_BYTES) as writer:
            done = 0
            for name in names:
                after = theirs.read(name)
                before = check_shape(str(base), name, ours.read(name), tuple(after.shape))
                writer.add(name, (after.float() - before.float()).to(after.dtype))
                done += after.nbytes
                if progress is not None:
                    progress(done, theirs.num_bytes)
        for name, file in companion_files(target).items():
            shutil.copyfile(file, staging / name)
