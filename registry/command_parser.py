"""The parser of commands with subcommands, `python -m <package> <verb>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """A command's own `--help` begins with what the list of commands says of it, where it has nothing longer."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        about = options.get("help")
        if about is not None:
            options.setdefault("description", f"{about[0].upper()}{about[1:]}.")
        parser: argparse.ArgumentParser = super().add_parser(name, **options)
        return parser


class CommandParser(argparse.ArgumentParser):
    """Names a flag that it does not know.

    argparse takes what follows such a flag for the subcommand, and so complains of the flag's value: `--typo 1` is an
    invalid choice of a command, '1'. Subcommands are parsed by this class too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._commands: Mapping[str, object] = {}  # by name

    def add_subparsers(self, **options: Any) -> argparse._SubParsersAction[argparse.ArgumentParser]:  # type: ignore[override]
        commands: argparse._SubParsersAction[argparse.ArgumentParser] = super().add_subparsers(
            action=_Commands, **options
        )
        self._commands = commands.choices
        return commands

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        if self._commands:
            self._check_flags(args)
        return super().parse_known_args(args, namespace)

    def _check_flags(self, args: Sequence[str]) -> None:
        """Exit with an error if a flag before the subcommand is unknown."""
        for arg in args:
            if arg == "--" or arg in self._commands:
                return
            flag = arg.partition("=")[0]
            is_flag = flag.startswith("--") and " " not in flag  # else it is a value, as argparse has it
            if is_flag and not any(known.startswith(flag) for known in self._option_string_actions):
                self.error(f"unrecognized arguments: {flag}")
