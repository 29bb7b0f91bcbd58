"""The files of the LoRA soak: good adapters in two versions each, and bad ones of every kind that has to be refused.

root/NAME                  a link to one of the two, moved while the server runs
root/versions/NAME-{a,b}   the same rank, other weights
root/bad/KIND
outside                    a good adapter, beside the root
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from random_adapters import AdapterSet, linear_shapes, make_adapters, write_adapter

VERSIONS = ("a", "b")
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_SMALL_RANK = 2
_STRENGTH = 48.0  # so that the update is about half of a layer's output, and most answers differ


def version_path(name: str, version: str) -> str:
    """Below the root."""
    return f"versions/{name}-{version}"


def point_to(root: Path, name: str, version: str) -> None:
    """Let the link `name` lead to a version, at once."""
    link = root / f".{name}"
    link.symlink_to(version_path(name, version))
    os.replace(link, root / name)


def make_good_adapters(
    root: Path, model_path: Path, ranks: Sequence[int], num_adapters: int, *, seed: int
) -> list[str]:
    """-> names"""
    shapes = linear_shapes(model_path)
    names = AdapterSet("soak", tuple(ranks), num_adapters).names
    (root / "versions").mkdir(parents=True)
    for name, rank in zip(names, cycle(ranks), strict=False):
        for version in VERSIONS:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{version}".encode()))
            directory = root / version_path(name, version)
            write_adapter(directory, shapes, rank, torch.bfloat16, generator)
            _configured(lora_alpha=_STRENGTH * rank**0.5)(directory)
    return names


def make_bad_adapters(root: Path, model_path: Path, *, seed: int) -> list[str]:
    """-> paths as they are given to the server; each has to be refused."""
    shapes = linear_shapes(model_path)
    good = AdapterSet("outside", (_SMALL_RANK,), 1)
    make_adapters(good, shapes, root.parent, dtype=torch.float32, seed=seed)
    outside = root.parent / good.names[0]
    for kind, spoil in _SPOILERS.items():
        directory = root / "bad" / kind
        shutil.copytree(outside, directory)
        spoil(directory)
    other_base = {module: (n // 2, k // 2) for module, (n, k) in shapes.items()}
    write_adapter(
        root / "bad" / "wrong-base", other_base, _SMALL_RANK, torch.float32, torch.Generator().manual_seed(seed)
    )
    (root / "bad" / "link-out").symlink_to(outside)
    (root / "bad" / "file-out").mkdir()
    for file in outside.iterdir():
        (root / "bad" / "file-out" / file.name).symlink_to(file)
    below = [f"bad/{kind}" for kind in (*_SPOILERS, "wrong-base", "link-out", "file-out", "absent")]
    return [*below, f"../{outside.name}", str(outside), "bad/../../" + outside.name, "/"]


# ------------------------------------------------------------------------------------------------ how to spoil one


def _corrupt_header(directory: Path) -> None:
    with (directory / _WEIGHTS).open("r+b") as file:
        file.seek(16)
        file.write(b"\xff" * 64)


def _truncate(directory: Path) -> None:
    file = directory / _WEIGHTS
    os.truncate(file, file.stat().st_size // 2)


def _poison(value: bytes) -> Callable[[Path], None]:
    """The last float32 of the data becomes these bytes."""

    def spoil(directory: Path) -> None:
        with (directory / _WEIGHTS).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(value)

    return spoil


def _configured(**fields: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / _CONFIG
        config: dict[str, Any] = json.loads(file.read_text())
        file.write_text(json.dumps(config | fields))

    return spoil


_SPOILERS: Mapping[str, Callable[[Path], object]] = {
    "corrupt": _corrupt_header,
    "truncated": _truncate,
    "nan": _poison(b"\x00\x00\xc0\x7f"),
    "infinite": _poison(b"\x00\x00\x80\x7f"),
    "wrong-rank": _configured(r=2 * _SMALL_RANK, lora_alpha=2 * _SMALL_RANK),
    "no-module": _configured(target_modules=["no_such_proj"]),
    "unknown-option": _configured(changes_everything=True),
    "unknown-type": _configured(peft_type="PROMPT_TUNING"),
    "no-config": lambda directory: (directory / _CONFIG).unlink(),
    "no-weights": lambda directory: (directory / _WEIGHTS).unlink(),
    "no-json": lambda directory: (directory / _CONFIG).write_text("{"),
    "empty": lambda directory: (directory / _WEIGHTS).write_bytes(b""),
}
