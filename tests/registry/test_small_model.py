"""The registry on the small real model."""

from __future__ import annotations

from pathlib import Path

from registry.checkpoint import read_checkpoint
from registry.checkpoint_family import checkpoint_family
from registry.digest import base_digest
from registry.known_models import find_known_model


def test_header_family_and_digest(smollm2_gguf: Path) -> None:
    checkpoint = read_checkpoint(smollm2_gguf)
    model = find_known_model("smollm2-135m-instruct")
    assert len(checkpoint.tensors) == 272
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 49152
    assert checkpoint.metadata["llama.context_length"] == model.context_length
    assert checkpoint.tensors["token_embd.weight"].shape == (49152, 576)
    assert checkpoint_family(checkpoint).name == model.family
    assert base_digest(checkpoint) == model.digest
