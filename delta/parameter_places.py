"""Where a checkpoint's tensors belong in the model that is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from delta.peft.base_model import ModelShapes

Kind: TypeAlias = Literal["linear", "bias", "embedding", "experts", "vector"]


@dataclass(frozen=True, slots=True)
class Place:
    """Attributes:
    kind: what the tensor is.
    name: the module of a linear layer, bias or embedding; the parameter itself of experts and vectors.
    shape: as a checkpoint stores it.
    transposed: the checkpoint stores [..., in, out].
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def find_place(tensor: str, shapes: ModelShapes) -> Place | None:
    """The place of a checkpoint's tensor by its name; None: the model has no parameter of this name.

    A checkpoint of the model without its head has names without the first component, as in "h.0.ln_1.weight" of gpt2.
    """
    prefix = shapes.input_embedding.partition(".")[0]
    return _place(tensor, shapes) or _place(f"{prefix}.{tensor}", shapes)


def _place(parameter: str, shapes: ModelShapes) -> Place | None:
    module, _, name = parameter.rpartition(".")
    if parameter in shapes.vectors:
        return Place("vector", parameter, shapes.vectors[parameter])
    if (experts := shapes.experts.get(parameter)) is not None:
        matrix = (experts.out_features, experts.in_features)
        return Place(
            "experts",
            parameter,
            (experts.num_experts, *(matrix[::-1] if experts.transposed else matrix)),
            experts.transposed,
        )
    if name == "weight" and module in shapes.embeddings:
        return Place("embedding", module, shapes.embeddings[module])
    if (linear := shapes.linears.get(module)) is None:
        return None
    if name == "bias":
        return Place("bias", module, (linear.out_features,))
    shape = (linear.out_features, linear.in_features)
    if name == "weight":
        return Place("linear", module, shape[::-1] if linear.transposed else shape, linear.transposed)
    return None
