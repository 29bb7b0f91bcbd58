"""Which family a checkpoint belongs to, by what it says of itself: config.json, or a GGUF file's key-values."""

from __future__ import annotations

from registry.checkpoint import Checkpoint
from registry.checkpoint_file import read_json_file
from registry.errors import CheckpointError, UnsupportedModelError
from registry.families import ModelFamily, find_family, find_family_of_gguf


def checkpoint_family(checkpoint: Checkpoint) -> ModelFamily:
    """The family of `checkpoint`; a refused family is returned too, with its reason in `refused`.

    Raises:
        CheckpointError: config.json is missing or damaged, or does not name a model_type.
        UnsupportedModelError: the family is unknown, or the model is no causal language model.
    """
    if checkpoint.format == "gguf":
        return _gguf_family(checkpoint)
    path = checkpoint.path / "config.json"
    config = read_json_file(path)
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} names no model_type; it is not a transformers checkpoint")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{path} has architectures that are not a list of names")
    return find_family(model_type, architectures)


def require_served(family: ModelFamily) -> None:
    """Raises UnsupportedModelError with the reason when the engine refuses the family."""
    if family.refused is not None:
        raise UnsupportedModelError(f"{family.name} models are not served: {family.refused}")


def _gguf_family(checkpoint: Checkpoint) -> ModelFamily:
    architecture = checkpoint.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{checkpoint.files[0]} names no general.architecture; convert it again")
    # llama.cpp writes mixtral as llama with experts.
    if architecture == "llama" and checkpoint.metadata.get("llama.expert_count", 0):
        return find_family("mixtral", [])
    return find_family_of_gguf(architecture)
