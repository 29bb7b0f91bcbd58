"""The named conversation templates that come with the project: `templates/<name>.jinja` and `templates.toml`."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from adapters.chat_template import ChatTemplate
from registry.errors import CheckpointError

_FOLDER = resources.files("adapters") / "templates"


@dataclass(frozen=True, slots=True)
class TemplateEntry:
    """What templates.toml says about one template."""

    name: str
    description: str
    stop: tuple[str, ...]
    default_system_message: str | None
    link: str | None


def template_entries() -> dict[str, TemplateEntry]:
    """All templates of the library by name, sorted."""
    tables = tomllib.loads((_FOLDER / "templates.toml").read_text(encoding="utf-8"))
    return {
        name: TemplateEntry(
            name=name,
            description=table["description"],
            stop=tuple(table.get("stop", ())),
            default_system_message=table.get("default_system_message"),
            link=table.get("link"),
        )
        for name, table in sorted(tables.items())
    }


def template_names() -> tuple[str, ...]:
    """The names that `load_named_template` takes."""
    return tuple(template_entries())


def load_named_template(name: str, *, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """A template of the library.

    Raises: CheckpointError for an unknown name.
    """
    entries = template_entries()
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise CheckpointError(
            f"there is no chat template named {name!r}; {hint}the names are {', '.join(entries)}", param="chat_template"
        )
    entry = entries[name]
    return ChatTemplate(
        name=name,
        source=(_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
        stop=entry.stop,
        special_tokens=dict(special_tokens or {}),
        default_system_message=entry.default_system_message,
    )


def load_template(name_or_file: str, *, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """What `--chat-template` takes: a name of the library, or a file with a Jinja template.

    Raises: CheckpointError when it is neither.
    """
    path = Path(name_or_file)
    if name_or_file not in template_names() and path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the chat template {path}: {error}", param="chat_template") from error
        return ChatTemplate(name=path.name, source=source, special_tokens=dict(special_tokens or {}))
    return load_named_template(name_or_file, special_tokens=special_tokens)
