"""Frozen dataclasses to JSON objects and back, strictly: exactly their fields, of exactly their types."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

R = TypeVar("R")


def to_record(value: Any) -> Any:
    """What `json.dumps` can write; keys of mappings are sorted."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_record(item) for key, item in sorted(value.items())}
    if isinstance(value, tuple):
        return [to_record(item) for item in value]
    return value


def from_record(cls: type[R], value: object, where: str) -> R:
    """A dataclass of str, int, finite float, bool, `X | None`, `tuple[X, ...]`, `Mapping[str, X]` and dataclasses.

    Args:
        where: what `value` is, for messages.

    Raises:
        ValueError: another type, a field that is missing or unknown, or one that `cls` itself refuses.
    """
    result = _read(cls, value, where)
    assert isinstance(result, cls)
    return result


def _read(kind: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple:
        items = _instance(list, value, where)
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        entries = _instance(dict, value, where)
        return {key: _read(arguments[1], item, f"{where}[{key!r}]") for key, item in entries.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(Callable[..., Any], kind), value, where)
    if kind is float and type(value) in (int, float):
        number = float(typing.cast(float, value))
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}, which is no finite number")
        return number
    if type(value) is not kind:
        raise ValueError(f"{where} is no {kind.__name__}: {value!r:.80}")
    return value


def _read_dataclass(cls: Callable[..., Any], value: object, where: str) -> Any:
    given = _instance(dict, value, where)
    hints = _types_of_fields(cls)
    if unknown := sorted(given.keys() - hints.keys()):
        raise ValueError(f"{where} has unknown fields {unknown}")
    if missing := sorted(hints.keys() - given.keys()):
        raise ValueError(f"{where} lacks the fields {missing}")
    try:
        return cls(**{name: _read(kind, given[name], f"{where}.{name}") for name, kind in hints.items()})
    except OverflowError as error:
        raise ValueError(f"{where} has a number that is too large") from error


@functools.cache
def _types_of_fields(cls: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _instance(kind: type[R], value: object, where: str) -> R:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is no {'object' if kind is dict else 'list'}")
    return value
