"""The native decoder with weights in 8 and 4 bits: transformers with the same weights, rounded, on every machine level.

Where the level multiplies 8-bit integers, activations are rounded too, and results are close; elsewhere they are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from adapters.load_plan import LoadPlan
from adapters.weights import read_weights
from compression.gguf import GROUPED_TYPES
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm import LLM
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.native_decoder import NativeDecoder
from model_worker.engine.models.native_weights import Fusion, NativeWeights
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from model_worker.engine.ops.linear import QuantizeRows, WeightFormat
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from registry.checkpoint import read_checkpoint
from registry.errors import UnsupportedModelError
from tests.fakes.tiny_gguf import tensors_of, write_gguf
from tests.fakes.tiny_models import make_tiny_plan

HEADS, KV_HEADS = 4, 2
PROMPT = torch.randint(0, 272, (40,), generator=torch.Generator().manual_seed(1)).tolist()
CONFIG = EngineConfig(CacheConfig(num_blocks=4), SchedulerConfig(max_num_batched_tokens=64), num_threads=1)
NATIVE = dataclasses.replace(CONFIG, model_impl="native")
WIDE = ("model.embed_tokens.weight", "lm_head.weight")


def _save_model(path: Path, *, intermediate_size: int = 72) -> LlamaForCausalLM:
    """A tiny llama with random norms; down projections of 72 inputs cannot be quantized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model


def _logprobs(plan: LoadPlan, kernels: KernelLibrary) -> torch.Tensor:
    """Of the tokens of PROMPT but the first, by the native decoder."""
    runner = ModelRunner(plan, NATIVE, kernels=kernels)
    sequence = Sequence(0, 0, PROMPT, SamplingParams(prompt_logprobs=0), seed=0)
    sequence.block_table = [2, 0, 3]
    result = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, len(PROMPT)),)))
    return torch.tensor([entry.logprob for entry in result.prompt_logprobs[0]])


def _expected(model: LlamaForCausalLM | MixtralForCausalLM) -> torch.Tensor:
    ids = torch.tensor(PROMPT)
    with torch.inference_mode():
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(dim=1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0]


def _assert_agree(found: torch.Tensor, expected: torch.Tensor, kernels: KernelLibrary) -> None:
    if kernels.level.has_integer_dot:
        assert (found - expected).abs().mean() < 0.04 * expected.std()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_that_are_rounded_while_loading(quantization: str, kernels: KernelLibrary, tmp_path: Path) -> None:
    model = _save_model(tmp_path)
    plan = dataclasses.replace(make_tiny_plan(tmp_path), quantization=quantization)
    found = _logprobs(plan, kernels)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "down_proj" not in name:
                quantize = quantize_int8 if quantization == "int8" or name in WIDE else quantize_int4
                weight.copy_(quantize(weight).dequantize())
    _assert_agree(found, _expected(model), kernels)


@pytest.mark.parametrize("dtype", sorted(GROUPED_TYPES))
def test_blocks_of_a_gguf_file(dtype: str, kernels: KernelLibrary, tmp_path: Path) -> None:
    model = _save_model(tmp_path, intermediate_size=96)
    tensors = tensors_of(model, "llama", permuted_heads={"q_proj": HEADS, "k_proj": KV_HEADS})
    file = write_gguf(tmp_path / "model.gguf", "llama", {}, tensors, dtype=dtype)
    plan = dataclasses.replace(make_tiny_plan(tmp_path), checkpoint=read_checkpoint(file), kept_types=GROUPED_TYPES)
    found = _logprobs(plan, kernels)
    model.load_state_dict(dict(read_weights(plan.checkpoint, plan.config)))
    _assert_agree(found, _expected(model), kernels)


