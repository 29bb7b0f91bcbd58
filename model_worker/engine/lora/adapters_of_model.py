"""The adapters of a model that is loaded: where they come from, and how much memory they get."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from adapters.memory import available_memory_bytes
from delta.peft.compose import compose
from delta.variant_reader import read_variant
from delta.variant_terms import VariantTerms
from model_worker.engine.config import LoraConfig
from model_worker.engine.gpu_memory import binding_variants
from model_worker.engine.lora.bound_variant import BoundVariant, VariantBinder, VariantHost
from model_worker.engine.lora.loader_thread import loader_thread
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.served_base import ServedBase
from model_worker.engine.models.causal_model import CausalModel
from registry.errors import UnsupportedModelError

_SHARE_OF_FREE = 0.25

T = TypeVar("T")


def make_lora_manager(
    config: LoraConfig, model: CausalModel, *, base_digest: str, binder: VariantBinder | None = None
) -> LoraManager:
    """For a model whose cache is allocated; one that cannot compute variants refuses all adapters.

    Args:
        binder: None: the model itself.
    """
    if not isinstance(model, VariantHost):
        binder = None
    elif binder is None:
        binder = model
    base = ServedBase(model, base_digest, binder)

    def read(directory: Path) -> VariantTerms:
        if binder is None:
            raise UnsupportedModelError("This way of computing the model has no place for LoRA adapters.")
        return read_variant(directory, base)

    def bind(terms: VariantTerms) -> BoundVariant:
        assert binder is not None
        with binding_variants():
            return binder.bind(terms)

    if config.lora_memory_gib is None:
        memory_bytes = int(available_memory_bytes() * _SHARE_OF_FREE)
    else:
        memory_bytes = int(config.lora_memory_gib * 2**30)
    if binder is not None and not binder.binds_in_host_memory:
        source = LoraSource(read, compose, hold=_itself, bind=bind, binds_in_place=False)
    else:
        source = LoraSource(read, compose, hold=bind, bind=_itself, binds_in_place=True)
    return LoraManager(config, source, memory_bytes=memory_bytes, work=loader_thread())


def _itself(variant: T) -> T:
    return variant
