"""The GPU decoder's weights: where parts of a checkpoint go, and what quantized matrices compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compression.grouped_weight import GroupedWeight
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.layers.quantized_linear import QuantizedMethod
from model_worker.engine.model_parts import OpKind
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.ops.quantized_matmul.functional import quantize_float8
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.decoder_steps import MAX_MODEL_LEN, Sequences
from tests.fakes.fake_cuda import FakeCuda
from tests.fakes.tiny_models import build_tiny_model

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = [list(range(3, 23))]

Weights = dict[str, Tensor]


def _model(family: str) -> tuple[PreTrainedModel, Weights]:
    model = build_tiny_model(family)
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _decoder(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor | GroupedWeight],
    quantization: str | None = None,
    *,
    is_filled: bool = True,
) -> GpuDecoder:
    decoder = GpuDecoder(
        model.config.to_dict(),
        dtype=torch.float32,
        device=CPU,
        quantization=quantization,
        max_model_len=MAX_MODEL_LEN,
    )
    if is_filled:
        for name, _ in decoder.weights():
            decoder.fill(name, weights[name])
        decoder.finish()
    return decoder


def _logits(decoder: GpuDecoder) -> Tensor:
    (logits,) = Sequences(decoder, [None]).step(TOKENS)
    return logits


def _rounded(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    """All matrices whose inputs are whole groups, but for the embedding."""
    return {
        name: change(name, weight) if weight.ndim == 2 and weight.shape[1] % 32 == 0 and name != EMBEDDING else weight
        for name, weight in weights.items()
    }


_ROUNDINGS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "int8": lambda name, weight: quantize_int8(weight).dequantize(),
    "int4": lambda name, weight: (quantize_int8 if name == HEAD else quantize_int4)(weight).dequantize(),
    "fp8": lambda name, weight: quantize_float8(weight).dequantize(),
}


@pytest.mark.parametrize("quantization", _ROUNDINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_quantized_weights_compute_what_they_stand_for(family: str, quantization: str) -> None:
    """Down projections of 48 inputs stay as they are. gemma2's head is its embedding, rounded by itself."""
    model, weights = _model(family)
    rounded = _rounded(weights, _ROUNDINGS[quantization])
    decoder = _decoder(model, weights, quantization)
    expected = _decoder(model, rounded)
    if decoder.spec.tied_head:
        head = _ROUNDINGS[quantization](HEAD, weights[EMBEDDING])
        expected.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    assert isinstance(decoder.lm_head.method, QuantizedMethod)
    torch.testing.assert_close(_logits(decoder), _logits(expected), rtol=1e-4, atol=1e-4)
    for name, weight in rounded.items():
        if weight.ndim == 2 and name != HEAD:
            torch.testing.assert_close(decoder.base_weight(name.removesuffix(".weight")), weight)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_blocks_stay_as_they_are_where_all_parts_have_them(quantization: str | None) -> None:
    model, weights = _model("llama")
    blocks: dict[str, Tensor | GroupedWeight] = dict(weights)
    stands_for = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2 and weight.shape[1] == 32:
            in_4_bits = "mlp" in name or "layers.1.self_attn.k_proj" in name  # the other two parts are of 8 bits
            grouped = quantize_int4(weight) if in_4_bits else quantize_int8(weight)
            blocks[name], stands_for[name] = grouped, grouped.dequantize()
    blocks["model.layers.0.mlp.up_proj.weight"] = stands_for["model.layers.0.mlp.up_proj.weight"]
    decoder = _decoder(model, blocks, quantization)
    kept, mixed = decoder.layers[0].self_attn.qkv_proj, decoder.layers[1].self_attn.qkv_proj
    half, four_bits = decoder.layers[0].mlp.gate_up_proj, decoder.layers[1].mlp.gate_up_proj
    assert isinstance(kept.method, QuantizedMethod)
    assert isinstance(four_bits.method, QuantizedMethod)
    assert isinstance(mixed.method, QuantizedMethod) == isinstance(half.method, QuantizedMethod)
    assert isinstance(mixed.method, QuantizedMethod) == (quantization is not None)
    expected = _logits(_decoder(model, stands_for))
    tolerance = 1e-4 if quantization is None else 0.1  # what is not kept is rounded anew
    torch.testing.assert_close(_logits(decoder), expected, rtol=tolerance, atol=tolerance)


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    model, weights = _model("llama")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.qkv"):
        _decoder(model, weights, "int8")


