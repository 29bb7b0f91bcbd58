"""How many tokens a fine-tune has rows for, by its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from delta.delta_config import read_delta_config
from delta.fine_tune_files import is_delta
from delta.peft.adapter_config import CONFIG_FILE, LoraConfig, read_adapter_config
from delta.peft.adapter_files import WEIGHTS_FILES
from registry.parameter_names import is_input_embedding
from registry.safetensors_header import read_safetensors_header

_WRAPPERS = (".base_layer", ".token_adapter", ".original_module", ".modules_to_save")


def vocabulary_rows(directory: Path) -> int:
    """Tokens for which the directory of a delta or an adapter brings rows of the input embedding; 0: for none.

    Whether the rows are usable, is for who reads them to say.

    Raises:
        CheckpointError: a file cannot be read.
        UnsupportedModelError: an adapter of a kind that is not served.
    """
    return max(_of_delta(directory) if is_delta(directory) else _of_adapter(directory), default=0)


def _of_delta(directory: Path) -> Iterator[int]:
    for name, tensor in read_delta_config(directory).tensors.items():
        if is_input_embedding(name) and len(tensor.shape) == 2:
            yield tensor.shape[0]


def _of_adapter(directory: Path) -> Iterator[int]:
    weights = directory / WEIGHTS_FILES[0]
    for name, header in read_safetensors_header(weights).items() if weights.is_file() else ():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if is_input_embedding(name) and len(header.shape) == 2:
            yield header.shape[0]
    config = read_adapter_config(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else None
    if isinstance(config, LoraConfig):
        yield from (max(token_ids) + 1 for token_ids in config.token_indices.values())
