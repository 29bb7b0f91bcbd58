"""Configuration of the engine: small frozen dataclasses, composed. Each component gets only its own.

`None` means "chosen at load from the model and the machine"; it is resolved once, into a new object. The command-line
flags of the worker are generated from these fields and their help texts (registry/flags.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType

from registry.errors import InvalidRequestError
from registry.flags import flag


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache.

    Raises:
        InvalidRequestError: a value that no cache can have, or its size given twice.
    """

    block_size: int = flag(16, "tokens in one KV cache block")
    num_blocks: int | None = flag(None, "number of KV cache blocks, instead of --kv-cache-gib")
    kv_cache_gib: float | None = flag(
        None,
        "memory for the KV cache in GiB; default: for CPUs half of what is free, at most 4; for GPUs what is left of "
        "--gpu-memory-utilization",
    )
    kv_cache_dtype: str = flag(
        "auto",
        "type of the keys and values that are kept; auto: that of the model; 8 bits need the native decoder",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn"),
    )
    gpu_memory_utilization: float = flag(
        0.9, "share of a GPU's memory that is used for everything: weights, the largest step, graphs, KV cache"
    )
    swap_space_gib: float | None = flag(
        None, "host memory in GiB to swap preempted requests to; default: 4 for GPUs, none for CPUs"
    )
    enable_prefix_caching: bool = flag(True, "share KV blocks between requests that begin alike")

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidRequestError(f"--block-size must be at least 1, got {self.block_size}.", param="block_size")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise InvalidRequestError(f"--num-blocks must be at least 1, got {self.num_blocks}.", param="num_blocks")
        if self.kv_cache_gib is not None and not (math.isfinite(self.kv_cache_gib) and self.kv_cache_gib > 0):
            raise InvalidRequestError(
                f"--kv-cache-gib must be a positive number, got {self.kv_cache_gib}.", param="kv_cache_gib"
            )
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise InvalidRequestError(
                f"--num-blocks {self.num_blocks} and --kv-cache-gib {self.kv_cache_gib} both size the KV cache; "
                "leave one of them out.",
                param="num_blocks",
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidRequestError(
                f"--gpu-memory-utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}.",
                param="gpu_memory_utilization",
            )
        if self.swap_space_gib is not None and not (math.isfinite(self.swap_space_gib) and self.swap_space_gib >= 0):
            raise InvalidRequestError(
                f"--swap-space-gib must be 0 or a positive number, got {self.swap_space_gib}.", param="swap_space_gib"
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What one step may hold.

    Raises:
        InvalidRequestError: a value that cannot work.
    """

    max_num_seqs: int = flag(64, "most sequences in one step; by default 256 on GPUs")
    max_num_batched_tokens: int = flag(
        512, "most tokens computed in one step; longer prompts are computed in chunks; by default 8192 on GPUs"
    )
    max_mixed_prefill_tokens: int = flag(
        128,
        "most tokens of prompts in a step in which others stream; more when more prompts wait than stream; by default "
        "2048 on GPUs",
    )
    max_num_waiting: int = flag(1024, "requests that may wait; more are refused with 429")

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise InvalidRequestError(
                f"--max-num-seqs ({self.max_num_seqs}) must be at least 1 and at most --max-num-batched-tokens "
                f"({self.max_num_batched_tokens}), because every running sequence takes a token of each step.",
                param="max_num_seqs",
            )
        if self.max_mixed_prefill_tokens < 1:
            raise InvalidRequestError(
                f"--max-mixed-prefill-tokens must be at least 1, got {self.max_mixed_prefill_tokens}.",
                param="max_mixed_prefill_tokens",
            )
        if self.max_num_waiting < 1:
            raise InvalidRequestError(
                f"--max-num-waiting must be at least 1, got {self.max_num_waiting}: every request waits for a step.",
                param="max_num_waiting",
            )


GPU_STEPS = MappingProxyType({"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_mixed_prefill_tokens": 2048})
"""Values of a SchedulerConfig for a GPU where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Speculative decoding; see `engine/speculation`.

    Raises:
        InvalidRequestError: a value that cannot work.
    """

    speculation: str = flag(
        "ngram", "guess tokens from the request's own text where that pays, or never", choices=("ngram", "off")
    )
    num_speculative_tokens: int = flag(8, "most tokens guessed for one request in one step")
    ngram_min: int = flag(2, "fewest last tokens that must have stood together before to guess what follows")
    ngram_max: int = flag(4, "most last tokens that are looked for")

    def __post_init__(self) -> None:
        if self.num_speculative_tokens < 1:
            raise InvalidRequestError(
                f"--num-speculative-tokens must be at least 1, got {self.num_speculative_tokens}; "
                "--speculation off turns it off.",
                param="num_speculative_tokens",
            )
        if not 1 <= self.ngram_min <= self.ngram_max:
            raise InvalidRequestError(
                f"--ngram-min must be at least 1 and at most --ngram-max, got {self.ngram_min} and {self.ngram_max}.",
                param="ngram_min",
            )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """LoRA adapters; see `engine/lora`.

    Raises:
        InvalidRequestError: a value that cannot work.
    """

    max_loras: int = flag(
        32, "most fine-tunes (LoRA adapters and deltas) that are active, so that requests can run with them"
    )
    max_cpu_loras: int | None = flag(
        None,
        "most fine-tunes in host memory, the active ones included; default: 256, or --max-loras if that is more",
    )
    lora_memory_gib: float | None = flag(
        None, "memory for fine-tunes in GiB, active or not; default: a quarter of what is free after loading"
    )
    lora_patience_s: float = flag(
        1.0,
        "seconds that a request waits for its fine-tune before a place is emptied for it; with less, they take "
        "turns more often and batches are smaller, with more, rare ones wait longer",
    )

    def __post_init__(self) -> None:
        if self.max_loras < 1:
            raise InvalidRequestError(f"--max-loras must be at least 1, got {self.max_loras}.", param="max_loras")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise InvalidRequestError(
                f"--max-cpu-loras ({self.max_cpu_loras}) must be at least --max-loras ({self.max_loras}), because "
                "active adapters are in host memory too.",
                param="max_cpu_loras",
            )
        if self.lora_memory_gib is not None and not (math.isfinite(self.lora_memory_gib) and self.lora_memory_gib > 0):
            raise InvalidRequestError(
                f"--lora-memory-gib must be a positive number, got {self.lora_memory_gib}.", param="lora_memory_gib"
            )
        if not (math.isfinite(self.lora_patience_s) and self.lora_patience_s >= 0):
            raise InvalidRequestError(
                f"--lora-patience must be 0 or a positive number of seconds, got {self.lora_patience_s}.",
                param="lora_patience_s",
            )

    @property
    def most_in_host_memory(self) -> int:
        return max(256, self.max_loras) if self.max_cpu_loras is None else self.max_cpu_loras


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """What is recorded of the first steps; see `engine/step_profiler.py`.

    Raises:
        InvalidRequestError: profile_steps is not positive, or there is nothing to apply the other two to.
    """

    profile: str | None = flag(None, "directory or .json file for a trace of the steps, for Perfetto; default: none")
    profile_steps: int | None = flag(None, "steps that the trace holds; default: 100, with torch 10")
    profile_detail: str = flag(
        "spans",
        "parts of each step; operations: those of the model too; torch: every operator of torch (slow)",
        choices=("spans", "operations", "torch"),
    )

    def __post_init__(self) -> None:
        if self.profile_steps is not None and self.profile_steps < 1:
            raise InvalidRequestError(
                f"--profile-steps must be at least 1, got {self.profile_steps}.", param="profile_steps"
            )
        if self.profile is None and (self.profile_steps is not None or self.profile_detail != "spans"):
            raise InvalidRequestError(
                "--profile-steps and --profile-detail are about a trace, and none is written without --profile.",
                param="profile",
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings of the engine.

    Raises:
        InvalidRequestError: num_threads is not positive.
    """

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    model_impl: str = flag(
        "auto",
        "what computes the model: native: our own decoder; transformers: its code over our paged attention; auto: "
        "native where it knows the model and there are kernels for this machine",
        choices=("auto", "native", "transformers"),
    )
    device: str = flag("auto", "where the model is computed: cpu, cuda or cuda:N; auto: a GPU, where there is one")
    enforce_eager: bool = flag(
        False, "on GPUs, launch every kernel of a decode step by itself instead of capturing graphs at the start"
    )
    num_threads: int | None = flag(None, "threads for tensor work; default: one per core")
    tensor_parallel_size: int = flag(
        1, "processes that the model is divided among: each has a share of all weights and of the KV cache, and a GPU"
    )

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise InvalidRequestError(
                f"--tensor-parallel-size must be at least 1, got {self.tensor_parallel_size}.",
                param="tensor_parallel_size",
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise InvalidRequestError(f"--num-threads must be at least 1, got {self.num_threads}.", param="num_threads")
