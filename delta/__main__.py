"""`python -m delta VERB`: full fine-tunes as deltas of their base model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from delta.verbs import apply, import_delta, inspect, make, merge, publish, sign, verify
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
    parser = CommandParser(prog="python -m delta", description="Full fine-tunes as deltas of their base model.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (make, apply, inspect, verify, sign, publish, import_delta, merge):
        verb.add_parser(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
