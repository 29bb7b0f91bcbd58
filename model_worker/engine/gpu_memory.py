"""How much of a GPU's memory the KV cache gets: what is left of a share of it once the largest step has been measured.

    total    | other processes | weights, context | activations | graphs | variants | KV cache | left free |
    budget                     | <------------- gpu_memory_utilization * total -------------> |

Weights and all that stays are what is gone from the free memory after loading. Activations are what the largest step
takes beside that, with its logits and samples, and what variants would add to it (`variant_activations.py`); graphs are
measured with the two largest of each kind. Variants may take their bound (`--lora-memory-gib`). What is small is left
to the share that stays free: block tables, buffers of inputs, partial results of graphs of few rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from adapters.memory import gib
from registry.errors import InsufficientMemoryError


class DeviceMemory(Protocol):
    """What can be asked of a device, in bytes."""

    def total(self) -> int:
        """All memory that it has."""
        ...

    def free(self) -> int:
        """What nobody has taken, neither this process nor another."""
        ...

    def trim(self) -> None:
        """Give back what this process has taken and does not use; the peak is measured from here."""
        ...

    def peak(self) -> int:
        """The most by which this process has held more than after `trim`."""
        ...


class CudaMemory:
    """See DeviceMemory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held = torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._held


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a GPU's memory is used for, in bytes.

    Attributes:
        total: of the GPU.
        budget: what this process may take.
        weights: with all else that stays.
        activations: of the largest step, of rows with variants.
        graphs: of all of them.
        variants: at their bound.
    """

    total: int
    budget: int
    weights: int
    activations: int
    graphs: int
    variants: int

    @property
    def kv_cache(self) -> int:
        """What is left; negative where nothing is."""
        return self.budget - self.weights - self.activations - self.graphs - self.variants

    def describe(self) -> str:
        """For people."""
        parts = (
            ("weights", self.weights),
            ("the largest step", self.activations),
            ("graphs", self.graphs),
            ("fine-tunes", self.variants),
        )
        return ", ".join(f"{gib(num_bytes)} for {what}" for what, num_bytes in parts if num_bytes)


def budget_bytes(memory: DeviceMemory, utilization: float) -> int:
    """What this process may take of a GPU of which it has taken nothing yet.

    Raises:
        InsufficientMemoryError: others have taken too much of it.
    """
    total, free = memory.total(), memory.free()
    budget = int(total * utilization)
    if budget > free:
        raise InsufficientMemoryError(
            f"--gpu-memory-utilization {utilization} is {gib(budget)} of the GPU's {gib(total)}, and only {gib(free)} "
            f"are free. Lower it to {free / total - 0.005:.2f}, end what else uses the GPU (nvidia-smi shows it), or "
            "choose another GPU with --device cuda:N."
        )
    return budget


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a GPU, or pinned host memory, is used up: torch has a type of its own for its own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


@contextmanager
def binding_variants() -> Iterator[None]:
    """Around putting a variant into the memory of a device.

    Raises:
        InsufficientMemoryError: it does not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it holds what was made in vain
        raise InsufficientMemoryError(
            "The GPU had no memory left for this fine-tune, although it is within the bound of them all: something "
            "else uses the GPU too, or its memory is in pieces. The others are served on. Start the model worker with "
            "a smaller --lora-memory-gib, a smaller --max-loras or a smaller --gpu-memory-utilization. "
            f"({str(error).splitlines()[0]})"
        ) from error


def measure(
    memory: DeviceMemory,
    *,
    budget: int,
    free_before: int,
    variants: int,
    variant_activations: int,
    compute_largest_step: Callable[[], object],
    capture: Callable[[int], None] | None,
    forget: Callable[[], None],
    num_buckets: int,
) -> MemoryUse:
    """Compute the largest step, and capture some graphs, to see what they take. The model is loaded.

    Args:
        budget: see `budget_bytes`.
        free_before: memory that was free before anything was loaded.
        variants: at their bound.
        variant_activations: what they take in the largest step, which is computed without any.
        compute_largest_step: with all logits and samples; called twice, because what is made in the first call stays.
        capture: captures the graphs of so many buckets, and keeps those that are there; None: there are no graphs.
        forget: frees the graphs, and whatever else was made only to measure.
        num_buckets: how many there will be.
    """
    compute_largest_step()
    memory.trim()
    compute_largest_step()
    activations = memory.peak() + variant_activations
    graphs = 0
    if capture is not None:
        memory.trim()
        free = memory.free()
        used = []
        for num in range(1, min(2, num_buckets) + 1):
            capture(num)
            used.append(max(0, free - memory.free()))
        graphs = used[0] + (num_buckets - 1) * (used[-1] - used[0])
    forget()
    memory.trim()
    return MemoryUse(
        total=memory.total(),
        budget=budget,
        weights=free_before - memory.free(),
        activations=activations,
        graphs=graphs,
        variants=variants,
    )
