"""`python -m delta merge`: write the model that a LoRA adapter, or a delta, makes of its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from delta.apply import apply_delta
from delta.delta_config import CONFIG_FILE
from delta.progress_bar import progress_bar

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "merge", help="write the model that a LoRA adapter, or a delta, makes of its base"
    )
    verb.add_argument("variant", type=Path, metavar="DIR", help="the adapter in PEFT's format, or the delta")
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model to write")
    verb.add_argument(
        "--force", action="store_true", help="replace a model that is there, once the new one is complete"
    )
    verb.add_argument("--dtype", choices=_DTYPES, help="of the weights that are written (default: their own)")
    verb.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> None:
    dtype = None if args.dtype is None else _DTYPES[args.dtype]
    with progress_bar("merging") as progress:
        if (args.variant / CONFIG_FILE).is_file():
            apply_delta(args.base, args.variant, args.out, dtype=dtype, force=args.force, progress=progress)
        else:
            # It imports transformers' models, which a delta does not need.
            from delta.imports.peft_adapter import merge_adapter

            merge_adapter(args.base, args.variant, args.out, dtype=dtype, force=args.force, progress=progress)
    print(f"wrote {args.out}")
