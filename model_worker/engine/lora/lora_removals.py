"""How adapters and combinations of them go. Pure Python; no torch."""

from __future__ import annotations

from model_worker.engine.lora.lora_claims import LoraClaims
from model_worker.engine.lora.lora_directory import LoraDirectory
from model_worker.engine.lora.lora_entry import LoraEntry
from model_worker.engine.lora.lora_loader import LoraLoader
from model_worker.engine.lora.lora_tiers import LoraTiers
from registry.errors import InvalidRequestError


class LoraRemovals:
    """Takes entries out of everything that knows them, once nobody uses them."""

    def __init__(self, directory: LoraDirectory, claims: LoraClaims, tiers: LoraTiers, loader: LoraLoader) -> None:
        self._directory = directory
        self._claims = claims
        self._tiers = tiers
        self._loader = loader

    def retire(self, entry: LoraEntry) -> None:
        """Let nobody new have it; it goes with its last request, and so do its combinations."""
        self._directory.hide(entry)
        entry.removed = True
        entry.pinned = False
        for reply in entry.take_activations():
            reply.set_exception(InvalidRequestError(f"Fine-tune {entry.name} was removed."))
        for other in self._directory.combinations_with(entry):
            self.retire(other)
        self.forget_if_useless(entry)

    def forget_useless_combinations(self) -> None:
        for entry in list(self._directory.combinations.values()):
            self.forget_if_useless(entry)

    def forget_if_useless(self, entry: LoraEntry) -> None:
        """Once nobody uses it: what is removed, and combinations that are not in memory."""
        gone = entry.parts and entry.held is None and not entry.in_flight
        if entry.used or not (entry.removed or gone):
            return
        if entry.held is not None:
            self._loader.return_memory()
        self._claims.give_up(entry)
        self._tiers.drop(entry)
        self._directory.forget(entry)
