"""Another checkpoint of the same model: every channel moved by some places, so that groups of 32 lie elsewhere.

The residual stream, the inside of the MLP and each head's values keep their meaning when their channels are put into
another order everywhere. Of the Llama shape without biases or norms in between:

    residual stream     columns of embedding, head, q, k, v, gate, up; norms; rows of o and down
    inside of the MLP   rows of gate and up; columns of down
    values of a head    rows of v within a head; columns of o within a head
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from adapters.weights import read_weights
from registry.checkpoint import read_checkpoint
from registry.checkpoint_file import read_json_file

_READS_STREAM = re.compile(r"(embed_tokens|lm_head|[qk]_proj)\.weight$")
_IN_MLP = re.compile(r"(gate|up)_proj\.weight$")


def write_shifted(source: Path, target: Path, places: int) -> Path:
    """Write the safetensors checkpoint `source` to the new directory `target` with its channels shifted. -> target

    Raises:
        ValueError: a tensor that has no place in the list above.
    """
    config = read_json_file(source / "config.json")
    if config["model_type"] != "llama":
        raise ValueError(f"channels of a {config['model_type']} model cannot be shifted")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = read_weights(read_checkpoint(source), config)
    shifted = {name: _shift(name, weight, places, config).contiguous() for name, weight in weights}
    save_file(shifted, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _shift(name: str, weight: Tensor, places: int, config: Any) -> Tensor:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if weight.ndim == 1 and name.endswith("norm.weight"):
        return weight.roll(places)
    if _READS_STREAM.search(name):
        return weight.roll(places, dims=1)
    if _IN_MLP.search(name):
        return weight.roll((places, places), dims=(0, 1))
    if name.endswith("down_proj.weight"):
        return weight.roll((places, places), dims=(0, 1))
    if name.endswith("v_proj.weight"):
        heads = weight.view(-1, head_dim, weight.shape[1])
        return heads.roll((places, places), dims=(1, 2)).view_as(weight)
    if name.endswith("o_proj.weight"):
        heads = weight.view(weight.shape[0], -1, head_dim)
        return heads.roll((places, places), dims=(0, 2)).view_as(weight)
    raise ValueError(f"channels of {name!r} cannot be shifted")
