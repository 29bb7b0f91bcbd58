"""The adapters of a model that is loaded: where they come from, and how much memory they get."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from adapters.memory import available_memory_bytes
from delta.peft.compose import compose
from delta.variant_reader import read_variant
from delta.variant_terms import VariantTerms
from model_worker.engine.config import LoraConfig
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost
from model_worker.engine.lora.loader_thread import loader_thread
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.served_base import ServedBase
from model_worker.engine.models.causal_model import CausalModel
from registry.errors import UnsupportedModelError

_SHARE_OF_FREE = 0.25

T = TypeVar("T")


def make_lora_manager(config: LoraConfig, model: CausalModel, *, base_digest: str) -> LoraManager:
    """For a model whose cache is allocated; one that cannot compute variants refuses all adapters."""
    base = ServedBase(model, base_digest)

    def read(directory: Path) -> VariantTerms:
        if not isinstance(model, VariantHost):
            raise UnsupportedModelError("This way of computing the model has no place for LoRA adapters.")
        return read_variant(directory, base)

    def bind(terms: VariantTerms) -> BoundVariant:
        assert isinstance(model, VariantHost)
        return model.bind(terms)

    if config.lora_memory_gib is None:
        memory_bytes = int(available_memory_bytes() * _SHARE_OF_FREE)
    else:
        memory_bytes = int(config.lora_memory_gib * 2**30)
    if isinstance(model, VariantHost) and not model.binds_in_host_memory:
        source = LoraSource(read, compose, hold=_itself, bind=bind, binds_in_place=False)
    else:
        source = LoraSource(read, compose, hold=bind, bind=_itself, binds_in_place=True)
    return LoraManager(config, source, memory_bytes=memory_bytes, work=loader_thread())


def _itself(variant: T) -> T:
    return variant
