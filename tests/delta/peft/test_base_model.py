"""Shapes are read from a model's modules, with or without weights."""

from __future__ import annotations

import copy

import pytest
import torch

from delta.peft.base_model import ExpertsShape, LinearShape, model_shapes
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_parameter_is_one_of_something(name: str) -> None:
    model = build_tiny_model(name)
    shapes = model_shapes(model)
    known = {
        *shapes.experts,
        *shapes.vectors,
        *(f"{module}.weight" for module in (*shapes.linears, *shapes.embeddings)),
    }
    known |= {f"{module}.bias" for module, linear in shapes.linears.items() if linear.has_bias}
    rest = {parameter for parameter, _ in model.named_parameters(remove_duplicate=False)} - known
    assert all(parameter.endswith(("gate_up_proj_bias", "down_proj_bias")) for parameter in rest)
    with torch.device("meta"):
        assert model_shapes(type(model)(copy.deepcopy(model.config))) == shapes


def test_layouts_are_told_apart() -> None:
    gpt2 = model_shapes(build_tiny_model("gpt2"))
    assert gpt2.linears["transformer.h.0.attn.c_attn"] == LinearShape(96, 32, has_bias=True, transposed=True)
    assert gpt2.tied == {"lm_head": "transformer.wte"}
    qwen = model_shapes(build_tiny_model("qwen3_moe"))
    assert qwen.experts["model.layers.0.mlp.experts.gate_up_proj"] == ExpertsShape(4, 48, 32, gate_and_up=True)
    assert qwen.linears["model.layers.0.mlp.gate"] == LinearShape(4, 32)
    assert qwen.tied == {}
    gpt_oss = model_shapes(build_tiny_model("gpt_oss")).experts["model.layers.0.mlp.experts.down_proj"]
    assert (gpt_oss.transposed, gpt_oss.transposed_in_peft) == (True, True)
    llama4 = model_shapes(build_tiny_model("llama4-chunked"))
    parameter, experts = next(iter(llama4.experts.items()))
    assert (experts.transposed, experts.transposed_in_peft) == (True, False), parameter
