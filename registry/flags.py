"""Command-line flags generated from the fields of frozen config dataclasses, so that neither can drift."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def flag(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that `add_flags` turns into `--name-with-dashes`, without the unit `_s`.

    A bool becomes `--x / --no-x`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser: argparse.ArgumentParser, config: type, *, title: str | None = None) -> None:
    """Add a flag for each field of `config` made with `flag`; nested dataclasses become groups of their own."""
    group = parser.add_argument_group(title) if title else parser
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            add_flags(parser, kind, title=field.name.replace("_", " "))
            continue
        if "help" not in field.metadata:
            continue
        # `timeout_s` is `--timeout`: the unit is in the help.
        name = "--" + field.name.removesuffix("_s").replace("_", "-")
        shown = "" if field.default is None else f" (default: {_shown(field.default)})"
        text = field.metadata["help"].replace("%", "%%") + shown
        scalar = _scalar(kind)
        if scalar is bool:
            group.add_argument(
                name, dest=field.name, action=argparse.BooleanOptionalAction, default=field.default, help=text
            )
        else:
            group.add_argument(
                name, dest=field.name, type=scalar, default=field.default, help=text, choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else _metavar(field.name, scalar),
            )  # fmt: skip


def config_from_args(args: argparse.Namespace, config: type[T]) -> T:
    """Build `config` (nested dataclasses included) from parsed flags."""
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            values[field.name] = config_from_args(args, kind)
        elif "help" in field.metadata:
            values[field.name] = getattr(args, field.name)
    return config(**values)


_UNITS = {"_s": "SECONDS", "_gib": "GIB", "_bytes": "BYTES"}


def _metavar(name: str, scalar: type) -> str:
    """The unit that the field's name ends in, or else its type."""
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), scalar.__name__.upper())


def _shown(default: Any) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _scalar(kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind
