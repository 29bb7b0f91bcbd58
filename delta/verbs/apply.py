"""`python -m delta apply`: write the fine-tune that a delta and its base stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from delta.apply import apply_delta
from delta.progress_bar import progress_bar

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "apply", help="write the fine-tune that a delta and its base stand for"
    )
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument("--delta", type=Path, required=True, metavar="DIR", help="the delta")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model to write")
    verb.add_argument(
        "--force", action="store_true", help="replace a model that is there, once the new one is complete"
    )
    verb.add_argument("--dtype", choices=_DTYPES, help="of the weights that are written (default: the fine-tune's)")
    verb.set_defaults(run=_apply)


def _apply(args: argparse.Namespace) -> None:
    dtype = None if args.dtype is None else _DTYPES[args.dtype]
    with progress_bar("applying") as progress:
        apply_delta(args.base, args.delta, args.out, dtype=dtype, force=args.force, progress=progress)
    print(f"wrote {args.out}")
