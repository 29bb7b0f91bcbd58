"""Which colour stands for what; the page defines each of them for light and dark."""

from __future__ import annotations

from model_worker.engine.model_parts import OpKind, Part

_BY_KIND = {
    OpKind.EMBEDDING: "embedding",
    OpKind.ROTARY: "embedding",
    OpKind.NORM: "norm",
    OpKind.QUANTIZE: "quantize",
    OpKind.QKV: "attention",
    OpKind.ATTENTION: "kv",
    OpKind.ATTENTION_OUTPUT: "attention",
    OpKind.ROUTER: "experts",
    OpKind.EXPERTS: "experts",
    OpKind.GATE_UP: "mlp",
    OpKind.ACTIVATION: "mlp",
    OpKind.DOWN: "mlp",
    OpKind.HEAD: "head",
}

NAMES = {
    "attention": "attention projections",
    "kv": "attention over the cache",
    "mlp": "MLP",
    "experts": "experts",
    "norm": "norms",
    "embedding": "embedding, rotary",
    "head": "head",
    "quantize": "quantization of activations",
    "other": "between modules, batch, sampling",
}
"""What each colour of a step stands for, in the order in which they are stacked."""


def series_of_kind(kind: OpKind) -> str:
    return _BY_KIND.get(kind, "other")


def series_of_part(part: Part) -> str:
    return part.value
