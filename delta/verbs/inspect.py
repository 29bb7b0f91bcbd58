"""`python -m delta inspect`: show what a delta holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from delta.artifact import open_delta
from delta.delta_table import delta_summary, delta_table
from registry.standard_output import printing


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser("inspect", help="show what a delta holds")
    verb.add_argument("delta", type=Path, metavar="DIR", help="the delta")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    with open_delta(args.delta) as delta:
        config = delta.config
    with printing():
        print(json.dumps(delta_summary(args.delta, config), indent=2) if args.json else delta_table(config))
