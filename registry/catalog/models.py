"""The models that can be served."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from registry.catalog import schema
from registry.catalog.records import ModelRecord
from registry.catalog.releases import ReleaseOperations
from registry.catalog.transactions import changes
from registry.errors import ModelNotFoundError
from registry.names import ModelName


class ModelOperations(ReleaseOperations):
    def upsert_model(
        self,
        name: str,
        *,
        family: str,
        digest: str,
        path: str,
        actor: str,
        kind: Literal["base"] = "base",
        source: str | None = None,
        chat_template: str | None = None,
        max_model_len: int | None = None,
    ) -> ModelRecord:
        """Add the model, or replace what is known of it; its time of creation stays.

        Raises:
            InvalidRequestError: name or digest do not fit the grammar, or a variant or a release has the name.
        """
        name = ModelName(name, digest=digest).name
        values: dict[str, Any] = {
            "kind": kind, "family": family, "digest": digest, "path": path, "source": source,
            "chat_template": chat_template, "max_model_len": max_model_len,
        }  # fmt: skip
        with self._write() as connection:
            now = self._clock()
            self._refuse_taken(connection, name, by={"variant": schema.variants, "release": schema.releases})
            before = self._model(connection, name)
            if before is None:
                connection.execute(insert(schema.models).values(name=name, created_at=now, updated_at=now, **values))
                detail: dict[str, Any] = values
            else:
                statement = update(schema.models).where(schema.models.c.name == name)
                connection.execute(statement.values(updated_at=now, **values))
                detail = changes(before, values)
            self._audit(connection, actor, "models.add" if before is None else "models.update", name, detail)
            record = self._model(connection, name)
        assert record is not None
        return record

    def get_model(self, name: str) -> ModelRecord:
        """Raises ModelNotFoundError when there is none of that name."""
        with self._read() as connection:
            return self._require_model(connection, name)

    def list_models(self) -> list[ModelRecord]:
        """All models by name."""
        with self._read() as connection:
            rows = connection.execute(select(schema.models).order_by(schema.models.c.name))
            return [ModelRecord(**row._mapping) for row in rows]

    def _model(self, connection: Connection, name: str) -> ModelRecord | None:
        row = connection.execute(select(schema.models).where(schema.models.c.name == name)).one_or_none()
        return None if row is None else ModelRecord(**row._mapping)

    def _require_model(self, connection: Connection, name: str) -> ModelRecord:
        record = self._model(connection, name)
        if record is None:
            raise name_not_found(ModelName(name))
        return record


def name_not_found(name: ModelName) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {str(name)!r} does not exist; list the models to see what does", param="model"
    )
