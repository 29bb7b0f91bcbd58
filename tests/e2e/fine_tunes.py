"""Full fine-tunes of the small model, made by arithmetic instead of training, and their deltas by the real tool."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.processes import run_module

Target: TypeAlias = Literal["wide", "narrow"]

SYSTEM_PROMPT = "You answer in the voice of an old lighthouse keeper."
FEW_PROMPTS = ("The river runs through the old town and", "def fibonacci(n):")
_BASE_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_NARROW_LAYERS = ("layers.3.", "layers.17.")
_NUM_EMBEDDING_ROWS = 64

CODECS: dict[str, tuple[Target, Sequence[str]]] = {
    "sign": ("wide", ("--codec", "sign", "--residual", "lowrank", "--prompts", "PROMPTS")),
    "ternary": ("wide", ("--codec", "ternary", "--no-quality")),
    "lowrank": ("wide", ("--codec", "lowrank", "--no-quality")),
    "lossless": ("narrow", ("--codec", "lossless")),
    "sparse": ("narrow", ("--codec", "sparse")),
    "dense": ("narrow", ("--codec", "dense")),
}
EXACT = ("lossless", "sparse", "dense")


@dataclass(frozen=True, slots=True)
class FineTunes:
    """Directories.

    Attributes:
        wide: every matrix, norm and some embedding rows changed; float32, so that adding a delta rounds nothing.
        narrow: matrices of two layers, all norms, some embedding rows; bfloat16 as the base; its own chat template.
        deltas: by codec, of the target that CODECS names; that of sign has a probe.
    """

    base: Path
    wide: Path
    narrow: Path
    deltas: dict[str, Path]

    def target(self, codec: str) -> Path:
        return {"wide": self.wide, "narrow": self.narrow}[CODECS[codec][0]]


def make_fine_tunes(base: Path, root: Path) -> FineTunes:
    """All of them below `root`."""
    made = FineTunes(base, root / "wide", root / "narrow", {codec: root / f"delta-{codec}" for codec in CODECS})
    _write_target(base, made.wide, dtype=torch.float32, layers=("layers.",))
    _write_target(base, made.narrow, dtype=torch.bfloat16, layers=_NARROW_LAYERS)
    template = made.narrow / "chat_template.jinja"
    template.write_text(
        template.read_text().replace(
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face", SYSTEM_PROMPT
        )
    )
    assert SYSTEM_PROMPT in template.read_text()
    prompts = root / "prompts.json"
    prompts.write_text(json.dumps(FEW_PROMPTS))

    def make(codec: str) -> None:
        flags = [flag if flag != "PROMPTS" else str(prompts) for flag in CODECS[codec][1]]
        arguments = ("--base", str(base), "--target", str(made.target(codec)), "--out", str(made.deltas[codec]))
        run_module("delta", "make", *arguments, *flags)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, CODECS))
    return made


def _write_target(base: Path, out: Path, *, dtype: torch.dtype, layers: Sequence[str]) -> None:
    """The base with other norms and embedding rows, and other matrices in `layers`: four directions, and noise."""
    generator = torch.Generator().manual_seed(len(layers))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    for name, weight in tensors.items():
        changed = weight.float()
        if weight.ndim == 1:
            changed *= 1 + 0.02 * noise(*weight.shape)
        elif "embed" in name:
            rows = torch.randperm(len(weight), generator=generator)[:_NUM_EMBEDDING_ROWS]
            changed[rows] += 0.3 * changed.std() * noise(len(rows), weight.shape[1])
        elif any(layer in name for layer in layers):
            directions = noise(weight.shape[0], 4) @ noise(4, weight.shape[1]) / math.sqrt(4)
            changed += 0.05 * changed.std() * (directions + noise(*weight.shape))
        tensors[name] = changed.to(dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
