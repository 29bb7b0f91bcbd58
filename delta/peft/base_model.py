"""What a reader has to know of the model that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer y = x Wᵀ + b, W [out_features, in_features].

    Attributes:
        transposed: its parameter is stored as [in_features, out_features] (`Conv1D` of gpt2).
    """

    out_features: int
    in_features: int
    has_bias: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """A parameter with the weights of all experts, W [num_experts, out_features, in_features].

    Attributes:
        transposed: it is stored as [num_experts, in_features, out_features].
        transposed_in_peft: PEFT knows that it is (the module says `is_transposed`), and factors it that way round.
        gate_and_up: its rows are first those of all gates, then those of all ups: `gate_proj` and `up_proj` of one
            expert are halves of it.
    """

    num_experts: int
    out_features: int
    in_features: int
    transposed: bool = False
    transposed_in_peft: bool = False
    gate_and_up: bool = False


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """Modules and parameters by the names that transformers gives them in the causal language model, in its order.

    Attributes:
        linears: by module.
        experts: by parameter.
        embeddings: by module: (rows, width).
        vectors: all other parameters that a fine-tune may replace, by name: norms' weights and biases, for example.
        tied: output heads that compute with an embedding's table, and that embedding.
        input_embedding: the module that embeds tokens.
        output_head: the linear layer that gives a logit for each.
    """

    linears: Mapping[str, LinearShape]
    experts: Mapping[str, ExpertsShape] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    vectors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    input_embedding: str = ""
    output_head: str = ""


class BaseModel(Protocol):
    """The base as it is served."""

    @property
    def shapes(self) -> ModelShapes: ...

    @property
    def digest(self) -> str | None:
        """Of its weights, "sha256:...", where it is known."""
        ...

    def weight(self, module: str) -> Tensor:
        """Of a linear layer [out_features, in_features] or embedding [rows, width], as it is computed with; float32.

        Expert 3 of a parameter that holds all experts is PARAMETER.3: [out_features, in_features].
        """
        ...

    def bias(self, module: str) -> Tensor:
        """Of a linear layer that has one: [out_features] float32."""
        ...


_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
"""Classes of transformers that store experts as [E, in, out] without saying so in `is_transposed`."""


def model_shapes(model: nn.Module) -> ModelShapes:
    """Read the shapes from a causal language model of transformers; its parameters may be on the meta device."""
    linears: dict[str, LinearShape] = {}
    experts: dict[str, ExpertsShape] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    vectors: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings[name] = (module.num_embeddings, module.embedding_dim)
            continue
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if (weight := own.get("weight")) is not None and weight.ndim == 2:
            transposed = type(module).__name__ == "Conv1D"
            out_features, in_features = reversed(weight.shape) if transposed else weight.shape
            linears[name] = LinearShape(out_features, in_features, own.get("bias") is not None, transposed)
            continue
        for parameter_name, parameter in own.items():
            path = f"{name}.{parameter_name}"
            if parameter.ndim == 1:
                vectors[path] = tuple(parameter.shape)
            elif parameter.ndim == 3 and (shape := _experts_shape(module, parameter_name, parameter)) is not None:
                experts[path] = shape
    return ModelShapes(linears, experts, embeddings, vectors, *_tied_heads(model))


def _experts_shape(module: nn.Module, name: str, parameter: nn.Parameter) -> ExpertsShape | None:
    known = getattr(module, "is_transposed", None)
    if known is None and type(module).__name__ not in _TRANSPOSED_EXPERTS:
        return None
    transposed = True if known is None else bool(known)
    num_experts, first, second = parameter.shape
    out_features, in_features = (second, first) if transposed else (first, second)
    return ExpertsShape(
        num_experts,
        out_features,
        in_features,
        transposed,
        transposed_in_peft=bool(known),
        gate_and_up=name == "gate_up_proj" and getattr(module, "is_concatenated", False),
    )


def _tied_heads(model: nn.Module) -> tuple[dict[str, str], str, str]:
    """What is tied, the input embedding, and the output head, if there is one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    input_embedding = names[id(embedding)]
    if head is None:
        return {}, input_embedding, ""
    output_head = names[id(head)]
    return ({output_head: input_embedding} if head.weight is embedding.weight else {}), input_embedding, output_head
