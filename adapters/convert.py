"""Convert a GGUF or `.bin` checkpoint to a Hugging Face directory of safetensors, in bounded memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters.gguf import chat_template_from_gguf, config_from_gguf, stop_ids_from_gguf
from adapters.tokenizer import load_tokenizer, save_tokenizer
from adapters.weights import read_weights, weight_names
from compression.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from registry.checkpoint import Checkpoint, read_checkpoint
from registry.companion_files import companion_files
from registry.errors import CheckpointError, InternalError, InvalidRequestError
from registry.staged_directory import staged_directory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REPORT_EVERY_BYTES = 256 << 20


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    report: Callable[[str], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model in `source` to the new directory `target`: config, tokenizer, chat template and safetensors.

    The directory appears when it is complete; an error or a kill leaves no `target`. Memory: one tensor.

    Args:
        source: a GGUF file, or a directory with `.bin` or safetensors weights.
        target: must not exist; its parent must.
        dtype: float32, bfloat16 or float16 for the floating-point weights. None: as stored; quantized GGUF, bfloat16.
        report: called with lines of progress.
        max_shard_bytes: larger models become several files with an index.

    Raises:
        InvalidRequestError: another dtype, or a source that is safetensors already and asks for no other dtype.
        CheckpointError: a source that cannot be read, or a target that exists.
        InternalError: the disk is full.
        UnsupportedModelError: a GGUF file that we cannot reproduce exactly.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InvalidRequestError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    checkpoint = read_checkpoint(source)
    if checkpoint.format == "safetensors" and dtype is None:
        raise InvalidRequestError(f"{source} is safetensors already; give a dtype to convert it to")
    config: dict[str, Any] = {}
    if checkpoint.format == "gguf":
        config = config_from_gguf(checkpoint)
        dtype = dtype or config["dtype"]
    _check_disk_space(checkpoint, target, dtype)
    with staged_directory(target) as staging:
        if checkpoint.format == "gguf":
            _write_gguf_companions(checkpoint, config | {"dtype": dtype}, staging)
        else:
            _copy_companions(checkpoint, dtype, staging)
        report(f"converting {source} ({checkpoint.format}) to {dtype or 'its stored dtypes'}")
        _write_weights(checkpoint, config, staging, dtype, report, max_shard_bytes)
        report("writing to disk")
    report(f"wrote {target}")


def _check_disk_space(checkpoint: Checkpoint, target: Path, dtype: str | None) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} does not exist; create it first")
    itemsize = _DTYPES[dtype].itemsize if dtype else 2
    if checkpoint.format == "bin":
        needed = sum(file.stat().st_size for file in checkpoint.files)
    else:
        needed = sum(math.prod(header.shape) for header in checkpoint.tensors.values()) * itemsize
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InternalError(
            f"no space left: {target.parent} has {free / 1e9:.1f} GB free, but the model takes "
            f"{needed / 1e9:.1f} GB; free some space or give another directory"
        )


def _write_gguf_companions(checkpoint: Checkpoint, config: dict[str, Any], staging: Path) -> None:
    (file,) = checkpoint.files
    stop_ids = stop_ids_from_gguf(checkpoint)
    generation: dict[str, Any] = {role: config[role] for role in ("bos_token_id", "pad_token_id")}
    generation["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids) or None
    _write_json(staging / "config.json", config)
    _write_json(
        staging / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )
    max_length = config["max_position_embeddings" if "max_position_embeddings" in config else "n_positions"]
    save_tokenizer(load_tokenizer(file), staging, model_max_length=max_length)
    template = chat_template_from_gguf(checkpoint)
    if template is not None:
        (staging / "chat_template.jinja").write_text(template, encoding="utf-8")


def _copy_companions(checkpoint: Checkpoint, dtype: str | None, staging: Path) -> None:
    files = companion_files(checkpoint.path)
    if "config.json" not in files:
        raise CheckpointError(f"{checkpoint.path} has no config.json; copy the model's config there")
    for name, file in files.items():
        shutil.copyfile(file, staging / name)
    try:
        config: dict[str, Any] = json.loads(files["config.json"].read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{files['config.json']} is not JSON ({error}); download it again") from error
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        _write_json(staging / "config.json", config)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    staging: Path,
    dtype: str | None,
    report: Callable[[str], None],
    max_shard_bytes: int,
) -> None:
    names = weight_names(checkpoint)
    num_bytes = next_report = 0
    with SafetensorsWriter(staging, names, max_shard_bytes=max_shard_bytes) as writer:
        for count, (name, tensor) in enumerate(read_weights(checkpoint, config), 1):
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(_DTYPES[dtype])
            writer.add(name, tensor)
            num_bytes += tensor.nbytes
            if num_bytes >= next_report or count == len(names):
                report(f"{count} of {len(names)} tensors, {num_bytes / 1e6:.0f} MB")
                next_report = num_bytes + _REPORT_EVERY_BYTES
