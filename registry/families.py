"""Model families and what we know about them, as data (`data/families.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from registry.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One architecture with its metadata.

    Attributes:
        name: our name of the family.
        model_types: the `model_type` values of config.json that belong to it.
        architectures: the `architectures` values of config.json that are its causal language model.
        capabilities: of "chat" and "completion"; empty when refused.
        context_length: the usual context of the family in tokens; a checkpoint's own config goes before it.
        chat_template: the conversation template used when a chat model of the family brings none, or None.
        link: where the family is described.
        licence: SPDX identifier, or the licence's own name.
        refused: the reason why the engine refuses it, or None when it is served.
        gguf_architectures: the `general.architecture` values of GGUF files that belong to it.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    capabilities: tuple[str, ...]
    context_length: int
    chat_template: str | None
    link: str
    licence: str
    refused: str | None
    gguf_architectures: tuple[str, ...] = ()


@cache
def families() -> Mapping[str, ModelFamily]:
    """All families by name, in the order of the data file."""
    table = tomllib.loads(resources.files("registry").joinpath("data/families.toml").read_text(encoding="utf-8"))
    reasons = table["reasons"]
    return MappingProxyType({name: _family(name, entry, reasons) for name, entry in table["families"].items()})


def find_family(model_type: str, architectures: Sequence[str]) -> ModelFamily:
    """The family of a config.json; a refused family is returned too, with its reason in `refused`.

    `architectures` may be empty. Where it is not, one of them must be the family's causal language model: a reward
    model or classifier shares the model_type and would load with its head missing.

    Raises:
        UnsupportedModelError: the model_type is unknown, or the architecture is no causal language model.
    """
    for family in families().values():
        if model_type in family.model_types:
            if architectures and family.refused is None and not set(architectures) & set(family.architectures):
                raise UnsupportedModelError(
                    f"architecture {', '.join(architectures)} is not supported: of {family.name} models only "
                    f"{', '.join(family.architectures)} can be served"
                )
            return family
    raise _unknown("model_type", model_type)


def find_family_of_gguf(architecture: str) -> ModelFamily:
    """The family of a GGUF file by its `general.architecture`; raises UnsupportedModelError when none has it."""
    for family in families().values():
        if architecture in family.gguf_architectures:
            return family
    raise _unknown("GGUF architecture", architecture)


def _unknown(what: str, value: str) -> UnsupportedModelError:
    served = ", ".join(family.name for family in families().values() if family.refused is None)
    return UnsupportedModelError(
        f"{what} {value!r} is unknown, and an unknown model may run and still give wrong tokens. Served are: {served}. "
        "`python -m registry list` shows all families; CONTRIBUTING.md says how to add one."
    )


def _family(name: str, entry: dict[str, object], reasons: dict[str, str]) -> ModelFamily:
    reason = entry.get("refused")
    return ModelFamily(
        name=name,
        model_types=_strings(entry["model_types"]),
        architectures=_strings(entry["architectures"]),
        capabilities=_strings(entry.get("capabilities", [])),
        context_length=int(str(entry["context_length"])),
        chat_template=str(entry["chat_template"]) if "chat_template" in entry else None,
        link=str(entry["link"]),
        licence=str(entry["licence"]),
        # A reason that many families share is written once, in [reasons].
        refused=None if reason is None else reasons.get(str(reason), str(reason)),
        gguf_architectures=_strings(entry.get("gguf_architectures", [])),
    )


def _strings(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(str(item) for item in value)
