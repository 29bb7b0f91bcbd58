"""What variants cost on a GPU: decode steps of rows with LoRA adapters or 1-bit deltas, against steps of the base.

    python benchmarks/gpu_variants.py --checkpoint DIR --json FILE

The variants are random, of all linear layers of an 8B model, and made in memory: what is read from files is measured by
benchmarks/lora.py and deltas.py. Shares are those of the base's rate with as many rows, in the same process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_checkpoint import DEVICE, LLAMA_8B, parameter_shapes, write_checkpoint
from gpu_figures import Figure, Findings
from gpu_steps import decode_step_s, prefill_s, random_prompts
from torch import Tensor

from adapters import plan_load
from adapters.tokenizer import load_tokenizer
from delta.peft.compose import compose
from delta.variant_terms import LinearTerms, SignPlane, VariantTerms
from model_worker.engine.config import EngineConfig, LoraConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.bound_variant import VariantHost
from model_worker.engine.lora.loader_thread import loader_thread
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_source import LoraSource
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.machine import find_machine
from model_worker.engine.model_runner import ModelRunner

CONTEXT, NUM_STEPS = 1024, 48
LORA_TARGETS = {8: 0.90, 32: 0.82, 128: 0.68}
MIXED_ROWS, MIXED_RANKS, MIXED_TARGET = 32, (8, 16, 32, 64), 1.15
SIGN_TARGETS = {1: 0.90, 8: 0.60}
ZIPF_ROWS, ZIPF_EXPONENT, ZIPF_TARGET = 32, 1.5, 0.55
SEPARATE_TARGETS = {8: 4.0, 32: 7.0}
PROMPT_TOKENS, PREFILL_TARGET = 2048, 0.85
NUM_SIGNS = 32
MEMORY_GIB = 2 * 48.0  # half of it on the GPU


class RandomTerms:
    """Variants whose numbers are pieces of the same random ones, each variant's from another place on.

    Args:
        config: of the model.
        device: of the signs, which are most of a fine-tune: made there, they need not be copied, only put in order.
    """

    def __init__(self, config: dict[str, object], device: str = "cpu") -> None:
        self._shapes = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in parameter_shapes(config)
            if len(shape) == 2 and ".layers." in name
        }
        largest = max(max(shape) for shape in self._shapes.values())
        self._numbers = torch.randn(64 * largest * 2).mul_(0.01).bfloat16()
        largest_bits = max(shape[0] * shape[1] // 8 for shape in self._shapes.values())
        self._bits = torch.randint(0, 256, (largest_bits + (1 << 20),), dtype=torch.uint8, device=device)
        self._scales = torch.full((largest,), 1e-4)

    def read(self, path: Path) -> VariantTerms:
        """Of the kind and number that the name says: r16-0003 or sign-0007."""
        kind, _, number = path.name.partition("-")
        linears = {}
        for place, (module, shape) in enumerate(self._shapes.items()):
            start = (int(number) * 7919 + place * 104729) * 16
            if kind == "sign":
                linears[module] = LinearTerms(signs=(self._plane(shape, start),))
            else:
                linears[module] = self._factors(shape, int(kind[1:]), start)
        return VariantTerms(digest=f"random:{path.name}", linears=linears)

    def _factors(self, shape: tuple[int, int], rank: int, start: int) -> LinearTerms:
        a = _piece(self._numbers, rank * shape[1], start).view(rank, shape[1])
        return LinearTerms(a=a, b=_piece(self._numbers, shape[0] * rank, start + 8).view(shape[0], rank))

    def _plane(self, shape: tuple[int, int], start: int) -> SignPlane:
        bits = _piece(self._bits, shape[0] * shape[1] // 8, start).view(shape[0], -1)
        return SignPlane(bits, self._scales[: shape[0]], self._scales[: shape[1]])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the model of random weights")
    parser.add_argument("--json", type=Path, help="where the figures are written, after each one")
    options = parser.parse_args(arguments)
    write_checkpoint(options.checkpoint, LLAMA_8B, DEVICE)
    findings = Findings(options.json)
    measured = Measurements(make_engine(options.checkpoint), findings)
    *fewer, most = LORA_TARGETS
    for num_rows in fewer:
        measured.lora(num_rows)
    measured.mixed_ranks()
    for num_rows in SIGN_TARGETS:
        measured.signs(num_rows)
    measured.zipf()
    measured.separate()
    measured.prompt()
    measured.lora(most)  # last: these take longest to become active
    print(findings.table())
    return 0


def make_engine(checkpoint: Path) -> LLMEngine:
    """An engine whose variants are random; it reads no files of theirs."""
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=8192, max_mixed_prefill_tokens=8192),
        speculation=SpeculationConfig(speculation="off"),
        lora=LoraConfig(max_loras=256, max_cpu_loras=256, lora_memory_gib=MEMORY_GIB),
    )
    machine = find_machine(config, checkpoint, quantization="none")
    plan = plan_load(
        checkpoint,
        max_model_len=4096,
        max_num_batched_tokens=8192,
        memory_bytes=machine.memory_bytes,
        native_bf16=machine.native_bf16,
        native_model_types=machine.native_model_types,
    )
    runner = ModelRunner(plan, config, device=str(machine.device))
    model = runner.model
    assert isinstance(model, VariantHost)
    terms = RandomTerms(LLAMA_8B, DEVICE)
    source = LoraSource(terms.read, compose, hold=lambda held: held, bind=model.bind, binds_in_place=False)
    return LLMEngine(
        config,
        runner,
        load_tokenizer(plan.tokenizer_path),
        stop_token_ids=(),
        max_model_len=plan.max_model_len,
        loras=LoraManager(config.lora, source, memory_bytes=int(MEMORY_GIB * 2**30), work=loader_thread()),
    )


class Measurements:
    """Figures of one engine."""

    def __init__(self, engine: LLMEngine, findings: Findings) -> None:
        self._engine = engine
        self._findings = findings
        self._base_s: dict[int, float] = {}
        self._served: set[str] = set()

    def lora(self, num_rows: int) -> None:
        names = [f"r16-{number:04d}" for number in range(num_rows)]
        self._share(f"LoRA r16, {num_rows} distinct", names, LORA_TARGETS[num_rows])

    def signs(self, num_rows: int) -> None:
        names = [f"sign-{number:04d}" for number in range(num_rows)]
        self._share(f"1-bit deltas, {num_rows} distinct", names, SIGN_TARGETS[num_rows])

    def zipf(self) -> None:
        weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(NUM_SIGNS)]
        drawn = random.Random(0).choices(range(NUM_SIGNS), weights, k=ZIPF_ROWS)
        names = sorted(f"sign-{number:04d}" for number in drawn)
        self._share(f"1-bit deltas, {ZIPF_ROWS} rows, Zipf {ZIPF_EXPONENT}", names, ZIPF_TARGET)

    def mixed_ranks(self) -> None:
        """What ranks 8 to 64 add to a step, against as much rank of rank-16 adapters."""
        num_rows = MIXED_ROWS
        ranks = [MIXED_RANKS[number % len(MIXED_RANKS)] for number in range(num_rows)]
        mixed = self._step_s([f"r{rank}-{1000 + number:04d}" for number, rank in enumerate(ranks)])
        even = self._step_s([f"r16-{number:04d}" for number in range(num_rows)])
        base = self._base(num_rows)
        ratio = (mixed - base) / (even - base) / (sum(ranks) / (16 * num_rows))
        detail = f"{(mixed - base) * 1e3:.2f} ms over the base's {base * 1e3:.2f}; rank 16: {(even - base) * 1e3:.2f}"
        self._findings.add(
            Figure("LoRA, mixed ranks 8-64", ratio, "of the sum of ranks", MIXED_TARGET, detail, at_most=True)
        )

    def separate(self) -> None:
        """A step of distinct 1-bit deltas against a step each of as many models of their own."""
        alone = self._base(1)
        for num_rows, target in SEPARATE_TARGETS.items():
            together = self._step_s([f"sign-{number:04d}" for number in range(num_rows)])
            apart = num_rows * alone
            detail = f"{together * 1e3:.2f} ms a step, {num_rows} models one after the other {apart * 1e3:.2f}"
            name = f"1-bit deltas, {num_rows}, against separate models"
            self._findings.add(Figure(name, apart / together, "times", target, detail))

    def prompt(self) -> None:
        self._serve(["sign-0000"])
        prompts = random_prompts(8, PROMPT_TOKENS, LLAMA_8B["vocab_size"], seed=77)
        base = statistics.median([prefill_s(self._engine, prompt) for prompt in prompts[:4]][1:])
        loras = [LoraWeight("sign-0000")]
        ours = statistics.median([prefill_s(self._engine, prompt, loras) for prompt in prompts[4:]][1:])
        detail = f"{ours * 1e3:.1f} ms, base {base * 1e3:.1f} ms"
        name = f"1-bit delta, prompt of {PROMPT_TOKENS:,} tokens"
        self._findings.add(Figure(name, base / ours, "of the base's rate", PREFILL_TARGET, detail))

    def _share(self, name: str, names: Sequence[str], target: float) -> None:
        ours, base = self._step_s(names), self._base(len(names))
        detail = f"{ours * 1e3:.2f} ms a step, base {base * 1e3:.2f} ms"
        self._findings.add(Figure(name, base / ours, "of the base's rate", target, detail))

    def _base(self, num_rows: int) -> float:
        if num_rows not in self._base_s:
            self._base_s[num_rows] = self._step_s([None] * num_rows)
        return self._base_s[num_rows]

    def _step_s(self, names: Sequence[str | None]) -> float:
        """A decode step in which each row has the variant of this name."""
        self._serve([name for name in names if name is not None])
        prompts = random_prompts(len(names), CONTEXT - NUM_STEPS // 2, LLAMA_8B["vocab_size"], seed=len(names))
        loras = [[] if name is None else [LoraWeight(name)] for name in names]
        return decode_step_s(self._engine, prompts, num_steps=NUM_STEPS, loras=loras)

    def _serve(self, names: Sequence[str]) -> None:
        """Have these variants active."""
        for name in dict.fromkeys(names):
            if name not in self._served:
                reply = self._engine.loras.add(name, Path(name))
                while not reply.done():
                    self._engine.advance_loras()
                    self._engine.wait_for_adapters()
                reply.result()
                self._served.add(name)


def _piece(numbers: Tensor, length: int, start: int) -> Tensor:
    """Consecutive numbers from some place on, which depends on `start`."""
    first = start % max(len(numbers) - length, 1) // 16 * 16
    return numbers[first : first + length]


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
