"""A delta that is read into terms is, merged, what the delta gives back; and what cannot be served is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from delta.delta_config import delta_digest, read_delta_config
from delta.delta_terms import read_delta
from delta.variant_reader import read_variant, variant_digest
from registry.errors import CheckpointError, UnsupportedModelError
from tests.delta.models import DENSE, LOSSLESS, SIGN, make
from tests.fakes.peft_adapters import TinyBase, merged_model
from tests.fakes.tiny_models import build_tiny_model, with_more_tokens

_POLICIES = [
    LOSSLESS,
    DENSE,
    SIGN,
    CodecPolicy("sparse"),
    CodecPolicy("lowrank", rank=4),
    CodecPolicy("ternary", ("sign", "lowrank"), rank=3),
]


def _checkpoint(path: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Under their names; of tied ones the first."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _tuned(weights: dict[str, Tensor], share: float = 1.0, size: float = 0.02) -> dict[str, Tensor]:
    """Some share of the numbers of every matrix changed, and all of every vector."""
    generator = torch.Generator().manual_seed(5)
    tuned = {}
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator) * size
        chosen = torch.rand(weight.shape, generator=generator) < share
        tuned[name] = weight + (noise * chosen if weight.ndim > 1 else noise)
    return tuned


def _close(model: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name].detach(), weight, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("policy", _POLICIES, ids=lambda policy: "+".join((policy.codec, *policy.residuals)))
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "mixtral", "gemma3_text", "phi", "llama4-chunked"])
def test_terms_are_what_is_given_back(tmp_path: Path, name: str, policy: CodecPolicy) -> None:
    model = build_tiny_model(name)
    weights = _weights(model)
    base = _checkpoint(tmp_path / "base", weights)
    target = _checkpoint(
        tmp_path / "target", _tuned(weights, share=0.3 if policy.codec in ("sparse", "ternary") else 1)
    )
    config = make(base, target, tmp_path / "delta", policy)
    served = TinyBase(model, config.base.digest)
    terms = read_delta(tmp_path / "delta", served)
    assert terms.digest == delta_digest(tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    merged = merged_model(model, terms)
    back = load_file(tmp_path / "back" / "model.safetensors")
    _close(merged, back)
    for head, embedding in served.shapes.tied.items():
        _close(merged, {f"{head}.weight": back[f"{embedding}.weight"]})


def _one_by_one(weights: dict[str, Tensor], names: tuple[str, str, str], module: str) -> dict[str, Tensor]:
    """As checkpoints have the experts of a mixture: gate, up and down projection of each by itself."""
    split = {}
    for name, weight in weights.items():
        name = name.replace(".mlp.", f".{module}.")
        path = name.rpartition(".")[0]
        for index, matrix in enumerate(weight) if ".experts." in name else ():
            if name.endswith("gate_up_proj"):
                split[f"{path}.{index}.{names[0]}.weight"], split[f"{path}.{index}.{names[1]}.weight"] = matrix.chunk(2)
            else:
                split[f"{path}.{index}.{names[2]}.weight"] = matrix
        if ".experts." not in name:
            split[name] = weight
    return split


@pytest.mark.parametrize("policy", _POLICIES, ids=lambda policy: "+".join((policy.codec, *policy.residuals)))
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one(tmp_path: Path, name: str, policy: CodecPolicy) -> None:
    """All of them changed, but for a gate and an up projection and a whole expert."""
    model = build_tiny_model(name)
    naming: tuple[tuple[str, str, str], str] = (("gate_proj", "up_proj", "down_proj"), "mlp")
    if name == "mixtral":
        naming = (("w1", "w3", "w2"), "block_sparse_moe")
    weights = _weights(model)
    tuned = _tuned(weights, share=0.3 if policy.codec in ("sparse", "ternary") else 1)
    path = "model.layers.0.mlp.experts"
    half = tuned[f"{path}.gate_up_proj"].shape[1] // 2
    for index, changed in ((0, slice(0, None)), (1, slice(0, half)), (2, slice(half, None))):
        tuned[f"{path}.gate_up_proj"][index, changed] = weights[f"{path}.gate_up_proj"][index, changed]
    tuned[f"{path}.down_proj"][0] = weights[f"{path}.down_proj"][0]
    base = _checkpoint(tmp_path / "base", _one_by_one(weights, *naming))
    target = _checkpoint(tmp_path / "target", _one_by_one(tuned, *naming))
    make(base, target, tmp_path / "delta", policy)
    terms = read_delta(tmp_path / "delta", TinyBase(model))
    assert terms.experts[f"{path}.gate_up_proj"].keys() == terms.experts[f"{path}.down_proj"].keys() == {1, 2, 3}
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    merged = {parameter: weight.detach() for parameter, weight in merged_model(model, terms).named_parameters()}
    for tensor, weight in _one_by_one(merged, *naming).items():
        torch.testing.assert_close(weight, back[tensor], rtol=1e-5, atol=1e-6, msg=lambda text, n=tensor: f"{n} {text}")


def _tied() -> tuple[PreTrainedModel, str, str]:
    """-> model, embedding, head"""
    model = build_tiny_model("gpt2")
    ((head, embedding),) = TinyBase(model).shapes.tied.items()
    return model, f"{embedding}.weight", f"{head}.weight"


class TestTiedHeads:
    def test_the_fine_tune_stores_a_copy(self, tmp_path: Path) -> None:
        model, embedding, head = _tied()
        tuned = _tuned(_weights(model))
        tuned[head] = tuned[embedding].clone()
        base = _checkpoint(tmp_path / "base", _weights(model))
        config = make(base, _checkpoint(tmp_path / "target", tuned), tmp_path / "delta")
        assert config.tied == {head: embedding}
        _close(merged_model(model, read_delta(tmp_path / "delta", TinyBase(model))), tuned)

    @pytest.mark.parametrize("both", [False, True])
    def test_the_base_stores_a_copy(self, tmp_path: Path, both: bool) -> None:
        model, embedding, head = _tied()
        weights, tuned = _weights(model), _tuned(_weights(model))
        expected = tuned | {head: tuned[embedding].clone()}
        base = _checkpoint(tmp_path / "base", weights | {head: weights[embedding].clone()})
        config = make(base, _checkpoint(tmp_path / "target", expected if both else tuned), tmp_path / "delta")
        assert config.dropped == ({} if both else {head: embedding})
        _close(merged_model(model, read_delta(tmp_path / "delta", TinyBase(model))), expected)

    def test_both_store_a_head_that_differs(self, tmp_path: Path) -> None:
        model, embedding, head = _tied()
        weights, tuned = _weights(model), _tuned(_weights(model))
        base = _checkpoint(tmp_path / "base", weights | {head: weights[embedding].clone()})
        make(base, _checkpoint(tmp_path / "target", tuned | {head: tuned[embedding] * 2}), tmp_path / "delta")
        with pytest.raises(UnsupportedModelError, match="differs from the embedding"):
            read_delta(tmp_path / "delta", TinyBase(model))

    @pytest.mark.parametrize("policy", [LOSSLESS, DENSE])
    def test_the_fine_tune_unties_it(self, tmp_path: Path, policy: CodecPolicy) -> None:
        model, embedding, head = _tied()
        weights, tuned = _weights(model), _tuned(_weights(model))
        tuned[head] = tuned[embedding] * 1.5
        base = _checkpoint(tmp_path / "base", weights, {"vocab_size": len(weights[embedding])})
        config = make(base, _checkpoint(tmp_path / "target", tuned), tmp_path / "delta", policy)
        assert config.tensors[head].base == embedding
        _close(merged_model(model, read_delta(tmp_path / "delta", TinyBase(model))), tuned)


@pytest.mark.parametrize("policy", _POLICIES, ids=lambda policy: "+".join((policy.codec, *policy.residuals)))
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "phi"])
def test_tokens_that_the_base_does_not_have(tmp_path: Path, name: str, policy: CodecPolicy) -> None:
    """With a tied head, with one of its own, and with one that has a bias."""
    model = build_tiny_model(name)
    tuned = with_more_tokens(model, 3)
    base = _checkpoint(tmp_path / "base", _weights(model))
    target = _checkpoint(tmp_path / "target", _tuned(_weights(tuned), share=0.3 if policy.codec != "dense" else 1))
    make(base, target, tmp_path / "delta", policy)
    served = TinyBase(model)
    terms = read_delta(tmp_path / "delta", served)
    assert terms.num_extra_tokens == 3
    assert not terms.adds_only
    apply_delta(base, tmp_path / "delta", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    merged = merged_model(model, terms)
    _close(merged, back)
    for head, embedding in served.shapes.tied.items():
        _close(merged, {f"{head}.weight": back[f"{embedding}.weight"]})


def test_only_the_tokens_are_new(tmp_path: Path) -> None:
    model = build_tiny_model("llama-tied")
    base = _checkpoint(tmp_path / "base", _weights(model))
    make(base, _checkpoint(tmp_path / "target", _weights(with_more_tokens(model, 2))), tmp_path / "delta")
    terms = read_delta(tmp_path / "delta", TinyBase(model))
    assert (terms.num_modules, terms.num_extra_tokens) == (2, 2)
    assert terms.num_bytes == 2 * terms.embeddings["model.embed_tokens"].extra_rows.nbytes  # type: ignore[union-attr]


def test_only_changed_rows_of_an_embedding_are_replaced(tmp_path: Path) -> None:
    model, embedding, _ = _tied()
    tuned = _weights(model)
    tuned[embedding][[3, 5]] += 0.5
    base = _checkpoint(tmp_path / "base", _weights(model))
    make(base, _checkpoint(tmp_path / "target", tuned), tmp_path / "delta", CodecPolicy("sparse"))
    (terms,) = read_delta(tmp_path / "delta", TinyBase(model)).embeddings.values()
    assert terms.token_ids is not None
    assert terms.token_ids.tolist() == [3, 5]


def test_names_without_the_first_component(tmp_path: Path) -> None:
    """As checkpoints of gpt2 have them."""
    model = build_tiny_model("gpt2")
    weights, tuned = _weights(model), _tuned(_weights(model))
    short = [{name.removeprefix("transformer."): weight for name, weight in each.items()} for each in (weights, tuned)]
    make(
        _checkpoint(tmp_path / "base", short[0]), _checkpoint(tmp_path / "target", short[1]), tmp_path / "delta", DENSE
    )
    _close(merged_model(model, read_delta(tmp_path / "delta", TinyBase(model))), tuned)


def test_a_bias_that_the_base_does_not_have(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    module = "model.layers.0.self_attn.o_proj"
    tuned = _weights(model) | {f"{module}.bias": torch.ones(model.config.hidden_size)}
    base = _checkpoint(tmp_path / "base", _weights(model))
    make(base, _checkpoint(tmp_path / "target", tuned), tmp_path / "delta")
    terms = read_delta(tmp_path / "delta", TinyBase(model))
    assert list(terms.linears) == [module]
    assert torch.equal(terms.linears[module].bias, torch.ones(model.config.hidden_size))  # type: ignore[arg-type]


class TestRefusals:
    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return build_tiny_model("llama")

    def _make(
        self, tmp_path: Path, model: PreTrainedModel, tuned: dict[str, Tensor], policy: CodecPolicy = LOSSLESS
    ) -> Path:
        base, target = _checkpoint(tmp_path / "base", _weights(model)), _checkpoint(tmp_path / "target", tuned)
        make(base, target, tmp_path / "delta", policy)
        return tmp_path / "delta"

    def test_another_base(self, tmp_path: Path, model: PreTrainedModel) -> None:
        delta = self._make(tmp_path, model, _tuned(_weights(model)))
        with pytest.raises(CheckpointError, match="serve it with its own base"):
            read_delta(delta, TinyBase(model, "sha256:" + "0" * 64))
        read_delta(delta, TinyBase(model, read_delta_config(delta).base.digest))
        model.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 4, bias=False)
        with pytest.raises(CheckpointError, match="in this base"):
            read_delta(delta, TinyBase(model))

    @pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
    def test_more_rows_of_one_table(self, tmp_path: Path, model: PreTrainedModel, module: str) -> None:
        tuned = _weights(model)
        table = tuned[f"{module}.weight"]
        tuned[f"{module}.weight"] = torch.cat([table, table[:2]])
        delta = self._make(tmp_path, model, tuned)
        with pytest.raises(UnsupportedModelError, match=r"not the same number.*resize both"):
            read_delta(delta, TinyBase(model))

    def test_more_rows_of_another_matrix(self, tmp_path: Path, model: PreTrainedModel) -> None:
        tuned = _weights(model)
        name = "model.layers.0.mlp.up_proj.weight"
        tuned[name] = torch.cat([tuned[name], tuned[name][:2]])
        delta = self._make(tmp_path, model, tuned)
        with pytest.raises(UnsupportedModelError, match=r"50 rows.*write it out with python -m delta apply"):
            read_delta(delta, TinyBase(model))

    def test_fewer_rows(self, tmp_path: Path, model: PreTrainedModel) -> None:
        tuned = _weights(model)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tuned[name] = tuned[name][:-3]
        delta = self._make(tmp_path, model, tuned)
        with pytest.raises(UnsupportedModelError, match=r"125 rows.*write it out with python -m delta apply"):
            read_delta(delta, TinyBase(model))

    def test_a_parameter_that_the_model_does_not_have(self, tmp_path: Path, model: PreTrainedModel) -> None:
        delta = self._make(
            tmp_path, model, _weights(model) | {"model.layers.0.mlp.experts.0.w1.weight": torch.ones(2, 2)}
        )
        with pytest.raises(UnsupportedModelError, match=r"no parameter model\.layers\.0\.mlp\.experts.*delta apply"):
            read_delta(delta, TinyBase(model))

    def test_values_that_are_not_finite(self, tmp_path: Path, model: PreTrainedModel) -> None:
        for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            out = tmp_path / name
            out.mkdir()
            tuned = _weights(model)
            tuned[name].view(-1)[3] = float("nan")
            with pytest.raises(CheckpointError, match="not finite"):
                read_delta(self._make(out, model, tuned), TinyBase(model))

    def test_bits_of_a_base_that_is_rounded(self, tmp_path: Path, model: PreTrainedModel) -> None:
        delta = self._make(tmp_path, model, _tuned(_weights(model)))
        with pytest.raises(UnsupportedModelError, match="has rounded"):
            read_delta(delta, TinyBase(model.bfloat16()))

    def test_damaged_data(self, tmp_path: Path, model: PreTrainedModel) -> None:
        delta = self._make(tmp_path, model, _tuned(_weights(model)), SIGN)
        file = delta / "delta.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_delta(delta, TinyBase(model))

    def test_a_delta_of_files_only(self, tmp_path: Path, model: PreTrainedModel) -> None:
        base, target = (
            _checkpoint(tmp_path / "base", _weights(model)),
            _checkpoint(tmp_path / "t", _weights(model), {"a": 1}),
        )
        make(base, target, tmp_path / "delta")
        with pytest.raises(UnsupportedModelError, match="changes no weight"):
            read_delta(tmp_path / "delta", TinyBase(model))


def test_the_kind_is_told_by_the_files(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    base = _checkpoint(tmp_path / "base", _weights(model))
    make(base, _checkpoint(tmp_path / "target", _tuned(_weights(model))), tmp_path / "delta")
    assert read_variant(tmp_path / "delta", TinyBase(model)).digest == variant_digest(tmp_path / "delta")
    with pytest.raises(CheckpointError, match="adapter"):
        variant_digest(tmp_path / "base")
