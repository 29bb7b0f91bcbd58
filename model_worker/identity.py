"""The digest of the weights that a worker serves."""

from __future__ import annotations

from pathlib import Path

from adapters.load_plan import LoadPlan
from delta.delta_config import read_delta_config
from registry.digest_cache import cached_base_digest


def weights_digest(plan: LoadPlan, cache_dir: Path) -> str:
    """ "sha256:…" of the tensors: the base's, or the fine-tune's that the last delta leads to.

    Raises:
        CheckpointError: the checkpoint or the delta cannot be read.
    """
    if plan.deltas:
        return read_delta_config(plan.deltas[-1]).result_digest
    return cached_base_digest(plan.checkpoint, cache_dir)
