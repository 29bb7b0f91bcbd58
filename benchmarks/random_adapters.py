"""LoRA adapters with random weights for a model, in the files that PEFT writes, so that any server can be given them.

    python benchmarks/random_adapters.py --model-path DIR --root ROOT --prefix r16 --ranks 16 --num-adapters 32

All linear layers of the decoder are adapted, not the head. The same arguments make the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors import safe_open

from compression.safetensors_writer import SafetensorsWriter

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_B_SCALE = 0.02  # enough to change the text, too little to make logits overflow


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapters `prefix-0000`, `prefix-0001`, ... that take the ranks in turn."""

    prefix: str
    ranks: tuple[int, ...]
    num_adapters: int

    @property
    def names(self) -> list[str]:
        return [f"{self.prefix}-{number:04d}" for number in range(self.num_adapters)]


def linear_shapes(model_path: Path) -> dict[str, tuple[int, int]]:
    """Module name to (N, K) of every linear layer that is adapted, from the headers of the safetensors files.

    Raises:
        ValueError: there is none.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                module = name.removesuffix(".weight")
                if module != name and module.rpartition(".")[2] in TARGET_MODULES:
                    n, k = tensors.get_slice(name).get_shape()
                    shapes[module] = (n, k)
    if not shapes:
        raise ValueError(f"{model_path} holds no safetensors file with a layer called {', '.join(TARGET_MODULES)}")
    return shapes


def make_adapters(
    adapters: AdapterSet, shapes: Mapping[str, tuple[int, int]], root: Path, *, dtype: torch.dtype, seed: int
) -> None:
    """Write the set below `root`; adapters that are there already are left as they are."""
    for name, rank in zip(adapters.names, cycle(adapters.ranks), strict=False):
        if not (root / name / "adapter_config.json").is_file():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            write_adapter(root / name, shapes, rank, dtype, generator)


def write_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """A [rank, K] uniform within ±1/sqrt(K), as training begins; B [N, rank] normal; alpha = rank, so no scale."""
    directory.mkdir(parents=True, exist_ok=True)
    keys = {module: f"base_model.model.{module}.lora_" for module in shapes}
    names = [f"{key}{factor}.weight" for key in keys.values() for factor in "AB"]
    (directory / "adapter_model.safetensors").unlink(missing_ok=True)  # left by a run that was broken off
    with SafetensorsWriter(directory, names, stem="adapter_model", max_shard_bytes=None) as writer:
        for module, (n, k) in shapes.items():
            a = (torch.rand(rank, k, generator=generator) * 2 - 1) * k**-0.5
            b = torch.randn(n, rank, generator=generator) * _B_SCALE
            writer.add(f"{keys[module]}A.weight", a.to(dtype))
            writer.add(f"{keys[module]}B.weight", b.to(dtype))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(TARGET_MODULES),
        "modules_to_save": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="random_adapters.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, type=Path, metavar="DIR", help="its safetensors directory")
    parser.add_argument("--root", required=True, type=Path, metavar="DIR", help="the adapters become its directories")
    parser.add_argument("--prefix", default="adapter", help="of their names (default: %(default)s)")
    parser.add_argument("--ranks", type=ranks, default=(16,), metavar="R,R,...", help="taken in turn (default: 16)")
    parser.add_argument("--num-adapters", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    made = AdapterSet(options.prefix, options.ranks, options.num_adapters)
    try:
        shapes = linear_shapes(options.model_path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    make_adapters(made, shapes, options.root, dtype=DTYPES[options.dtype], seed=options.seed)
    for name, rank in zip(made.names, islice(cycle(made.ranks), made.num_adapters), strict=True):
        print(f"{options.root / name}  rank {rank}")
    return 0


def ranks(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("ranks must be at least 1")
    return numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