def test_a_tied_weight_is_held_once() -> None:
    model, weights = _model("llama-tied")
    decoder = _decoder(model, weights)
    assert decoder.lm_head.weight is not None
    assert decoder.lm_head.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    assert decoder.holds(EMBEDDING, weights[EMBEDDING])
    assert not decoder.holds(EMBEDDING, weights[EMBEDDING] + 1)


def test_mixtures_are_not_quantized() -> None:
    model, weights = _model("mixtral")
    with pytest.raises(UnsupportedModelError, match="does not quantize mixtures"):
        _decoder(model, weights, "int8")


def test_experts_come_all_together_or_one_by_one() -> None:
    model, weights = _model("mixtral")
    expected, found = _decoder(model, weights), _decoder(model, {}, is_filled=False)
    for name, weight in weights.items():
        if weight.ndim != 3:
            found.fill(name, weight)
            continue
        for index, matrix in enumerate(weight):
            if name.endswith("down_proj"):
                found.fill(name, matrix, index=index)
                continue
            for half in (1, 0):
                found.fill(name, matrix.chunk(2)[half], index=index, half=half)
    found.finish()
    assert torch.equal(_logits(found), _logits(expected))


def test_blocks_of_experts_are_what_they_stand_for() -> None:
    model, weights = _model("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = [quantize_int8(matrix) for matrix in weights[name]]
    found = _decoder(model, {}, is_filled=False)
    for other, weight in weights.items():
        if other != name:
            found.fill(other, weight)
    for index, matrix in enumerate(blocks):
        found.fill(name, matrix, index=index)
    found.finish()
    rounded = weights | {name: torch.stack([matrix.dequantize() for matrix in blocks])}
    assert torch.equal(_logits(found), _logits(_decoder(model, rounded)))
    assert torch.equal(found.base_weight(f"{name}.2"), blocks[2].dequantize())


@pytest.mark.parametrize(("capability", "names"), [((8, 6), ("float32",)), ((8, 9), ("float32", "float8_e4m3fn"))])
def test_float8_needs_a_device_that_converts_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], names: tuple[str, ...]
) -> None:
    """Elsewhere kernels would not compile: the type is not offered, and the answer to asking for it says so."""
    config = build_tiny_model("llama").config.to_dict()
    with FakeCuda().installed():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        device = torch.device("cuda", 0)
        decoder = GpuDecoder(config, dtype=torch.float32, device=device, quantization=None, max_model_len=64)
    assert decoder.kv_dtypes == names


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_trace_has_nine_operations_a_layer(family: str) -> None:
    model, weights = _model(family)
    decoder = _decoder(model, weights)
    sequences = Sequences(decoder, [None])
    with decoder.trace() as rows:
        sequences.step(TOKENS)
    of_layer = [row.kind for row in rows if row.layer == 0 and row.kind is not OpKind.BETWEEN]
    wanted = {OpKind.QKV, OpKind.ATTENTION, OpKind.ATTENTION_OUTPUT, OpKind.GATE_UP, OpKind.ACTIVATION, OpKind.DOWN}
    assert wanted < set(of_layer)
    assert of_layer.count(OpKind.NORM) == (4 if family == "gemma2" else 2)
    assert {row.kind for row in rows if row.layer is None} >= {OpKind.EMBEDDING, OpKind.ROTARY, OpKind.HEAD}


def test_a_trace_of_a_mixture_has_its_experts() -> None:
    """Of their weights, those of the experts that were chosen count as read."""
    model, weights = _model("mixtral")
    decoder = _decoder(model, weights)
    sequences = Sequences(decoder, [None])
    with decoder.trace() as rows:
        sequences.step([[3]])
    (experts,) = [row for row in rows if row.layer == 0 and row.kind is OpKind.EXPERTS]
    of_layer = sum(weight.nbytes for name, weight in weights.items() if "layers.0.mlp.experts" in name)
    assert experts.weight_bytes == of_layer // 2  # two of four
    assert [row.kind for row in rows if row.layer == 0].count(OpKind.ROUTER) == 1
