"""Small checkpoints: a base, and fine-tunes of it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from delta.codecs.policy import CodecPolicy
from delta.delta_config import DeltaConfig
from delta.make import Labels, make_delta

LOSSLESS = CodecPolicy("lossless")
DENSE = CodecPolicy("dense")
SIGN = CodecPolicy("sign")


def save(path: Path, weights: dict[str, torch.Tensor], **files: str) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    for name, content in ({"config": "{}"} | files).items():
        (path / f"{name}.json").write_text(content)
    return path


def base_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(20, 8, generator=generator).to(dtype),
        "up": torch.randn(16, 8, generator=generator).to(dtype),
        "down": torch.randn(8, 16, generator=generator).to(dtype),
        "norm": torch.ones(8),
        "table": torch.arange(6),
    }


def tuned_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """All but the embedding changed."""
    weights = base_weights(dtype)
    generator = torch.Generator().manual_seed(1)
    weights["up"][3] *= 1.5  # dense, in the weights' own dtype
    weights["down"] = (weights["down"].float() + torch.randn(8, 16, generator=generator) * 1e-3).to(dtype)
    weights["norm"][:2] = torch.tensor([float("nan"), -0.0])  # no sum gives these bits
    weights["table"][1] = 7
    return weights


def make(base: Path, target: Path, out: Path, policy: CodecPolicy = LOSSLESS, *, force: bool = False) -> DeltaConfig:
    return make_delta(base, target, out, policy, labels=Labels(), force=force, report=lambda line: None)
