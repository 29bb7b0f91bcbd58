"""What the controller asks of the catalog, whose calls block: they run in threads, and answers are cached briefly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from controller.auth import Principal
from controller.protocol import ServedModel
from controller.served_names import ResolveName, ServedName
from controller.ttl_cache import TTLCache
from registry.catalog import Catalog, VariantRecord
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import parse_name

logger = logging.getLogger(__name__)

NAME_CACHE_S = 2.0  # how long a moved alias may still lead to where it was
_NAME_CACHE_ENTRIES = 4096
_NO_PATH = ""  # of a model that the catalog knows from its worker only


def find_principal(catalog: Catalog) -> Callable[[str], Principal | None]:
    """A blocking look-up of API keys by their text, for `Authenticator`."""

    def find(plaintext: str) -> Principal | None:
        key = catalog.find_api_key(plaintext)
        return None if key is None else Principal(key.id, key.name, admin=key.role == "admin")

    return find


def name_resolver(catalog: Catalog, *, clock: Callable[[], float]) -> ResolveName:
    """A function from a public name (alias, digest) to what workers serve; None where there is none."""
    cache: TTLCache[str, ServedName | None] = TTLCache(ttl_s=NAME_CACHE_S, max_entries=_NAME_CACHE_ENTRIES, clock=clock)

    def look_up(name: str) -> ServedName | None:
        try:
            record = catalog.resolve(parse_name(name))
        except (InvalidRequestError, ModelNotFoundError):
            return None  # the gateway's error lists the models that there are
        return ServedName(record.name, record.parent if isinstance(record, VariantRecord) else None)

    async def resolve(name: str) -> ServedName | None:
        return await cache.get(name, lambda: asyncio.to_thread(look_up, name))

    return resolve


async def record_models(catalog: Catalog, models: Sequence[ServedModel], *, worker_id: str) -> dict[str, int]:
    """Note in the catalog what a worker serves; returns since when (Unix time, seconds) each name is known there.

    A model that an operator added stays as it is: the worker knows less of it. One without a digest has no identity, so
    it is served but not recorded.

    Raises:
        InvalidRequestError: a name or a digest does not fit the grammar.
        InternalError: the database fails.
    """

    def record() -> dict[str, int]:
        return {
            model.name: created
            for model in models
            if (created := _record_model(catalog, model, f"worker:{worker_id}")) is not None
        }

    return await asyncio.to_thread(record)


def _record_model(catalog: Catalog, model: ServedModel, actor: str) -> int | None:
    name = parse_name(model.name)
    if str(name) != name.name:
        raise InvalidRequestError(f"{model.name!r} is a reference; a worker serves a plain name", param="models")
    try:
        known = catalog.get_model(name.name)
    except ModelNotFoundError:
        known = None
    if known is not None and (model.digest is None or known.digest == model.digest):
        return int(known.created_at.timestamp())
    if known is not None and known.path != _NO_PATH:
        logger.warning("%s serves %s as %s, the catalog has %s", actor, model.name, model.digest, known.digest)
        return int(known.created_at.timestamp())
    if model.digest is None:
        return None
    added = catalog.upsert_model(name.name, family=model.family, digest=model.digest, path=_NO_PATH, actor=actor)
    return int(added.created_at.timestamp())
