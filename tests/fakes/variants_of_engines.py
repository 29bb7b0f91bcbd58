"""What tests of the engine with variants need: fine-tunes as files, variants that are there, and all answers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_worker.engine.llm_engine import LLMEngine


def write_fine_tune(base: Path, target: Path, seed: int, share: float) -> Path:
    """The base with some of the numbers of its matrices changed, and all norms.

    Args:
        share: of a matrix's numbers that is changed.
    """
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator) * weight.std()
        chosen = torch.rand(weight.shape, generator=generator) < share
        weights[name] = weight + (noise * chosen if weight.ndim > 1 else noise * 0.1)
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((base / "config.json").read_bytes())
    return target


def add_variant(engine: LLMEngine, name: str, path: Path) -> None:
    """Returns when it is there.

    Raises:
        RootgraftError: it is refused.
    """
    reply = engine.loras.add(name, path)
    while not reply.done():
        engine.advance_loras()
    reply.result(0)


def run_to_end(engine: LLMEngine) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """By request: its tokens, and the logprobs of its prompt's tokens but the first, where it asked for them."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, Tensor] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            if output.prompt_logprobs is not None:
                found = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
                logprobs[output.request_id] = torch.tensor(found)
            for delta in output.deltas:
                tokens.setdefault(output.request_id, []).extend(delta.token_ids)
    engine.check_integrity()
    return tokens, logprobs
