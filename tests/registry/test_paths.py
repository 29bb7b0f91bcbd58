from __future__ import annotations

from pathlib import Path

from registry.paths import default_cache_dir, default_database_url, default_state_dir


def test_xdg_goes_first() -> None:
    environment = {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s", "HOME": "/h"}
    assert default_cache_dir(environment) == Path("/c/rootgraft")
    assert default_state_dir(environment) == Path("/s/rootgraft")
    assert default_database_url(environment) == "sqlite:////s/rootgraft/catalog.sqlite3"


def test_home_otherwise() -> None:
    for environment in ({"HOME": "/h"}, {"HOME": "/h", "XDG_CACHE_HOME": "", "XDG_STATE_HOME": "relative"}):
        assert default_cache_dir(environment) == Path("/h/.cache/rootgraft")
        assert default_state_dir(environment) == Path("/h/.local/state/rootgraft")
    assert default_cache_dir({}).is_absolute()
