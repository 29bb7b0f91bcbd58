"""The flags of the verbs that make a delta, from a fine-tune or from what others store as differences."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

from delta.codecs.policy import CodecChoice


def add_making_flags(verb: argparse.ArgumentParser, *, codec: CodecChoice, codec_help: str) -> None:
    """--base, --out, --force, --codec with its default, --name and --license."""
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the delta to write")
    verb.add_argument(
        "--force", action="store_true", help="replace a delta that is there, once the new one is complete"
    )
    verb.add_argument(
        "--codec",
        choices=typing.get_args(CodecChoice),
        default=codec,
        help=f"{codec_help} (default: %(default)s)",
    )
    verb.add_argument("--name", metavar="NAME", help="name of the fine-tune (default: that of its directory or file)")
    verb.add_argument("--license", metavar="ID", help="license of the fine-tune")
