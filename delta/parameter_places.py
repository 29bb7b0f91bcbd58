"""Where a checkpoint's tensors belong in the model that is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from delta.peft.base_model import ModelShapes
from registry.parameter_names import ExpertMatrix, current_name, expert_matrix

Kind: TypeAlias = Literal["linear", "bias", "embedding", "experts", "expert", "vector"]


@dataclass(frozen=True, slots=True)
class Place:
    """Attributes:
    kind: what the tensor is.
    name: the module of a linear layer, bias or embedding; otherwise the parameter itself, of one expert that of all.
    shape: as a checkpoint stores it.
    transposed: the checkpoint stores [..., in, out].
    expert: whose matrix of the parameter it is, or whose gate or up projection in it.
    first_row: of that.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None
    first_row: int = 0


def find_place(tensor: str, shapes: ModelShapes) -> Place | None:
    """The place of a checkpoint's tensor by its name; None: the model has no parameter of this name.

    A checkpoint of the model without its head has names without the first component, as in "h.0.ln_1.weight" of gpt2;
    one of a mixture may have a tensor for each expert, and older ones other names (`registry.parameter_names`).
    """
    prefix = shapes.input_embedding.partition(".")[0]
    name = current_name(tensor)
    candidates = (tensor, name, f"{prefix}.{name}")
    return next((place for each in candidates if (place := _place(each, shapes)) is not None), None)


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
    single = expert_matrix(parameter)
    if single is not None and (place := _expert_place(single, shapes)) is not None:
        return place
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


def _expert_place(matrix: ExpertMatrix, shapes: ModelShapes) -> Place | None:
    experts = shapes.experts.get(matrix.parameter)
    if experts is None or experts.transposed or matrix.index >= experts.num_experts:
        return None
    if matrix.half is None:
        return Place("expert", matrix.parameter, (experts.out_features, experts.in_features), expert=matrix.index)
    if not experts.gate_and_up:
        return None
    num_rows = experts.out_features // 2
    return Place(
        "expert",
        matrix.parameter,
        (num_rows, experts.in_features),
        expert=matrix.index,
        first_row=matrix.half * num_rows,
    )
