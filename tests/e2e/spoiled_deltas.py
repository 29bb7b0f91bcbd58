"""Deltas that must not be served, made of good ones. Their files fit each other as far as that can be."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from delta.artifact import TENSORS_FILE
from delta.delta_config import read_delta_config
from registry.digest import combine_tensor_digests
from tests.e2e.fine_tunes import NORM, with_norm, write_config
from tests.e2e.processes import run_module


def truncated(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    file = target / TENSORS_FILE
    file.write_bytes(file.read_bytes()[:-1000])


def with_nan(source: Path, target: Path) -> None:
    """All digests are right: the fine-tune itself was bad."""

    def spoil(norm: torch.Tensor) -> None:
        norm[5] = torch.nan

    with_norm(source, target, spoil)


def of_another_base(source: Path, target: Path) -> None:
    """Same names and shapes, other numbers."""
    shutil.copytree(source, target)
    config = read_delta_config(target)
    tensors = {**config.base.tensors, NORM: "0" * 64}
    base = dataclasses.replace(config.base, tensors=tensors, digest=combine_tensor_digests(tensors))
    write_config(dataclasses.replace(config, base=base), target)


def of_another_architecture(source: Path, target: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    models = {name: target.with_name(f"{target.name}-{name}") for name in ("base", "fine-tune")}
    for path in models.values():
        LlamaForCausalLM(config).save_pretrained(path)
    base, fine_tune = map(str, models.values())
    run_module("delta", "make", "--base", base, "--target", fine_tune, "--out", str(target), "--codec", "dense")


def with_another_probe(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    config = read_delta_config(target)
    assert config.probe is not None
    cases = tuple(
        dataclasses.replace(case, top_logprobs=tuple(logprob - 3 for logprob in case.top_logprobs))
        for case in config.probe.cases
    )
    write_config(dataclasses.replace(config, probe=dataclasses.replace(config.probe, cases=cases)), target)
