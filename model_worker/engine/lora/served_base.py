"""The loaded model, as readers of adapters look at it."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from delta.peft.base_model import ExpertsShape, LinearShape, ModelShapes, model_shapes
from model_worker.engine.lora.bound_variant import VariantBinder, VariantHost
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.models.decoder_parameters import EMBEDDING, HEAD


@runtime_checkable
class _HoldsModule(Protocol):
    """A model that is computed by a module of transformers, some of whose layers were replaced."""

    causal_lm: Any


class ServedBase:
    """A `delta.peft.base_model.BaseModel`.

    Args:
        binder: has its weights; None: the model itself.
    """

    def __init__(self, model: CausalModel, digest: str, binder: VariantBinder | None = None) -> None:
        self.digest = digest or None
        self._model = model
        self._binder = binder

    @cached_property
    def shapes(self) -> ModelShapes:
        if isinstance(self._model, _HoldsModule):
            return _shapes_of_module(self._model.causal_lm)
        return _shapes_of_native(self._model)

    def weight(self, module: str) -> Tensor:
        return self._weights().base_weight(module)

    def bias(self, module: str) -> Tensor:
        return self._weights().base_bias(module)

    def _weights(self) -> VariantBinder:
        if self._binder is not None:
            return self._binder
        assert isinstance(self._model, VariantHost)
        return self._model


def _shapes_of_module(causal_lm: Any) -> ModelShapes:
    """As they were before layers were replaced."""
    config = copy.deepcopy(causal_lm.config)
    config._attn_implementation = "eager"  # some families choose classes by this name, and know none of ours
    with torch.device("meta"):
        return model_shapes(type(causal_lm)(config))


def _shapes_of_native(model: CausalModel) -> ModelShapes:
    """The native decoder's parameters have the names that transformers gives them."""
    parameters = {name: tuple(tensor.shape) for name, tensor in model.weights()}
    embedding, head = EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
    linears = {
        module: LinearShape(shape[0], shape[1], has_bias=f"{module}.bias" in parameters)
        for name, shape in parameters.items()
        if len(shape) == 2 and (module := name.removesuffix(".weight")) != embedding
    }
    rows, width = parameters[EMBEDDING]
    tied = HEAD not in parameters
    if tied:
        linears[head] = LinearShape(rows, width)
    return ModelShapes(
        linears=linears,
        experts={name: _experts_shape(name, shape) for name, shape in parameters.items() if len(shape) == 3},
        embeddings={embedding: (rows, width)},
        vectors={
            name: shape
            for name, shape in parameters.items()
            if len(shape) == 1 and name.removesuffix(".bias") not in linears
        },
        tied={head: embedding} if tied else {},
        input_embedding=embedding,
        output_head=head,
    )


def _experts_shape(name: str, shape: tuple[int, ...]) -> ExpertsShape:
    num_experts, out_features, in_features = shape
    return ExpertsShape(num_experts, out_features, in_features, gate_and_up=name.endswith("gate_up_proj"))
