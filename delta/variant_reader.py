"""Read a fine-tune from its directory, whichever kind it is: a LoRA adapter of PEFT, or a delta."""

from __future__ import annotations

from pathlib import Path

from delta.delta_config import delta_digest
from delta.delta_terms import read_delta
from delta.fine_tune_files import is_delta
from delta.peft.adapter_files import adapter_digest, config_file, read_content, weights_file
from delta.peft.base_model import BaseModel
from delta.peft.reader import read_peft_adapter
from delta.variant_terms import VariantTerms


def read_variant(directory: Path, base: BaseModel) -> VariantTerms:
    """As `read_delta` or `read_peft_adapter`, by the files that are there."""
    return read_delta(directory, base) if is_delta(directory) else read_peft_adapter(directory, base)


def variant_digest(directory: Path) -> str:
    """Identity of a fine-tune's files: "sha256:…".

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    if is_delta(directory):
        return delta_digest(directory)
    return adapter_digest([read_content(config_file(directory)), read_content(weights_file(directory))])
