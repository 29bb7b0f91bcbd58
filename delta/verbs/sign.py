"""`python -m delta sign`: sign the files of a delta or a LoRA adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from delta.publish import SIGNATURE_FILE


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser("sign", help="sign the files of a delta or a LoRA adapter")
    verb.add_argument("directory", type=Path, metavar="DIR", help="the delta, or the adapter in PEFT's format")
    verb.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="private key (PEM) of an elliptic curve, no password"
    )
    verb.set_defaults(run=_sign)


def _sign(args: argparse.Namespace) -> None:
    # The packages that it needs are optional.
    from delta.signature import sign

    is_new = sign(args.directory, args.key)
    print(f"wrote {args.directory / SIGNATURE_FILE}" if is_new else f"{args.directory} is signed with this key already")
