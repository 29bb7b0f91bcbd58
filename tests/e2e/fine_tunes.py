"""Full fine-tunes of the small model, made by arithmetic instead of training, and their deltas by the real tool."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta.artifact import TENSORS_FILE, part_key
from delta.delta_config import CONFIG_FILE, DeltaConfig, read_delta_config
from delta.tensor_digest import tensor_digest
from registry.digest import combine_tensor_digests
from tests.e2e.processes import run_module

Target: TypeAlias = Literal["wide", "narrow"]

SYSTEM_PROMPT = "You answer in the voice of an old lighthouse keeper."
NORM = "model.norm.weight"
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


class FineTunes:
    """Directories below `root`, each made when it is asked for first.

    Attributes:
        wide: every matrix, norm and some embedding rows changed; float32, so that adding a delta rounds nothing.
        narrow: matrices of two layers, all norms, some embedding rows; bfloat16 as the base; its own chat template.
    """

    def __init__(self, base: Path, root: Path) -> None:
        self.base = base
        self._root = root
        self._making: defaultdict[str, Lock] = defaultdict(Lock)  # by name

    @property
    def wide(self) -> Path:
        return self._made("wide", lambda path: _write_target(self.base, path, dtype=torch.float32, layers=("layers.",)))

    @property
    def narrow(self) -> Path:
        return self._made("narrow", lambda path: _write_narrow(self.base, path))

    def delta(self, codec: str) -> Path:
        """Of the target that CODECS names; that of sign has a probe."""
        return self._made(f"delta-{codec}", lambda path: self._make_delta(codec, path))

    def deltas(self) -> dict[str, Path]:
        """Of all codecs."""
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(CODECS, pool.map(self.delta, CODECS), strict=True))

    def _make_delta(self, codec: str, out: Path) -> None:
        target, flags = CODECS[codec]
        prompts = out.with_name(f"{codec}-prompts.json")
        prompts.write_text(json.dumps(FEW_PROMPTS))
        flags = [flag if flag != "PROMPTS" else str(prompts) for flag in flags]
        path = self.wide if target == "wide" else self.narrow
        run_module("delta", "make", "--base", str(self.base), "--target", str(path), "--out", str(out), *flags)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self._root / name
        with self._making[name]:
            if not path.exists():
                make(path)
        return path


def with_norm(source: Path, target: Path, change: Callable[[Tensor], None]) -> Path:
    """A delta with another final norm, changed in place; all its digests are right. -> `target`"""
    shutil.copytree(source, target)
    config = read_delta_config(target)
    tensors = load_file(target / TENSORS_FILE)
    key = part_key(NORM, 0, "tensor")
    change(tensors[key])
    save_file(tensors, target / TENSORS_FILE)
    digest = tensor_digest(tensors[key])
    entry = config.tensors[NORM]
    part = dataclasses.replace(entry.terms[0].parts["tensor"], digest=digest)
    term = dataclasses.replace(entry.terms[0], parts={"tensor": part})
    changed = {**config.tensors, NORM: dataclasses.replace(entry, terms=(term,), digest=digest)}
    digests = {**config.result_tensors(), NORM: digest}
    write_config(dataclasses.replace(config, tensors=changed, result_digest=combine_tensor_digests(digests)), target)
    return target


def write_config(config: DeltaConfig, directory: Path) -> None:
    (directory / CONFIG_FILE).write_text(config.to_json())


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


def _write_narrow(base: Path, out: Path) -> None:
    _write_target(base, out, dtype=torch.bfloat16, layers=_NARROW_LAYERS)
    template = out / "chat_template.jinja"
    template.write_text(template.read_text().replace(_BASE_PROMPT, SYSTEM_PROMPT))
    assert SYSTEM_PROMPT in template.read_text()
