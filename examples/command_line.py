"""The options that the examples have in common, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from training import SMALL_MODEL, ExampleError

from registry.errors import RootgraftError


def parser(description: str, *, name: str, steps: int, text: Path) -> argparse.ArgumentParser:
    """Args:
    name, steps, text: the defaults.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--controller", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    options.add_argument("--api-key", metavar="KEY", help="(default: the environment variable OPENAI_API_KEY)")
    options.add_argument("--name", default=name, help="of what is published (default: %(default)s)")
    options.add_argument(
        "--base", default=SMALL_MODEL, metavar="NAME", help="of the served model (default: %(default)s)"
    )
    options.add_argument("--model-path", type=Path, metavar="DIR", help="its files (default: fetched into the cache)")
    options.add_argument(
        "--text", type=Path, default=text, metavar="FILE", help=f"pairs of question and answer (default: {text.name})"
    )
    options.add_argument("--steps", type=_count, default=steps, help="of training (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options.add_argument("--no-training", action="store_true", help="publish what an earlier run has saved")
    return options


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def say(line: str) -> None:
    print(line, flush=True)


def end_with_status(run: Callable[[], None]) -> int:
    """0, or 1 after an error in one line."""
    try:
        run()
    except ExampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RootgraftError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


def start(main: Callable[[Sequence[str], Mapping[str, str]], int]) -> None:
    """Run a script's `main` with the process's arguments and environment; Ctrl-C ends it without a traceback."""
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except KeyboardInterrupt:
        sys.exit(130)
