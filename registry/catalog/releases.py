"""Releases: fine-tunes that are published version by version. A version is a variant that its base's workers have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from registry.catalog import schema
from registry.catalog.alias_records import alias_record
from registry.catalog.records import Alias, Release, VersionRecord
from registry.catalog.variants import VariantOperations
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import MAX_NAME_LENGTH, ModelName
from registry.published_files import PublishedFiles

_RELEASES, _VERSIONS, _VARIANTS = schema.releases, schema.versions, schema.variants


class ReleaseOperations(VariantOperations):
    def add_version(
        self,
        release: str,
        *,
        parent: str,
        files: PublishedFiles,
        actor: str,
        quality: Mapping[str, Any] | None = None,
    ) -> VersionRecord:
        """A new version, which all workers of `parent` should have from now on; the first one makes the release.

        The same files for the same base are the same version: it is given back, and tried again if it had failed.

        Raises:
            InvalidRequestError: a name does not fit the grammar or is too long, or a model or a variant has it.
        """
        release, parent = ModelName(release).name, ModelName(parent).name
        with self._write() as connection:
            self._refuse_taken(connection, release, by={"model": schema.models, "variant": _VARIANTS})
            for version in self._versions(connection, release):
                if (version.files, version.parent) == (files.digests, parent):
                    if version.state == "failed":
                        version = self._set_state(connection, version, "rolling_out", None, actor)
                        self._want(connection, version)
                    return version
            version = self._new_version(connection, release, parent, files, quality, actor)
            self._want(connection, version)
            detail = {"kind": version.kind, "parent": parent, "digest": version.digest}
            self._audit(connection, actor, "versions.add", version.name, detail)
            return version

    def set_version_state(
        self, name: ModelName, state: Literal["ready", "failed"], *, actor: str, error: str | None = None
    ) -> VersionRecord:
        """Note what came of rolling out a version; one that is not being rolled out stays as it is.

        Raises:
            ModelNotFoundError: there is no such version.
        """
        with self._write() as connection:
            version = self._require_version(connection, name)
            if version.state != "rolling_out":
                return version
            if state == "failed":
                connection.execute(delete(_VARIANTS).where(_VARIANTS.c.name == version.name))
            return self._set_state(connection, version, state, error, actor)

    def remove_version(self, name: ModelName, *, actor: str) -> VersionRecord:
        """Forget a version; the release goes with its last one. -> what was known of it

        Raises:
            ModelNotFoundError: there is no such version.
            InvalidRequestError: an alias points to it, as its target, canary or shadow.
        """
        with self._write() as connection:
            version = self._require_version(connection, name)
            for alias in self._aliases_of(connection, name.name):
                if version.number in (alias.target.version, alias.canary and alias.canary.version, alias.shadow):
                    raise InvalidRequestError(
                        f"{version.name} is used by the alias {alias.name}@{alias.alias}; move or remove that first",
                        param="version",
                    )
            connection.execute(delete(_VARIANTS).where(_VARIANTS.c.name == version.name))
            connection.execute(delete(_VERSIONS).where(*_is_version(version.release, version.number)))
            if not self._versions(connection, version.release):
                connection.execute(delete(_RELEASES).where(_RELEASES.c.name == version.release))
            detail = {"parent": version.parent, "digest": version.digest}
            self._audit(connection, actor, "versions.remove", version.name, detail)
            return version

    def get_version(self, name: ModelName) -> VersionRecord:
        """Raises ModelNotFoundError when there is none of that name and number."""
        with self._read() as connection:
            return self._require_version(connection, name)

    def get_release(self, name: str) -> Release:
        """Raises ModelNotFoundError when there is none of that name."""
        with self._read() as connection:
            row = connection.execute(select(_RELEASES).where(_RELEASES.c.name == name)).one_or_none()
            if row is None:
                raise ModelNotFoundError(f"the release {name[:200]!a} does not exist; list the releases", param="name")
            versions, aliases = self._versions(connection, name), self._aliases_of(connection, name)
            return Release(row.name, row.created_at, tuple(versions), tuple(aliases))

    def list_releases(self) -> list[Release]:
        """All releases by name."""
        with self._read() as connection:
            rows = connection.execute(select(_RELEASES).order_by(_RELEASES.c.name)).all()
            return [
                Release(
                    row.name,
                    row.created_at,
                    tuple(self._versions(connection, row.name)),
                    tuple(self._aliases_of(connection, row.name)),
                )
                for row in rows
            ]

    def published_digests(self) -> set[str]:
        """Of all files of all versions, the failed ones too."""
        with self._read() as connection:
            return {digest for row in connection.execute(select(_VERSIONS.c.files)) for digest in row.files.values()}

    # Within a transaction

    def _new_version(
        self,
        connection: Connection,
        release: str,
        parent: str,
        files: PublishedFiles,
        quality: Mapping[str, Any] | None,
        actor: str,
    ) -> VersionRecord:
        now = self._clock()
        known = connection.execute(select(_RELEASES).where(_RELEASES.c.name == release)).one_or_none()
        number = 1 if known is None else known.last_number + 1
        if len(str(ModelName(release, version=number))) > MAX_NAME_LENGTH:
            raise InvalidRequestError(f"{release[:80]}… is too long a name for a release", param="name")
        if known is None:
            connection.execute(insert(_RELEASES).values(name=release, last_number=number, created_at=now))
        else:
            connection.execute(update(_RELEASES).where(_RELEASES.c.name == release).values(last_number=number))
        values: dict[str, Any] = {
            "release": release, "number": number, "kind": files.kind, "parent": parent,
            "digest": files.artifact_digest, "files": dict(files.digests),
            "quality": None if quality is None else dict(quality), "state": "rolling_out", "error": None,
            "created_by": actor, "created_at": now, "updated_at": now,
        }  # fmt: skip
        connection.execute(insert(_VERSIONS).values(**values))
        return VersionRecord(**values)

    def _want(self, connection: Connection, version: VersionRecord) -> None:
        now = self._clock()
        connection.execute(
            insert(_VARIANTS).values(
                name=version.name, parent=version.parent, digest=None, pinned=False,
                path=PublishedFiles(version.files).manifest_digest, files=dict(version.files),
                created_at=now, updated_at=now,
            )
        )  # fmt: skip

    def _set_state(
        self, connection: Connection, version: VersionRecord, state: str, error: str | None, actor: str
    ) -> VersionRecord:
        values = {"state": state, "error": error, "updated_at": self._clock()}
        connection.execute(update(_VERSIONS).where(*_is_version(version.release, version.number)).values(**values))
        detail = {"from": version.state, "to": state} | ({} if error is None else {"error": error})
        self._audit(connection, actor, "versions.state", version.name, detail)
        return self._require_version(connection, ModelName(version.release, version=version.number))

    def _versions(self, connection: Connection, release: str) -> list[VersionRecord]:
        statement = select(_VERSIONS).where(_VERSIONS.c.release == release).order_by(_VERSIONS.c.number)
        return [VersionRecord(**row._mapping) for row in connection.execute(statement)]

    def _require_version(self, connection: Connection, name: ModelName) -> VersionRecord:
        found = None
        if name.version is not None:
            statement = select(_VERSIONS).where(*_is_version(name.name, name.version))
            found = connection.execute(statement).one_or_none()
        if found is None:
            raise ModelNotFoundError(f"there is no version {str(name)!r}; list the releases", param="version")
        return VersionRecord(**found._mapping)

    def _aliases_of(self, connection: Connection, release: str) -> list[Alias]:
        table = schema.aliases
        statement = select(table).where(table.c.name == release).order_by(table.c.alias)
        return [alias_record(row) for row in connection.execute(statement)]


def _is_version(release: str, number: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _VERSIONS.c.release == release, _VERSIONS.c.number == number
