"""What a weight or a module of a decoder is for, told by its Hugging Face name. Pure Python; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """Where the weights of a model are."""

    EMBEDDING = "embedding"  # of tokens and of positions
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"  # of a mixture, its router and its shared experts included
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"


class OpKind(StrEnum):
    """What one operation of a forward pass does."""

    PREPARE = "prepare"  # the batch: token ids, positions, slots
    EMBEDDING = "embedding"
    NORM = "norm"  # with the residual's addition, where both are one
    QUANTIZE = "quantize"  # activations, for a product with quantized weights
    QKV = "qkv"
    ROTARY = "rotary"  # with the KV write, where both are one
    ATTENTION = "attention"  # over the paged cache, with the KV write where that is not the rotary's
    ATTENTION_OUTPUT = "o_proj"
    ROUTER = "router"
    GATE_UP = "gate_up"
    ACTIVATION = "activation"
    DOWN = "down"
    EXPERTS = "experts"
    LINEAR = "linear"  # any other
    BETWEEN = "between modules"  # what a module computes itself, around those that it calls
    HEAD = "head"
    LORA = "lora"  # what variants add beside the products that they change
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module or weight is: in which layer (None: in none of them), and its name there."""

    layer: int | None
    name: str


_LAYER = re.compile(r"^(?:\w+\.)*?(?:layers|h|blocks)\.(?P<layer>\d+)(?:\.|$)")
_NORM = re.compile(r"norm|(^|[._])ln(_|$)")
_EXPERTS = re.compile(r"(^|\.)(experts|shared_experts?|shared_expert_gate)(\.|$)")
_ROUTER = re.compile(r"^(mlp|feed_forward|block_sparse_moe)\.(gate|router)(\.|$)")
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|project_in|project_out)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)(\.|$)")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"(^|\.)(mlp|feed_forward|ffn|fc1|fc2)(\.|$)")

_OUTPUT_PROJECTIONS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "wo"})
_DOWN_PROJECTIONS = frozenset({"down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def place_of(name: str) -> Place:
    """`model.layers.3.mlp.up_proj` is `mlp.up_proj` of layer 3."""
    match = _LAYER.match(name)
    return Place(None, name) if match is None else Place(int(match["layer"]), name[match.end() :])


def part_of(name: str) -> Part:
    """The part that a weight, or a module, belongs to."""
    place = place_of(name)
    if _HEAD.search(name):
        return Part.HEAD
    if place.layer is None:
        # "word_embeddings_layernorm" is a norm, "embed_tokens" is none.
        return Part.NORM if _NORM.search(name) else Part.EMBEDDING if _EMBEDDING.search(name) else Part.OTHER
    if _EXPERTS.search(place.name) or _ROUTER.search(place.name):
        return Part.EXPERTS
    if _NORM.search(place.name):
        return Part.NORM
    if _ATTENTION.search(place.name):
        return Part.ATTENTION
    return Part.MLP if _MLP.search(place.name) else Part.OTHER


def linear_kind(name: str) -> OpKind:
    """What the product of the linear layer `name` is for."""
    last = name.rpartition(".")[2]
    match part_of(name):
        case Part.HEAD:
            return OpKind.HEAD
        case Part.ATTENTION:
            return OpKind.ATTENTION_OUTPUT if last in _OUTPUT_PROJECTIONS else OpKind.QKV
        case Part.MLP | Part.EXPERTS:
            if last in _ROUTERS:
                return OpKind.ROUTER
            return OpKind.DOWN if last in _DOWN_PROJECTIONS else OpKind.GATE_UP
        case _:
            return OpKind.LINEAR
