"""What --model-path names: a directory, a GGUF file, or a known model that is fetched into the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters.convert import convert_checkpoint
from registry.errors import CheckpointError, InvalidRequestError
from registry.fetch import fetch_model
from registry.known_models import known_models
from registry.names import is_name, parse_name


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights are and the public name that they get."""

    path: Path
    name: str


def find_model(
    model: str, *, name: str | None, cache_dir: Path, report: Callable[[str], None], has_deltas: bool = False
) -> ModelSource:
    """Find the checkpoint that `model` names; a known model's is fetched the first time.

    Args:
        model: path of a directory or GGUF file, or the name of a known model. An existing path goes before a name.
        name: the public name; None: the known name, or that of the directory or file without its suffix.
        cache_dir: where fetched models are kept.
        report: called with each line of progress.
        has_deltas: deltas will be added. Their bases are safetensors, so a known GGUF file is converted the first time.

    Raises:
        CheckpointError: neither a path nor a known name.
        InvalidRequestError: the public name does not fit the grammar of model names.
    """
    path = Path(model)
    if path.exists():
        found, default = path, path.resolve().stem if path.is_file() else path.resolve().name
    elif model in known_models():
        found, default = fetch_model(model, cache_dir, report=report), model
        if has_deltas and found.is_file():
            found = _convert(found, model, report)
    else:
        raise CheckpointError(
            f"{model} is neither a path that exists nor a known model; `python -m registry list` names those."
        )
    return ModelSource(found, _public_name(name, default))


def _convert(fetched: Path, model: str, report: Callable[[str], None]) -> Path:
    """The fetched file as safetensors beside it; made the first time."""
    converted = fetched.parent / f"{model}-safetensors"
    if not converted.is_dir():
        try:
            convert_checkpoint(fetched, converted, report=report)
        except CheckpointError:
            if not converted.is_dir():  # it is there when another worker was quicker
                raise
    return converted


def _public_name(name: str | None, default: str) -> str:
    if name is None:
        if not is_name(default):
            raise InvalidRequestError(f"{default!r} cannot be a public model name; choose one with --model-name.")
        return default
    parsed = parse_name(name)
    if str(parsed) != parsed.name:
        raise InvalidRequestError(
            f"--model-name {name}: give a name without @; versions and aliases are the catalog's."
        )
    return name
