"""`python -m delta verify`: check that a delta is whole, and belongs to a base."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any

from delta.fine_tune_files import is_delta
from delta.progress_bar import progress_bar
from delta.verify import NUM_SAMPLES, Level, verify_delta


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser("verify", help="check that a delta is whole and fits its base")
    verb.add_argument(
        "delta", type=Path, metavar="DIR", help="the delta; with --public-key and without --base also a LoRA adapter"
    )
    verb.add_argument("--base", type=Path, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument(
        "--level",
        choices=typing.get_args(Level),
        default="full",
        help="header: names, shapes and sizes; sampled: also the data of some tensors; full: all data, and with --base "
        "that the delta gives back what it promises (default: %(default)s)",
    )
    verb.add_argument(
        "--public-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="it must be signed with the private key of this one (PEM); may be repeated: with one of them",
    )
    verb.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    if args.public_key:
        # The packages that it needs are optional.
        from delta.signature import SignatureVerifier

        key = SignatureVerifier(args.public_key).verify(args.delta)
        print(f"{args.delta} is signed with the key of {key}")
        if args.base is None and not is_delta(args.delta):
            return
    with progress_bar("verifying") as progress:
        verify_delta(args.delta, args.base, level=args.level, progress=progress)
    print(_found(args.delta, args.base, args.level))


def _found(delta: Path, base: Path | None, level: Level) -> str:
    """No more than was looked at."""
    if level == "header":
        beside = "" if base is None else f" and those of {base} match"
        return f"{delta}: names, shapes and sizes are right{beside}; no data was read"
    sampled = f", as far as {NUM_SAMPLES} tensors tell" if level == "sampled" else ""
    return f"{delta} is whole" + ("" if base is None else f" and belongs to {base}") + sampled
