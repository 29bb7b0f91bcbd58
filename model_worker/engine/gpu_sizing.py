"""The memory of a GPU from loading to serving: what each part may take, and what helps where it finds no room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from adapters.load_plan import LoadPlan
from adapters.memory import gib
from model_worker.engine.cache_layout import CacheLayout
from model_worker.engine.config import EngineConfig
from model_worker.engine.gpu_memory import DeviceMemory, MemoryUse, budget_bytes, is_out_of_memory, measure
from model_worker.engine.kv_cache import choose_num_blocks
from model_worker.engine.models.gpu_decoder import can_quantize
from registry.errors import InsufficientMemoryError

_GIB = 2**30
_VARIANTS_SHARE = 1 / 32  # of all memory, where nobody asked for more or less
_FEW_TOKENS = 512


class GpuSizing:
    """Args:
    memory: of the GPU; nothing is loaded yet.
    config: of the engine.
    plan: what will be loaded.

    Attributes:
        variants_bytes: what active variants may take. `--lora-memory-gib` is for them and for what is kept in host
            memory together, and what is active is also kept there: so half of it.

    Raises:
        InsufficientMemoryError: others have taken too much of the GPU.
    """

    def __init__(self, memory: DeviceMemory, config: EngineConfig, plan: LoadPlan) -> None:
        self._memory = memory
        self._config = config
        self._could_quantize = (
            plan.quantization is None
            and config.model_impl != "transformers"
            and can_quantize(plan.config, plan.max_model_len)
        )
        self._weights_bytes = plan.memory.weights_bytes // config.tensor_parallel_size
        self._total = memory.total()
        self._budget = budget_bytes(memory, config.cache.gpu_memory_utilization)
        self._free_before = memory.free()
        wanted_gib = config.lora.lora_memory_gib
        self.variants_bytes = int(self._total * _VARIANTS_SHARE if wanted_gib is None else wanted_gib * _GIB / 2)

    def loading(self) -> AbstractContextManager[None]:
        """Around loading the weights."""
        return self._explained(self._loading_failed)

    def measuring(self) -> AbstractContextManager[None]:
        """Around whatever else is done before the first request."""
        return self._explained(self._largest_step_failed)

    def computing(self, num_tokens: int) -> AbstractContextManager[None]:
        """Around a step."""
        return self._explained(lambda: self._step_failed(num_tokens))

    def measure(
        self,
        *,
        variant_activations: int,
        compute_largest_step: Callable[[], object],
        capture: Callable[[int], None] | None,
        forget: Callable[[], None],
        num_buckets: int,
    ) -> MemoryUse:
        """See gpu_memory.measure."""
        return measure(
            self._memory,
            budget=self._budget,
            free_before=self._free_before,
            variants=self.variants_bytes,
            variant_activations=variant_activations,
            compute_largest_step=compute_largest_step,
            capture=capture,
            forget=forget,
            num_buckets=num_buckets,
        )

    def choose_num_blocks(self, use: MemoryUse, layout: CacheLayout) -> int:
        """Raises:
        InsufficientMemoryError: there is no room for a KV cache, or not for the one that was asked for.
        """
        try:
            return choose_num_blocks(
                self._config.cache,
                layout.block_bytes,
                max_useful_blocks=layout.max_useful_blocks,
                free_bytes=max(0, use.kv_cache),
                device=torch.device("cuda"),
            )
        except InsufficientMemoryError as error:
            raise InsufficientMemoryError(
                f"{error.message} Of the {gib(use.budget)} that --gpu-memory-utilization allows go {use.describe()}. "
                f"These settings would give the KV cache most: {self._remedies(use)}."
            ) from error

    # ------------------------------------------------------------------------------------------ internal

    @contextmanager
    def _explained(self, explain: Callable[[], str]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = explain()
            error.__traceback__ = None  # it holds what was made in vain
            self._memory.trim()
            raise InsufficientMemoryError(message) from error

    def _remedies(self, use: MemoryUse) -> str:
        """The three changes that would give the KV cache most, with what they would give."""
        config = self._config
        tokens, utilization = config.scheduler.max_num_batched_tokens, config.cache.gpu_memory_utilization
        gains = [(use.weights // 2, f"--tensor-parallel-size {2 * config.tensor_parallel_size}")]
        if utilization < 0.95:
            gains.append((int((0.95 - utilization) * use.total), "--gpu-memory-utilization 0.95"))
        if self._could_quantize:
            gains.append((use.weights * 7 // 10, "--quantization int4"))
        if tokens > _FEW_TOKENS:
            fewer = max(_FEW_TOKENS, tokens // 4)
            gains.append((use.activations * (tokens - fewer) // tokens, f"--max-num-batched-tokens {fewer}"))
        if not config.enforce_eager:
            gains.append((use.graphs, "--enforce-eager"))
        gains.append((use.variants // 2, f"--lora-memory-gib {use.variants / _GIB:.2f}"))
        gains.sort(reverse=True)
        return "; or ".join(f"{flags} (about {gib(gain)} more)" for gain, flags in gains[:3])

    def _loading_failed(self) -> str:
        weights = self._weights_bytes
        more_ranks = f"--tensor-parallel-size {2 * self._config.tensor_parallel_size}"
        ways = [f"{more_ranks} (about {gib(weights // 2)} on each GPU)", "--device cpu", "a smaller model"]
        if self._could_quantize:
            smaller = f"int8 (about {gib(weights // 2)}) or int4 (about {gib(weights * 3 // 10)})"
            ways = [f"--quantization {smaller}", *ways[:2]]
        return (
            f"The model's weights take about {gib(weights)}, and of the GPU's {gib(self._total)} only "
            f"{gib(self._free_before)} were free. Any of these would help: {'; or '.join(ways)}."
        )

    def _largest_step_failed(self) -> str:
        tokens, seqs = self._config.scheduler.max_num_batched_tokens, self._config.scheduler.max_num_seqs
        ways = [f"--max-num-batched-tokens {max(1, tokens // 4)}", f"--max-num-seqs {max(1, seqs // 4)}"]
        if self._could_quantize:
            ways.append(f"--quantization int8 (about {gib(self._weights_bytes // 2)} less)")
        else:
            ways.append(f"--tensor-parallel-size {2 * self._config.tensor_parallel_size}")
        return (
            f"The weights, about {gib(self._weights_bytes)}, fit into the GPU's {gib(self._total)}, but a step of "
            f"{tokens} tokens and {seqs} sequences finds no room beside them. Any of these would help: "
            f"{'; or '.join(ways)}."
        )

    def _step_failed(self, num_tokens: int) -> str:
        return (
            f"The GPU had no memory left for a step of {num_tokens} tokens ({gib(self._memory.free())} of "
            f"{gib(self._total)} are free): something else uses it too, or its memory is in pieces. Start the model "
            f"worker with {settings_for_smaller_steps(self._config)}."
        )


def settings_for_smaller_steps(config: EngineConfig) -> str:
    """What would help where a step found no memory."""
    tokens, seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    lower = max(0.05, config.cache.gpu_memory_utilization - 0.05)
    return (
        f"--gpu-memory-utilization {lower:.2f}, --max-num-batched-tokens {max(1, tokens // 2)} or "
        f"--max-num-seqs {max(1, seqs // 2)}"
    )
