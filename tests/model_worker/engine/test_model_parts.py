"""Every weight of every family that we know has a part."""

from __future__ import annotations

import pytest

from model_worker.engine.model_parts import OpKind, Part, Place, linear_kind, part_of, place_of
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_weight_is_left_over(name: str) -> None:
    parts = {weight: part_of(weight) for weight in build_tiny_model(name).state_dict()}
    assert [weight for weight, part in parts.items() if part is Part.OTHER] == []
    assert {Part.EMBEDDING, Part.ATTENTION, Part.NORM, Part.HEAD} <= set(parts.values())
    assert set(parts.values()) & {Part.MLP, Part.EXPERTS}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", Part.EMBEDDING),
        ("transformer.word_embeddings_layernorm.weight", Part.NORM),
        ("model.norm.weight", Part.NORM),
        ("transformer.ln_f.bias", Part.NORM),
        ("model.layers.11.self_attn.q_norm.weight", Part.NORM),
        ("model.layers.11.self_attn.sinks", Part.ATTENTION),
        ("model.layers.0.mlp.gate_proj.weight", Part.MLP),
        ("model.layers.0.mlp.gate.weight", Part.EXPERTS),
        ("model.layers.0.mlp.shared_experts.down_proj.weight", Part.EXPERTS),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", Part.EXPERTS),
        ("lm_head.weight", Part.HEAD),
        ("something.else", Part.OTHER),
    ],
)
def test_parts(name: str, part: Part) -> None:
    assert part_of(name) is part


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.k_proj", OpKind.QKV),
        ("transformer.h.0.attn.c_attn", OpKind.QKV),
        ("transformer.h.0.attn.c_proj", OpKind.ATTENTION_OUTPUT),
        ("gpt_neox.layers.0.attention.dense", OpKind.ATTENTION_OUTPUT),
        ("transformer.h.0.mlp.c_proj", OpKind.DOWN),
        ("transformer.h.0.mlp.dense_4h_to_h", OpKind.DOWN),
        ("transformer.h.0.mlp.dense_h_to_4h", OpKind.GATE_UP),
        ("model.decoder.layers.0.fc1", OpKind.GATE_UP),
        ("model.layers.0.mlp.shared_expert_gate", OpKind.ROUTER),
        ("model.decoder.project_in", OpKind.LINEAR),
        ("lm_head", OpKind.HEAD),
    ],
)
def test_what_a_linear_layer_is_for(name: str, kind: OpKind) -> None:
    assert linear_kind(name) is kind


def test_places() -> None:
    assert place_of("model.layers.12.mlp.up_proj") == Place(12, "mlp.up_proj")
    assert place_of("transformer.h.3") == Place(3, "")
    assert place_of("model.norm") == Place(None, "model.norm")
