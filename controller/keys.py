"""`python -m controller keys`: the API keys of the catalog."""

from __future__ import annotations

from collections.abc import Iterator

from controller.cli_actor import cli_actor
from registry.catalog import Catalog


def create_key(catalog: Catalog, name: str, *, admin: bool) -> str:
    """Make a key and return its text, which cannot be had again. Raises InvalidRequestError on a bad name."""
    _, plaintext = catalog.create_api_key(name, role="admin" if admin else "user", actor=cli_actor())
    return plaintext


def list_keys(catalog: Catalog) -> Iterator[str]:
    """One line for each key: id, beginning of its text, role, state, time of creation, name."""
    for key in catalog.list_api_keys():
        state = "active" if key.revoked_at is None else "revoked"
        created = key.created_at.isoformat(timespec="seconds")
        yield f"{key.id}  {key.prefix}…  {key.role:<5}  {state:<7}  {created}  {key.name}"


def revoke_key(catalog: Catalog, key_id: str) -> None:
    """Make a key invalid. Raises InvalidRequestError when there is none of that id."""
    catalog.revoke_api_key(key_id, actor=cli_actor())
