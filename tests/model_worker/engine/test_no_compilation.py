"""On a GPU all kernels are compiled before the first request: whatever steps launch, the start has launched before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from delta.peft.base_model import model_shapes
from delta.variant_terms import LinearTerms, VariantTerms
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.layers.variants import VariantExperts, linear_with_terms
from model_worker.engine.lora.bound_variant import VariantHost
from model_worker.engine.lora.variant import Variant
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.gpu_variants import GpuVariant
from model_worker.engine.models.transformers_variants import TransformersVariant
from tests.fakes.fake_cuda import FakeCuda
from tests.fakes.launch_recorder import LaunchRecorder
from tests.fakes.random_steps import RandomSteps, every_step
from tests.fakes.random_terms import random_plane
from tests.fakes.random_variants import EMBEDDING, HEAD, random_variant
from tests.fakes.shaped_variants import shaped_variant
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

MAX_NUM_SEQS = 66
MAX_TOKENS = 160
MAX_MODEL_LEN = 4096
DECODED = (1, 2, 3, 5, 8, 13, 16, 17, 33, 64, 65, 66)  # sequences of decode steps
NUM_MIXED = 40


@contextmanager
def started(
    path: Path, family: str, *, dtype: str = "bfloat16", quantization: str | None = None, **options: Any
) -> Iterator[tuple[ModelRunner, FakeCuda, LaunchRecorder, dict[str, Tensor]]]:
    """A runner as it is before the first request, and the weights of the base."""
    pytest.importorskip("triton")
    model = build_tiny_model(family)
    model.save_pretrained(path)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    plan = replace(make_tiny_plan(path, dtype=dtype, max_model_len=MAX_MODEL_LEN), quantization=quantization)
    cache = CacheConfig(num_blocks=2000, swap_space_gib=0.0, kv_cache_dtype=options.pop("kv_cache_dtype", "auto"))
    scheduler = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_TOKENS)
    cuda = FakeCuda()
    recorder = LaunchRecorder(lambda: cuda.capturing)
    with cuda.installed(), recorder.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the tests after this one, if kernels are defined here
        runner = ModelRunner(plan, EngineConfig(cache, scheduler, **options), device="cuda")
        yield runner, cuda, recorder, weights


def bound(runner: ModelRunner, number: int, terms: VariantTerms) -> Variant:
    variant = Variant(number)
    assert isinstance(runner.model, VariantHost)
    variant.bound = runner.model.bind(terms)
    return variant


def low_rank_variant(weights: Mapping[str, Tensor], rank: int) -> VariantTerms:
    """An adapter of all linear layers but the head."""
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in weights.items() if ".layers." in name}
    linears = {
        module: LinearTerms(a=torch.zeros(rank, shape[1]), b=torch.zeros(shape[0], rank))
        for module, shape in shapes.items()
        if len(shape) == 2
    }
    return VariantTerms(f"sha256:rank {rank}", linears)


def with_more_tokens(terms: VariantTerms) -> VariantTerms:
    """The same with three tokens that the base does not have."""
    embedding = terms.embeddings[EMBEDDING]
    assert embedding.rows is not None
    extra = torch.zeros(3, embedding.rows.shape[1])
    head = replace(terms.linears.get(HEAD, LinearTerms()), extra_rows=extra)
    return replace(
        terms,
        linears={**terms.linears, HEAD: head},
        embeddings={EMBEDDING: replace(embedding, extra_rows=extra)},
    )


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tied", {}),
    "without graphs": ("llama", {"dtype": "float32", "enforce_eager": True}),
    "layer groups": ("gemma2", {}),
    "norms of rows, int4": ("olmo2", {"quantization": "int4"}),
    "experts": ("mixtral", {}),
    "norms of heads, 8 bits": ("qwen3", {"quantization": "fp8", "kv_cache_dtype": "float8_e4m3fn"}),
}

OF_TRANSFORMERS = ("bloom-odd-heads", "deepseek_v3", "gpt2", "gpt_oss", "llama4-chunked", "phi", "qwen2_moe")


@pytest.mark.parametrize("form", FORMS)
def test_no_step_compiles_or_waits(tmp_path: Path, form: str) -> None:
    """Whatever the requests want, and whichever variants are bound.

    Choices of rows whose variants change experts are read from the device: such variants are not among these.
    """
    family, options = FORMS[form]
    with started(tmp_path, family, **options) as (runner, cuda, recorder, weights):
        turns = []
        for turn in range(2):  # variants come and go
            terms = [replace(random_variant(weights, seed=10 * turn + number), experts={}) for number in range(2)]
            turns.append([*terms, low_rank_variant(weights, rank=8 + 92 * turn), with_more_tokens(terms[0])])
        assert not new_launches(runner, cuda, recorder, turns)
        assert runner._config.enforce_eager or cuda.num_replays > 10


@pytest.mark.parametrize("family", OF_TRANSFORMERS)
def test_no_step_of_transformers_compiles_or_waits(tmp_path: Path, family: str) -> None:
    """The same for the families without a decoder of our own."""
    shapes = model_shapes(build_tiny_model(family))
    turns = [
        [
            replace(shaped_variant(shapes, seed=seed, model_type=family, low_rank=seed % 3 == 0), experts={})
            for seed in seeds
        ]
        for seeds in ((0, 1, 2), (3, 4))
    ]
    with started(tmp_path, family, model_impl="transformers") as (runner, cuda, recorder, _):
        assert not new_launches(runner, cuda, recorder, turns)


def new_launches(
    runner: ModelRunner, cuda: FakeCuda, recorder: LaunchRecorder, turns: Sequence[Sequence[VariantTerms]]
) -> str:
    """What many steps would compile. They wait for nothing but logprobs of prompts, which are read from the device.

    Args:
        turns: the variants beside the base, of which each turn has its own.
    """
    compiled = set(recorder.found)
    steps = RandomSteps(
        seed=0,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        block_size=runner.block_size,
        num_groups=len(runner.groups),
        vocab_size=runner.vocab_size,
    )
    for turn, terms in enumerate(turns):
        variants = [None, *(bound(runner, number, each) for number, each in enumerate(terms))]
        num_reads = cuda.num_reads
        for step in every_step(steps, DECODED if turn == 0 else (), variants, NUM_MIXED):
            runner.launch(step).result()
            if any(item.sequence.sampling.prompt_logprobs is not None for item in step.scheduled):
                num_reads = cuda.num_reads
            assert cuda.num_reads == num_reads
    return "\n".join(str(key) for key in recorder.found if key not in compiled)


def test_products_of_single_experts_are_compiled(tmp_path: Path) -> None:
    """What rows launch whose variants change experts, by the choices that are read from the device."""
    with started(tmp_path, "mixtral") as (runner, _, recorder, weights):
        compiled = set(recorder.found)
        name = "model.layers.1.mlp.experts.down_proj"
        num_outputs, num_inputs = weights[name].shape[1:]
        for num_planes in (1, 2):
            planes = tuple(random_plane(num_outputs, num_inputs, scale=0.1) for _ in range(num_planes))
            variant = bound(runner, num_planes, VariantTerms("", experts={name: {2: LinearTerms(signs=planes)}})).bound
            assert isinstance(variant, GpuVariant)
            terms = variant.terms.experts["layers.1.experts"].down[2]
            for num_rows in (1, 5, 16, 17, 64, 128, 160):
                x = torch.zeros(num_rows, num_inputs, dtype=torch.bfloat16, device="cuda")
                linear_with_terms(x, runner.model.layers[1].mlp.experts.down_proj[2], None, terms)
    assert set(recorder.found) == compiled


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", "qwen3_moe"])
def test_products_of_single_experts_of_transformers_are_compiled(tmp_path: Path, family: str) -> None:
    with started(tmp_path, family, model_impl="transformers") as (runner, _, recorder, _):
        compiled = set(recorder.found)
        for name, shape in model_shapes(build_tiny_model(family)).experts.items():
            for num_planes in (1, 3):
                planes = tuple(
                    random_plane(shape.out_features, shape.in_features, scale=0.1) for _ in range(num_planes)
                )
                terms = VariantTerms("", experts={name: {2: LinearTerms(signs=planes)}})
                variant = bound(runner, num_planes, terms).bound
                assert isinstance(variant, TransformersVariant)
                ((experts, of_experts),) = variant.experts.items()
                parameter = name.rpartition(".")[2]
                of_expert = (of_experts.down if parameter == "down_proj" else of_experts.up)[2]
                for num_rows in (1, 5, 16, 17, 64, 128, 160):
                    x = torch.zeros(num_rows, shape.in_features, dtype=torch.bfloat16, device="cuda")
                    VariantExperts(experts, ()).linear(parameter, 2, x, of_expert)
        assert set(recorder.found) == compiled
