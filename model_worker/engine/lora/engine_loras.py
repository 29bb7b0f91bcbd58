"""The adapters of an engine that has loaded its model: where they come from, and how much memory they get."""

from __future__ import annotations

from model_worker.engine.config import LoraConfig
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.models.causal_model import CausalModel


def make_lora_manager(config: LoraConfig, model: CausalModel) -> LoraManager | None:
    """None: this way of computing the model has no place for adapters."""
    return None
