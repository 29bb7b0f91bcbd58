"""What a model is computed with: a device, and kernels for it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from model_worker.engine.config import EngineConfig
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.kernels import find_kernels
from model_worker.engine.ops.cpu.program import KernelLibrary
from registry.errors import InvalidRequestError

_LEAST_CAPABILITY = (8, 0)  # of a GPU: products of integers and of bfloat16 in tensor cores
_CUDA = re.compile(r"cuda(:(?P<index>\d+))?")


@dataclass(frozen=True, slots=True)
class Machine:
    """Attributes:
    device: that computes; of several ranks the first one's.
    kernels: of this CPU, for the native decoder; None: there are none, or it is not used.
    memory_bytes: as in `plan_load`: that of all GPUs together; None for CPUs.
    native_bf16: as there.
    native_model_types: as there: those that one of our own decoders computes here.
    """

    device: torch.device
    kernels: KernelLibrary | None = None
    memory_bytes: int | None = None
    native_bf16: bool | None = None
    native_model_types: Collection[str] = ()


def find_machine(config: EngineConfig, cache_dir: Path, *, quantization: str) -> Machine:
    """What a configuration asks for, as far as it is here.

    Args:
        cache_dir: where built kernels are kept.
        quantization: as in `plan_load`; weights of 4 or 8 bits need a decoder of our own.

    Raises:
        InvalidRequestError: there is no such device, or our kernels cannot be compiled for it.
        UnsupportedModelError: the kernels that are needed cannot be built.
    """
    device = choose_device(config.device)
    own = NATIVE_MODEL_TYPES if config.model_impl != "transformers" else ()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) < _LEAST_CAPABILITY:
            raise InvalidRequestError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}, the kernels for GPUs "
                "need 8.0 or more (Ampere and newer); use another GPU, or --device cpu.",
                param="device",
            )
        memory_bytes = properties.total_memory * config.tensor_parallel_size
        return Machine(device, memory_bytes=memory_bytes, native_bf16=True, native_model_types=own)
    if config.tensor_parallel_size > 1:  # ranks compute with torch, also on CPUs
        return Machine(device, native_model_types=own)
    kernels = find_kernels(cache_dir, required=quantization in ("int8", "int4") or config.model_impl == "native")
    return Machine(device, kernels, native_model_types=own if kernels is not None else ())


def choose_device(name: str, *, num_gpus: int | None = None) -> torch.device:
    """The device of a `--device`: auto (a GPU, where torch sees one), cpu, cuda or cuda:N.

    Args:
        num_gpus: that torch sees; None: ask it.

    Raises:
        InvalidRequestError: there is no such device.
    """
    if name == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    if name == "auto":
        return torch.device("cuda", 0) if num_gpus else torch.device("cpu")
    match = _CUDA.fullmatch(name)
    if match is None:
        raise InvalidRequestError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}.", param="device")
    index = int(match["index"] or 0)
    if num_gpus == 0:
        why = (
            "this torch is built without CUDA; install one that is built with it"
            if torch.version.cuda is None
            else "torch sees no GPU; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        )
        raise InvalidRequestError(f"--device {name} is not possible: {why}, or use --device cpu.", param="device")
    if index >= num_gpus:
        raise InvalidRequestError(
            f"--device {name} is not possible: torch sees {num_gpus} GPU{'s' if num_gpus > 1 else ''}, "
            f"cuda:0 to cuda:{num_gpus - 1}.",
            param="device",
        )
    return torch.device("cuda", index)


def num_usable_processors() -> int:
    """Processors that this process may run on, which in a container may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_num_threads(num_threads: int | None) -> None:
    """Raises InvalidRequestError: a `--num-threads` above the processors there are, for which threads would wait."""
    num_processors = num_usable_processors()
    if num_threads is not None and num_threads > num_processors:
        raise InvalidRequestError(
            f"--num-threads must be at most {num_processors}, the processors of this process, not {num_threads}; "
            "without it, there is one thread per core.",
            param="num_threads",
        )
