"""Read an adapter in PEFT's format into terms. Layout and rules: docs/formats/peft.md."""

from __future__ import annotations

from pathlib import Path

from delta.extra_tokens import check_extra_rows
from delta.peft.adapter_config import LoraConfig, read_adapter_config
from delta.peft.adapter_files import (
    AdapterTensors,
    adapter_digest,
    all_finite,
    config_file,
    open_tensors,
    read_content,
    weights_file,
)
from delta.peft.base_model import BaseModel
from delta.peft.ia3 import read_ia3
from delta.peft.lora import read_lora
from delta.peft.resized_base import resize_base
from delta.peft.terms_builder import TermsBuilder
from delta.peft.whole_modules import read_whole_modules
from delta.variant_terms import VariantTerms
from registry.errors import CheckpointError


def read_peft_adapter(directory: Path, base: BaseModel) -> VariantTerms:
    """Read an adapter that was trained on `base`. Tensors may share one piece of memory; any thread may call this.

    Every tensor of the file is used exactly once, and every one that the configuration calls for must be there.

    Raises:
        CheckpointError: missing, damaged or contradictory files, values that are not finite, or another base.
        UnsupportedModelError: an adapter that we cannot compute exactly; the message says what to do.
    """
    config_path, weights_path = config_file(directory), weights_file(directory)
    before = _states(config_path, weights_path)
    weights = read_content(weights_path)
    digest = adapter_digest([read_content(config_path), weights])
    config = read_adapter_config(config_path)
    builder = TermsBuilder(config_path)
    tensors = open_tensors(weights)
    _check_base_digest(tensors, base)
    resized = resize_base(config, tensors, base)
    trained_on = resized or base
    if isinstance(config, LoraConfig):
        read_lora(config, tensors, trained_on, builder)
    else:
        read_ia3(config, tensors, trained_on, builder)
    tied = isinstance(config, LoraConfig) and config.tied
    read_whole_modules(config.targets, tensors, trained_on, builder, tied=tied)
    tensors.check_all_taken()
    if _states(config_path, weights_path) != before:
        raise CheckpointError(f"{directory} was written to while it was read; load it again")
    terms = builder.build(digest)
    if resized is not None:
        terms = resized.split(terms)
        check_extra_rows(terms, base.shapes, directory)
    if terms.num_modules == 0:
        raise CheckpointError(f"{directory} changes no module of this base; was it trained on another one?")
    of_file = weights.data.data_ptr()  # these are known to be finite
    computed = (tensor for tensor in terms.tensors() if tensor.untyped_storage().data_ptr() != of_file)
    if not all(all_finite(tensor) for tensor in computed):
        raise CheckpointError(f"{weights_path}: with its scales, values are not finite; train the adapter again")
    return terms


def _states(*files: Path) -> list[tuple[int, int, int]]:
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); load the adapter again") from error
    return [(at.st_ino, at.st_size, at.st_mtime_ns) for at in found]


def _check_base_digest(tensors: AdapterTensors, base: BaseModel) -> None:
    wanted = tensors.metadata.get("base_digest")
    if wanted is not None and base.digest is not None and wanted != base.digest:
        raise CheckpointError(
            f"{tensors.file} was trained on the base {wanted}, but this one is {base.digest}; "
            "serve it with its own base"
        )
