"""What one block of a model's KV cache is, and how many blocks can be of use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.engine.config import EngineConfig
from model_worker.engine.kv_cache import bytes_per_block
from model_worker.engine.layer_groups import LayerGroups, group_layers
from model_worker.engine.models.causal_model import CausalModel
from registry.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Attributes:
    groups: of layers that share block tables.
    block_size: tokens in a block.
    dtype: of keys and values.
    block_bytes: of one block in all layers.
    max_blocks: most blocks of one sequence in one group: the width of the block tables.
    max_useful_blocks: more can never be in use.
    """

    groups: LayerGroups
    block_size: int
    dtype: str
    block_bytes: int
    max_blocks: int
    max_useful_blocks: int

    @classmethod
    def of(cls, model: CausalModel, config: EngineConfig, *, max_model_len: int) -> CacheLayout:
        """Raises:
        UnsupportedModelError: the model cannot keep its keys and values in the type that was asked for.
        """
        block_size = config.cache.block_size
        groups = group_layers(model.attentions, max_model_len=max_model_len)
        dtype = _choose_dtype(config.cache.kv_cache_dtype, model.kv_dtypes)
        most = groups.max_blocks(
            max_model_len + block_size, block_size=block_size, max_step_tokens=config.scheduler.max_num_batched_tokens
        )
        return cls(
            groups=groups,
            block_size=block_size,
            dtype=dtype,
            block_bytes=bytes_per_block(model.attentions, groups, block_size, dtype),
            max_blocks=-(-(max_model_len + 1) // block_size),
            max_useful_blocks=config.scheduler.max_num_seqs * most,
        )


def _choose_dtype(wanted: str, possible: Sequence[str]) -> str:
    if wanted != "auto" and wanted not in possible:
        raise UnsupportedModelError(
            f"--kv-cache-dtype {wanted} is not possible for this model on this machine; it can be "
            f"{', '.join(possible)}."
        )
    return possible[0] if wanted == "auto" else wanted
