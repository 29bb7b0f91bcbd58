"""The model runner as it is on a GPU, with CPU tensors: measured memory, static inputs, graphs, and steps run ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, LoraConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.executor import ExecutorLostError
from model_worker.engine.gpu_memory import binding_variants
from model_worker.engine.launched_step import WatchedStep
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.parallel.group import OneRank
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.step import StepResult
from model_worker.engine.variant_activations import variant_activation_bytes
from registry.errors import InsufficientMemoryError, InternalError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_accelerator import GIB, FakeAccelerator, FakeMemory, compute_as_on_a_gpu
from tests.fakes.mixed_requests import NO_SPECULATION, SMALL_CACHE, mixed_answers, mixed_config
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(path)
    return path


def make_runner(
    checkpoint: Path, accelerator: FakeAccelerator | None, *, cache: CacheConfig = SMALL_CACHE, **more: Any
) -> ModelRunner:
    config = mixed_config(cache=cache, **more)
    return ModelRunner(make_tiny_plan(checkpoint), config, group=OneRank(), accelerator=accelerator)


@pytest.mark.parametrize("speculation", [NO_SPECULATION, SpeculationConfig()], ids=["plain", "speculation"])
def test_the_same_tokens_as_step_by_step_without_graphs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, speculation: SpeculationConfig
) -> None:
    expected = mixed_answers(make_runner(checkpoint, None))
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator()
    runner = make_runner(checkpoint, accelerator)
    assert isinstance(runner.model, GpuDecoder)
    assert runner.runs_ahead
    assert mixed_answers(runner, speculation=speculation) == expected
    assert accelerator.num_replays > 10
    assert accelerator.num_active == 0


def test_eager_steps_are_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mixed_answers(make_runner(checkpoint, None))
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator()
    assert mixed_answers(make_runner(checkpoint, accelerator, enforce_eager=True)) == expected
    assert not accelerator.captures


def test_the_kv_cache_gets_what_is_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_as_on_a_gpu(monkeypatch)
    memory = FakeMemory(total=16 * GIB, others=GIB, peak=3 * GIB)
    accelerator = FakeAccelerator(memory, graph_bytes=GIB // 8)
    lora = LoraConfig(lora_memory_gib=2.0)
    lines: list[str] = []
    cache = CacheConfig(block_size=4, gpu_memory_utilization=0.75)
    config = EngineConfig(cache, SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=16), lora=lora)
    runner = ModelRunner(
        make_tiny_plan(checkpoint), config, group=OneRank(), accelerator=accelerator, report=lines.append
    )
    # Two graphs for each of 4 buckets. Here those that were measured stay when they are forgotten, as weights do.
    assert lines[0] == "Measuring the largest step"
    assert lines[-1].startswith(
        "Memory of the GPU: 0.50 GiB for weights, 3.00 GiB for the largest step, 1.00 GiB for graphs, "
        "1.00 GiB for fine-tunes, "
    )
    assert "Graphs of decode steps captured: 8 of 8" in lines
    assert runner.variants_bytes == GIB
    assert runner.num_blocks == runner._layout.max_useful_blocks  # a tiny model cannot use more


def test_a_gpu_that_others_use_is_refused(checkpoint: Path) -> None:
    accelerator = FakeAccelerator(FakeMemory(total=10 * GIB, others=3 * GIB))
    with pytest.raises(
        InsufficientMemoryError, match=r"0\.9 is 9\.00 GiB .* only 7\.00 GiB are free. Lower it to 0\.69"
    ):
        make_runner(checkpoint, accelerator)


def test_no_room_for_a_kv_cache_names_the_three_settings_that_give_it_most(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator(FakeMemory(total=12 * GIB, peak=11 * GIB), graph_bytes=GIB // 16)
    with pytest.raises(InsufficientMemoryError) as error:
        make_runner(checkpoint, accelerator, cache=CacheConfig(block_size=4))
    message = error.value.message
    assert (
        "0.25 GiB for weights, 11.00 GiB for the largest step, 0.50 GiB for graphs, 0.38 GiB for fine-tunes" in message
    )
    assert message.endswith(
        "would give the KV cache most: --gpu-memory-utilization 0.95 (about 0.60 GiB more); or --enforce-eager (about "
        "0.50 GiB more); or --lora-memory-gib 0.38 (about 0.19 GiB more)."
    )


def test_out_of_memory_while_loading_while_measuring_and_in_a_step(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_as_on_a_gpu(monkeypatch)

    def fail(*args: object, **more: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(GpuDecoder, "fill", fail)
        with pytest.raises(InsufficientMemoryError, match=r"weights take .* --quantization int8 .* --device cpu"):
            make_runner(checkpoint, FakeAccelerator())
        build_tiny_model("mixtral").save_pretrained(tmp_path)
        with pytest.raises(InsufficientMemoryError, match=r"help: --tensor-parallel-size 2 .* --device cpu"):
            make_runner(tmp_path, FakeAccelerator())  # experts are not quantized
    with monkeypatch.context() as patch:
        patch.setattr(GpuDecoder, "logits", fail)
        with pytest.raises(InsufficientMemoryError, match=r"a step of 16 tokens and 6 sequences .* --max-num-seqs 1"):
            make_runner(checkpoint, FakeAccelerator())
    memory = FakeMemory()
    runner = make_runner(checkpoint, FakeAccelerator(memory))
    engine = LLMEngine(EngineConfig(SMALL_CACHE), runner, ByteTokenizer(), stop_token_ids=(), max_model_len=64)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=5))
    trims = memory.num_trims
    with monkeypatch.context() as patch:
        patch.setattr(GpuDecoder, "forward", fail)
        (output,) = engine.step()
    assert isinstance(output.error, InsufficientMemoryError)
    assert "--gpu-memory-utilization 0.85, --max-num-batched-tokens 8 or --max-num-seqs 3" in output.error.message
    assert memory.num_trims == trims + 1
    engine.check_integrity()
    engine.add_request("s", [1, 2, 3], SamplingParams(max_tokens=5))
    while engine.has_unfinished_requests:
        assert all(output.error is None for output in engine.step())


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_gpu_that_has_failed_ends_the_executor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator()
    runner = make_runner(checkpoint, accelerator, enforce_eager=True)
    engine = LLMEngine(EngineConfig(SMALL_CACHE), runner, ByteTokenizer(), stop_token_ids=(), max_model_len=64)

    def fail(*args: object, **more: object) -> object:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    monkeypatch.setattr(GpuDecoder, where, fail)
    engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=5))
    (output,) = engine.step()
    assert isinstance(output.error, InternalError)  # a bug, and the device works
    accelerator.failed = True
    engine.add_request("s", [1, 2, 3], SamplingParams(max_tokens=5))
    with pytest.raises(ExecutorLostError, match=r"illegal memory access was encountered\). Start the worker again"):
        engine.step()


def test_a_failure_that_shows_with_the_result_ends_the_executor_too() -> None:
    class Broken:
        def result(self) -> StepResult:
            raise RuntimeError("CUDA error: unspecified launch failure")

    accelerator = FakeAccelerator()
    with pytest.raises(RuntimeError, match="launch failure"):
        WatchedStep(Broken(), accelerator).result()
    accelerator.failed = True
    with pytest.raises(ExecutorLostError):
        WatchedStep(Broken(), accelerator).result()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_a_variant_that_does_not_fit_is_refused(error: RuntimeError) -> None:
    settings = r"--lora-memory-gib, .* --max-loras .* --gpu-memory-utilization"
    with pytest.raises(InsufficientMemoryError, match=settings), binding_variants():
        raise error
    with pytest.raises(RuntimeError, match="a bug"), binding_variants():
        raise RuntimeError("a bug")


def test_variants_are_accounted_for_in_the_largest_step() -> None:
    shapes = [torch.Size(shape) for shape in ((1000, 64), (96, 64), (64, 96), (64,))]
    found = variant_activation_bytes(shapes, num_tokens=10, num_samples=2, vocab_size=1000, dtype_bytes=2)
    assert found == 10 * (2 * 64 + 4 * 3 * 1024)  # ranks take more than 2 x 2 x 96
    shapes.append(torch.Size((9000, 64)))
    found = variant_activation_bytes(shapes, num_tokens=10, num_samples=2, vocab_size=1000, dtype_bytes=2)
    assert found == 10 * 2 * (64 + 2 * 9000)
    assert variant_activation_bytes(shapes, num_tokens=1, num_samples=90, vocab_size=1000, dtype_bytes=2) == 360_000