@pytest.mark.parametrize(
    ("quantization", "format"),
    [(None, WeightFormat.BFLOAT16), ("int8", WeightFormat.INT8), ("int4", WeightFormat.INT4)],
)
def test_parts_of_a_fused_matrix_in_different_types(
    quantization: str | None, format: WeightFormat, best_kernels: KernelLibrary
) -> None:
    """As a GGUF file may keep them: the matrix is what was asked for, and never in floating point unasked."""
    weights = NativeWeights(
        [Fusion("qkv", ("q", "k", "v"))],
        dtype=torch.bfloat16,
        quantization=quantization,
        wide_keys=frozenset(),
        dense_keys=frozenset(),
        team=Team(best_kernels, 1),
    )
    torch.manual_seed(0)
    parts = {"q": quantize_int4(torch.randn(32, 64)), "k": quantize_int8(torch.randn(32, 64)), "v": torch.randn(32, 64)}
    for name, part in parts.items():
        weights.put(name, part)
    packed = weights.matrices["qkv"]
    assert packed.format is format
    expected = torch.cat([part if isinstance(part, torch.Tensor) else part.dequantize() for part in parts.values()])
    assert (packed.unpack() - expected).abs().max() < (0.3 if quantization == "int4" else 0.02)


def _save_mixture(path: Path) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        num_local_experts=4,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_experts_are_rounded_and_routers_are_not(quantization: str, kernels: KernelLibrary, tmp_path: Path) -> None:
    """The median, because a rounded activation may send a token to another expert."""
    model = _save_mixture(tmp_path)
    found = _logprobs(dataclasses.replace(make_tiny_plan(tmp_path), quantization=quantization), kernels)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            quantize = quantize_int8 if quantization == "int8" or name in WIDE else quantize_int4
            if weight.ndim == 3:
                weight.copy_(torch.stack([quantize(matrix).dequantize() for matrix in weight]))
            elif weight.ndim == 2 and not name.endswith("mlp.gate.weight"):
                weight.copy_(quantize(weight).dequantize())
    expected = _expected(model)
    tolerance = 0.04 * expected.std() if kernels.level.has_integer_dot else 1e-4
    assert (found - expected).abs().median() < tolerance


@pytest.mark.parametrize("save", [_save_model, _save_mixture])
def test_all_layers_share_the_memory_of_rounded_activations(
    save: Callable[[Path], object], best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    """It holds the rows of the largest step, and of a mixture those of each expert that was chosen."""
    save(tmp_path)
    plan = dataclasses.replace(make_tiny_plan(tmp_path), quantization="int8")
    decoder = ModelRunner(plan, NATIVE, kernels=best_kernels).model
    assert isinstance(decoder, NativeDecoder)
    quantized = [op for op in decoder._decoder.operations if isinstance(op, QuantizeRows)]
    assert len({op.out.values.data_ptr() for op in quantized}) == len({op.x.shape for op in quantized})


def test_steps_of_fewer_rows_than_the_head_computes_at_once(best_kernels: KernelLibrary, tmp_path: Path) -> None:
    _save_model(tmp_path)
    plan = dataclasses.replace(make_tiny_plan(tmp_path), quantization="int8")
    config = dataclasses.replace(NATIVE, scheduler=SchedulerConfig(max_num_batched_tokens=8, max_num_seqs=8))
    decoder = ModelRunner(plan, config, kernels=best_kernels).model
    hidden = torch.randn(40, 64)
    one_by_one = torch.cat([decoder.logits(row).clone() for row in hidden.split(1)])
    torch.testing.assert_close(decoder.logits(hidden), one_by_one, rtol=1e-5, atol=1e-5)


def test_the_small_model_from_its_own_blocks(smollm2_gguf: Path, best_kernels: KernelLibrary) -> None:
    llm = LLM(smollm2_gguf, EngineConfig(num_threads=2, model_impl="native"), max_model_len=128)
    assert llm.plan.kept_types == GROUPED_TYPES
    (answer,) = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=2))
    assert answer.outputs[0].text == " Paris."


def test_they_are_refused_where_the_native_decoder_is_not_used(tmp_path: Path, best_kernels: KernelLibrary) -> None:
    _save_model(tmp_path)
    plan = dataclasses.replace(make_tiny_plan(tmp_path), quantization="int8")
    config = dataclasses.replace(CONFIG, model_impl="transformers")
    with pytest.raises(UnsupportedModelError, match=r"int8.*--model-impl transformers.*--quantization none"):
        ModelRunner(plan, config, kernels=best_kernels)
    with pytest.raises(UnsupportedModelError, match="no kernels for this machine"):
        ModelRunner(plan, CONFIG, kernels=None)
