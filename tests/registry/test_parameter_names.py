from __future__ import annotations

import pytest

from registry.parameter_names import ExpertMatrix, current_name, expert_matrix, is_input_embedding


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("embed_out.weight", "lm_head.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_old_names(old: str, new: str) -> None:
    assert current_name(old) == new


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.experts.3.w1.weight", ("gate_up_proj", 3, 0)),
        ("model.layers.1.mlp.experts.3.w3.weight", ("gate_up_proj", 3, 1)),
        ("model.layers.1.mlp.experts.12.down_proj.weight", ("down_proj", 12, None)),
    ],
)
def test_matrices_of_experts(name: str, expected: tuple[str, int, int | None]) -> None:
    parameter, index, half = expected
    assert expert_matrix(name) == ExpertMatrix(f"model.layers.1.mlp.experts.{parameter}", index, half)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.3.w4.weight", "experts.weight"]
)
def test_what_is_no_single_expert(name: str) -> None:
    assert expert_matrix(name) is None


def test_embeddings() -> None:
    assert is_input_embedding("model.embed_tokens.weight")
    assert is_input_embedding("transformer.wte.weight")
    assert not is_input_embedding("transformer.wpe.weight")
    assert not is_input_embedding("lm_head.weight")
