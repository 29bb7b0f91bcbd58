"""`python -m controller variants`: the variants of the catalog. Running controllers follow within seconds."""

from __future__ import annotations

from collections.abc import Iterator

from controller.cli_actor import cli_actor
from registry.catalog import Catalog
from registry.errors import ModelNotFoundError


def add_variant(catalog: Catalog, name: str, *, parent: str, path: str, pinned: bool, replace: bool) -> None:
    """Want a variant; whether workers can read it shows in `GET /admin/variants`.

    Raises:
        ModelNotFoundError: the catalog has no model `parent`.
        InvalidRequestError: as Catalog.add_variant.
    """
    models = [model.name for model in catalog.list_models()]
    if parent not in models:
        raise ModelNotFoundError(
            f"there is no model {parent[:200]!a} in the catalog, which has {', '.join(models) or 'none'}; "
            "a model is there once a worker has served it",
            param="parent",
        )
    catalog.add_variant(name, parent=parent, path=path, pinned=pinned, replace=replace, actor=cli_actor())


def list_variants(catalog: Catalog) -> Iterator[str]:
    """One line for each variant: name, base model, pin, digest, path."""
    for record in catalog.list_variants():
        pin = "pinned" if record.pinned else "-"
        digest = "not read yet" if record.digest is None else record.digest[:19]
        yield f"{record.name}  {record.parent}  {pin:<6}  {digest:<19}  {record.path}"


def pin_variant(catalog: Catalog, name: str, pinned: bool) -> None:
    """Raises ModelNotFoundError when there is none of that name."""
    catalog.pin_variant(name, pinned, actor=cli_actor())


def remove_variant(catalog: Catalog, name: str) -> None:
    """Raises: as Catalog.remove_variant."""
    catalog.remove_variant(name, actor=cli_actor())
