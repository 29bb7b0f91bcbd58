"""How much memory a model will need, and how much there is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from adapters.load_plan import MemoryEstimate
from adapters.model_adapter import ModelAdapter
from adapters.quantization import GROUP_BYTES, WeightPrecision
from compression.grouped_weight import GROUP
from registry.checkpoint import Checkpoint

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ACTIVATION_BYTES = 4  # float32 in the native decoder, whatever the weights are; elsewhere at most that
# Logits are kept in float32 and sampled from a copy; a step needs those of one row for each sequence, and of as many
# drafts at most.
_MAX_LOGIT_ROWS = 128
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")


def estimate_memory(
    checkpoint: Checkpoint,
    adapter: ModelAdapter,
    *,
    dtype: str,
    stored_dtype: str,
    max_num_batched_tokens: int,
    precision: WeightPrecision | None = None,
) -> MemoryEstimate:
    """Bytes for weights, for one token of KV cache, and for the activations of one step.

    The activations are an estimate from above of what is alive at once in one layer: the residual stream and its norm,
    q, k, v and the attention output, gate and up and their product, what each expert gets and gives; and the logits.

    Args:
        precision: of the weights; None: all in `dtype`.
    """
    size = DTYPE_BYTES[dtype]
    precision = precision or WeightPrecision()
    if checkpoint.tensors:
        weights_bytes = sum(precision.num_bytes(tensor, size) for tensor in checkpoint.tensors.values())
    else:
        values = sum(file.stat().st_size for file in checkpoint.files) // DTYPE_BYTES[stored_dtype]
        per_group = size * GROUP if precision.quantization is None else GROUP_BYTES[precision.quantization]
        weights_bytes = values * per_group // GROUP
    per_token = (8 + 2 * adapter.num_active_experts) * adapter.hidden_size + 3 * adapter.intermediate_size
    logits = min(max_num_batched_tokens, _MAX_LOGIT_ROWS) * adapter.vocab_size * 4 * 2
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=adapter.kv_values_per_token * size,
        activations_bytes=max_num_batched_tokens * per_token * _ACTIVATION_BYTES + logits,
    )


def available_memory_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or less under a container's limit."""
    available = _free_on_machine()
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        current = int((_CGROUP / "memory.current").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        # No control group of version 2 with a limit here: the machine's own memory is the bound.
        return available
    if limit == "max":
        return available
    reclaimable = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
    return min(available, max(0, int(limit) - (current - reclaimable)))


def _free_on_machine() -> int:
    with suppress(OSError):  # not Linux
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):  # which some sandboxes leave out
                return int(line.split()[1]) * 1024
    import psutil  # which scripts/gpu-check does without

    return int(psutil.virtual_memory().available)


def gib(num_bytes: int) -> str:
    """`num_bytes` as a person reads it."""
    return f"{num_bytes / 2**30:.2f} GiB"
