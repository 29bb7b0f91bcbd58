"""A LoadPlan as a person or a program reads it."""

from __future__ import annotations

from typing import Any

from adapters.load_plan import LoadPlan
from adapters.memory import available_memory_bytes, gib
from adapters.quantization import WeightPrecision


def plan_to_json(plan: LoadPlan) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes, the tensors as a count."""
    memory = plan.memory
    kv_bytes = memory.kv_bytes_per_token * plan.max_model_len
    template = plan.chat_template
    return {
        "path": str(plan.path),
        "family": plan.family.name,
        "model_type": plan.config["model_type"],
        "architectures": plan.config.get("architectures") or [],
        "format": plan.checkpoint.format,
        "files": [file.name for file in plan.checkpoint.files],
        "num_tensors": len(plan.checkpoint.tensors),
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "kept_types": sorted(plan.kept_types),
        "deltas": [str(delta) for delta in plan.deltas],
        "tokenizer": str(plan.tokenizer_path),
        "chat_template": None if template is None else {"name": template.name, "stop": list(template.stop)},
        "stop_token_ids": list(plan.stop_token_ids),
        "max_model_len": plan.max_model_len,
        "memory": {
            "weights_bytes": memory.weights_bytes,
            "kv_bytes_per_token": memory.kv_bytes_per_token,
            "kv_bytes_of_one_sequence": kv_bytes,
            "activations_bytes": memory.activations_bytes,
            "needed_bytes": memory.weights_bytes + kv_bytes + memory.activations_bytes,
            "available_bytes": available_memory_bytes(),
        },
    }


def plan_rows(plan: LoadPlan) -> list[tuple[str, str]]:
    """The plan as (name, text) rows."""
    shown = plan_to_json(plan)
    memory = shown["memory"]
    template = plan.chat_template
    stop = f", stops at {', '.join(map(repr, template.stop))}" if template is not None and template.stop else ""
    fits = "fits" if memory["needed_bytes"] <= memory["available_bytes"] else "does not fit"
    num_files = len(shown["files"])
    files = shown["files"][0] + (f" and {num_files - 1} more" if num_files > 1 else "")
    return [
        ("model", shown["path"]),
        ("family", f"{shown['family']} ({', '.join(shown['architectures']) or shown['model_type']})"),
        ("files", f"{files} ({shown['format']}, {shown['num_tensors'] or 'unknown number of'} tensors)"),
        ("dtype", shown["dtype"]),
        ("compression", WeightPrecision(plan.quantization, plan.kept_types).describe(plan.checkpoint)),
        ("deltas", ", ".join(shown["deltas"]) or "none"),
        ("context", f"{plan.max_model_len} tokens"),
        ("tokenizer", shown["tokenizer"]),
        ("chat template", "none: chat is refused" if template is None else template.name + stop),
        ("stop ids", ", ".join(map(str, plan.stop_token_ids)) or "none"),
        ("weights", gib(memory["weights_bytes"])),
        ("KV cache", f"{gib(memory['kv_bytes_of_one_sequence'])} for one sequence of {plan.max_model_len} tokens"),
        ("activations", gib(memory["activations_bytes"])),
        ("memory", f"{gib(memory['needed_bytes'])} needed, {gib(memory['available_bytes'])} available: {fits}"),
    ]
