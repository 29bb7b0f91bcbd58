"""What a decoder computes with at once: which parameters of a checkpoint become one matrix or vector.

checkpoint                                        a fusion
q_proj, k_proj, v_proj .weight                    layers.i.qkv
gate_proj, up_proj .weight                        layers.i.gate_up
the same of .bias                                 layers.i.qkv.bias, layers.i.gate_up.bias
anything else                                     alone, under a short name
"""

from __future__ import annotations

from dataclasses import dataclass

from model_worker.engine.models.decoder_parameters import EMBEDDING, HEAD, parameter_shapes
from model_worker.engine.models.decoder_spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Fusion:
    """A matrix or vector made of parts of a checkpoint.

    Attributes:
        key: its name in a decoder.
        names: its parts in the checkpoint, in the order of the outputs.
        gated: there are a gate and an up projection; one part may hold both, one after the other.
        offset: added to a vector.
        num_experts: there is one part, [E, N, K], of so many matrices; None: a single matrix.
    """

    key: str
    names: tuple[str, ...]
    gated: bool = False
    offset: float = 0.0
    num_experts: int | None = None


def decoder_fusions(spec: DecoderSpec) -> list[Fusion]:
    """All that a decoder consists of, in order. Every parameter is a part of exactly one."""
    parameters = parameter_shapes(spec).keys()
    found: list[Fusion] = []

    def add(key: str, *names: str, gated: bool = False, offset: float = 0.0, num_experts: int | None = None) -> None:
        known = tuple(name for name in names if name in parameters)
        assert known in ((), names), f"the model has only {known} of {names}"
        if known:
            found.append(Fusion(key, names, gated, offset, num_experts))

    add("embedding", EMBEDDING)
    add("head", HEAD)
    add("norm", "model.norm.weight", offset=spec.norm_offset)
    qkv = ("qkv_proj",) if spec.fused_names else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if spec.fused_names else ("gate_proj", "up_proj")
    for i, layer in enumerate(spec.layers):
        path = f"model.layers.{i}"
        for kind in ("weight", "bias"):
            suffix = "" if kind == "weight" else ".bias"
            add(f"layers.{i}.qkv{suffix}", *(f"{path}.self_attn.{part}.{kind}" for part in qkv))
            add(f"layers.{i}.output{suffix}", f"{path}.self_attn.o_proj.{kind}")
            add(f"layers.{i}.gate_up{suffix}", *(f"{path}.mlp.{part}.{kind}" for part in gate_up), gated=True)
            add(f"layers.{i}.down{suffix}", f"{path}.mlp.down_proj.{kind}")
        if layer.mixture is not None:
            experts, num_experts = f"{path}.mlp.experts", layer.mixture.num_experts
            add(f"layers.{i}.router", f"{path}.mlp.gate.weight")
            add(f"layers.{i}.experts.gate_up", f"{experts}.gate_up_proj", gated=True, num_experts=num_experts)
            add(f"layers.{i}.experts.down", f"{experts}.down_proj", num_experts=num_experts)
        norms = {*(spec.input_norms or ()), *(spec.output_norms or ())}
        for norm in sorted(norms):
            add(f"layers.{i}.{norm}", f"{path}.{norm}.weight", offset=spec.norm_offset)
        for norm in ("q_norm", "k_norm"):
            add(f"layers.{i}.{norm}", f"{path}.self_attn.{norm}.weight", offset=spec.norm_offset)
    covered = {name for fusion in found for name in fusion.names}
    assert covered == parameters, f"no place for {sorted(parameters - covered)}"
    return found
