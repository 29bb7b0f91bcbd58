"""Names of the tensors of checkpoints, where they differ from those that transformers' models have today."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RENAMES = (
    (re.compile(r"^embed_out\."), "lm_head."),  # gpt_neox
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),  # mixtral
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "token_embd.weight")
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>\w+)\.weight$")
_EXPERT_MATRICES = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One expert's matrix of a mixture; transformers keeps those of all experts in one parameter.

    Attributes:
        parameter: that holds them all.
        index: of the expert.
        half: of its rows, where the parameter holds gate (0) and up projection (1); None: the matrix is whole.
    """

    parameter: str
    index: int
    half: int | None


def current_name(name: str) -> str:
    """What older checkpoints call otherwise, as it is called now."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def expert_matrix(name: str) -> ExpertMatrix | None:
    """Of a `current_name`; None: it is no single expert's."""
    found = _EXPERT.match(name)
    if found is None or found["matrix"] not in _EXPERT_MATRICES:
        return None
    matrix, half = _EXPERT_MATRICES[found["matrix"]]
    return ExpertMatrix(f"{found['experts']}.{matrix}", int(found["index"]), half)


def is_input_embedding(name: str) -> bool:
    """The tensor has a row for each token, and is no output head by its name."""
    return name.endswith(_EMBEDDINGS)
