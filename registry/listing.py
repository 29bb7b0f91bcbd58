"""Plain-text tables of what `registry.commands` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_listing(listing: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One table each for the catalog, the known models and the families."""
    models = [(m["name"], m["family"], m["digest"][:19], m["path"]) for m in listing["models"]]
    aliases = [(a["name"], a["target"]) for a in listing["aliases"]]
    engine = {f["name"]: "served" if f["refused"] is None else "refused" for f in listing["families"]}
    known = [
        (
            m["name"],
            m["family"],
            engine[m["family"]],
            str(m["context_length"]),
            m["licence"],
            "registry fetch" if m["fetch"] else "",
        )
        for m in listing["known_models"]
    ]
    families = [(f["name"], engine[f["name"]], str(f["context_length"]), f["licence"]) for f in listing["families"]]
    sections = [_section("Catalog", ("model", "family", "digest", "path"), models)]
    if aliases:
        sections.append(_section("Aliases", ("alias", "target"), aliases))
    sections.append(_section("Known models", ("model", "family", "engine", "context", "licence", "get it with"), known))
    sections.append(_section("Families", ("family", "engine", "context", "licence"), families))
    return "\n\n".join(sections)


def format_record(record: Mapping[str, Any], indent: str = "") -> str:
    """`key: value` lines; a mapping within is indented below its key, and what is None is left out."""
    lines: list[str] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", format_record(value, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{indent}{key}: {', '.join(str(item) for item in value)}")
        elif value is not None:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"{title}: empty"
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
             for row in (header, *rows)]  # fmt: skip
    return "\n".join([f"{title}:", *lines])
