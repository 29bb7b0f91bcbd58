"""`python -m delta make --base B --target T --out D | apply --base B --delta D --out T | inspect D`"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delta.artifact import TENSORS_FILE, DeltaConfig, open_delta
from delta.make import make_delta
from delta.merge import merge_delta
from registry.command_parser import CommandParser
from registry.errors import RootgraftError


def main(arguments: Sequence[str]) -> int:
    """Run one verb; an error is one line on stderr and exit status 1."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except RootgraftError as error:
        print(f"delta {args.verb}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"delta {args.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m delta", description="Full fine-tunes as deltas of their base model"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("make", help="store what a fine-tune changed in its base")
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument("--target", type=Path, required=True, metavar="DIR", help="the fine-tune (safetensors)")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the delta to write; must not exist yet")
    verb.set_defaults(run=lambda args: make_delta(args.base, args.target, args.out, report=_report))
    verb = verbs.add_parser("apply", help="write the fine-tune that a delta and its base stand for")
    verb.add_argument("--base", type=Path, required=True, metavar="DIR", help="the base model (safetensors)")
    verb.add_argument("--delta", type=Path, required=True, metavar="DIR", help="the delta")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model to write; must not exist yet")
    verb.set_defaults(run=lambda args: merge_delta(args.base, args.delta, args.out, report=_report))
    verb = verbs.add_parser("inspect", help="show what a delta holds")
    verb.add_argument("delta", type=Path, metavar="DIR", help="the delta")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_inspect)
    return parser


def _report(line: str) -> None:
    print(line, flush=True)


def _inspect(args: argparse.Namespace) -> None:
    with open_delta(args.delta) as delta:
        summary = _summary(args.delta, delta.config)
    if args.json:
        print(json.dumps(summary, indent=2))
        return
    for key, value in summary.items():
        shown = ", ".join(f"{name} {count}" for name, count in value.items()) if isinstance(value, dict) else value
        print(f"{key.replace('_', ' '):16} {shown}")


def _summary(path: Path, config: DeltaConfig) -> dict[str, Any]:
    return {
        "base": config.base_digest,
        "target": config.target_digest,
        "tensors": len(config.base_tensors),
        "changed_tensors": len(config.tensors),
        "codecs": dict(sorted(Counter(tensor.codec for tensor in config.tensors.values()).items())),
        "tensor_bytes": (path / TENSORS_FILE).stat().st_size,
        "files": len(config.files),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
