"""Where rootgraft keeps its files by default (XDG base directories).

The environment is passed in by a process's `__main__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """Downloads and conversions, which can be made again: `$XDG_CACHE_HOME/rootgraft`, else ~/.cache/rootgraft."""
    return _xdg(environment, "XDG_CACHE_HOME", ".cache")


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """What must be kept: `$XDG_STATE_HOME/rootgraft`, else ~/.local/state/rootgraft."""
    return _xdg(environment, "XDG_STATE_HOME", ".local/state")


def default_database_url(environment: Mapping[str, str]) -> str:
    """The catalog's SQLite file in the state directory, as a URL."""
    return f"sqlite:///{default_state_dir(environment) / 'catalog.sqlite3'}"


def _xdg(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    value = environment.get(variable, "")
    # The specification: a relative path is invalid and ignored.
    if value.startswith("/"):
        return Path(value) / "rootgraft"
    home = environment.get("HOME", "")
    return (Path(home) if home else Path.home()) / below_home / "rootgraft"
