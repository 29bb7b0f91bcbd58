"""Compiles every kernel that an 8B model launches on an H200, as it launches it, for GPUs that need not be there.

    python -m tests.model_worker.engine.ops.compile_launches [--form llama] [--capability 90] [--kernel attend_kernel]

An engine with one layer of the real shapes is started, and computes steps of all kinds, on a device that has no numbers
(`tests/fakes/fake_cuda.py`). Each form of a kernel that it launches is compiled, and what the compiled kernel takes is
compared with what a multiprocessor has.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.load_plan import LoadPlan
from model_worker.engine import model_runner
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.models.gpu_decoder import GpuDecoder
from tests.fakes.fake_cuda import FakeCuda
from tests.fakes.launch_recorder import CompiledFor, Launches, LaunchRecorder
from tests.fakes.load_plans import make_plan
from tests.fakes.random_steps import RandomSteps

MAX_MODEL_LEN = 131072
MAX_NUM_SEQS = 512
MAX_TOKENS = 8192
SHARED_BYTES = {90: 227 * 1024, 80: 163 * 1024}
MOST_SPILLED_BYTES = 64
_REGISTERS = 65536  # of a multiprocessor
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
_FLOAT8_CAPABILITY = 89
_NUM_MIXED = 30

_LLAMA_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_GEMMA2_9B: Mapping[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_MIXTRAL_8X7B: Mapping[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_QWEN3_30B_A3B: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
FORMS: dict[str, tuple[Mapping[str, Any], str | None, str]] = {  # config, quantization, type of keys and values
    "llama": (_LLAMA_8B, None, "auto"),
    "llama-int4": (_LLAMA_8B, "int4", "auto"),
    "llama-int8": (_LLAMA_8B, "int8", "auto"),
    "llama-fp8": (_LLAMA_8B, "fp8", "float8_e4m3fn"),
    "gemma2": (_GEMMA2_9B, None, "auto"),
    "mixtral": (_MIXTRAL_8X7B, None, "auto"),
    "qwen3-moe": (_QWEN3_30B_A3B, None, "auto"),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes.

    Attributes:
        spilled_bytes: of local memory, a thread.
    """

    shared_bytes: int
    num_registers: int
    spilled_bytes: int
    num_warps: int

    def problems(self, capability: int, most_spilled_bytes: int = MOST_SPILLED_BYTES) -> list[str]:
        """Why it cannot be launched, or not in the time that it should take."""
        found = []
        if self.shared_bytes > SHARED_BYTES[capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.num_registers * self.num_warps * 32 > _REGISTERS:
            found.append(f"{self.num_registers} registers of {self.num_warps} warps")
        if self.spilled_bytes > most_spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        return found


def record(form: str, capability: int) -> dict[CompiledFor, Launches]:
    """All launches from the start to many steps, with the tiles of such a GPU."""
    config, quantization, kv_cache_dtype = FORMS[form]
    cache = CacheConfig(num_blocks=40000, swap_space_gib=0.0, kv_cache_dtype=kv_cache_dtype)
    scheduler = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_TOKENS)
    cuda = FakeCuda((capability // 10, capability % 10))
    recorder = LaunchRecorder(lambda: cuda.capturing)
    with cuda.installed(), recorder.installed(), _no_checkpoint():
        plan = replace(
            make_plan(max_model_len=MAX_MODEL_LEN),
            config=config,
            dtype="bfloat16",
            quantization=quantization,
            stop_token_ids=(),
            vocab_size=config["vocab_size"],
        )
        runner = ModelRunner(plan, EngineConfig(cache, scheduler), device="cuda")
        steps = RandomSteps(
            0,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            block_size=runner.block_size,
            num_groups=len(runner.groups),
            vocab_size=runner.vocab_size,
        )
        for _ in range(_NUM_MIXED):
            runner.launch(steps.mixed((None,))).result()
    return recorder.found


def too_many_programs(launches: Mapping[CompiledFor, Launches]) -> list[str]:
    """Launches with more programs in one direction than a grid may have."""
    return [
        f"{key}: {each.grid}"
        for key, each in launches.items()
        if any(count > most for count, most in zip(each.grid, _MOST_PROGRAMS, strict=True))
    ]


def compile_launch(key: CompiledFor, launches: Launches, capability: int) -> Compiled:
    """Not where TRITON_INTERPRET is set: kernels are no kernels then."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(key.module), key.name)
    source = ASTSource(
        fn=function,
        signature=dict(zip(function.arg_names, launches.types, strict=True)),
        constexprs={(place,): value for place, value in launches.constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in launches.divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(key.options))
    registers, spilled = _resources(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return Compiled(kernel.metadata.shared, registers, spilled, kernel.metadata.num_warps)


def _resources(cubin: bytes, cuobjdump: Path) -> tuple[int, int]:
    """Registers, and bytes of the stack, where what is spilled goes, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found is not None, text.stdout
    return int(found[1]), int(found[2])


@contextmanager
def _no_checkpoint() -> Iterator[None]:
    """Models are built of weights that nobody has read."""

    def build(plan: LoadPlan, device: torch.device, *args: object, **options: object) -> CausalModel:
        decoder = GpuDecoder(
            plan.config,
            dtype=torch.bfloat16,
            device=device,
            quantization=plan.quantization,
            max_model_len=plan.max_model_len,
        )
        for name, weight in decoder.weights():
            decoder.fill(name, torch.empty(weight.shape, dtype=weight.dtype, device=device))
        decoder.finish()
        return decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "load_model", build)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--form", choices=FORMS, action="append", help="of the model; may be given again (default: all)"
    )
    parser.add_argument("--capability", type=int, choices=SHARED_BYTES, action="append", help="(default: all)")
    parser.add_argument("--kernel", action="append", help="compile only this one; may be given again")
    options = parser.parse_args()
    problems: list[str] = []
    for capability in options.capability or SHARED_BYTES:
        launches: dict[CompiledFor, Launches] = {}
        for form in options.form or FORMS:
            if FORMS[form][1] == "fp8" and capability < _FLOAT8_CAPABILITY:
                continue
            found = record(form, capability)
            problems += too_many_programs(found)
            launches.update(found)
        chosen = [key for key in launches if options.kernel is None or key.name in options.kernel]
        print(f"sm_{capability}: {len(launches)} forms of kernels, {len(chosen)} of them compiled", flush=True)
        for key in sorted(chosen, key=str):
            try:
                compiled = compile_launch(key, launches[key], capability)
            except Exception as error:  # of compilers, of many kinds
                problems.append(f"sm_{capability} {key}: {type(error).__name__}: {error}")
                continue
            problems += [f"sm_{capability} {key}: {problem}" for problem in compiled.problems(capability)]
            print(
                f"sm_{capability} {compiled.num_registers:4} registers {compiled.spilled_bytes:5} spilled "
                f"{compiled.shared_bytes:7} shared  {key}",
                flush=True,
            )
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
