"""Aliases: movable names. Their journal is the audit log; what public names stand for is decided here."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from registry.catalog import schema
from registry.catalog.alias_records import alias_record
from registry.catalog.models import ModelOperations, name_not_found
from registry.catalog.records import Alias, AuditEntry, Canary, ModelRecord, VariantRecord, VersionRecord
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, parse_name

DEFAULT_ALIAS = "prod"
"""`name` alone is `name@prod` where `name` is a release."""

_TABLE = schema.aliases


class AliasOperations(ModelOperations):
    def set_alias(self, name: str, alias: str, target: ModelName, *, actor: str) -> Alias:
        """Make `name@alias` stand for `target`, in one step for every reader. A canary ends; a shadow of it, too.

        Raises:
            InvalidRequestError: name or alias do not fit the grammar, the target is an alias, or a version of another
                release or one that is not ready.
            ModelNotFoundError: the target does not exist now.
        """
        subject = ModelName(name, alias=alias)
        if target.alias is not None:
            raise InvalidRequestError(
                f"an alias points to a model, a version or a digest, not to {target}", param="target"
            )
        with self._write() as connection:
            self._check_target(connection, subject, target)
            before = self._alias(connection, subject)
            return self._move(connection, subject, before, target, "aliases.set", actor)

    def rollback_alias(self, name: str, alias: str, *, actor: str) -> Alias:
        """Point an alias of a release to what it pointed to before; another rollback goes back one further.

        Raises:
            ModelNotFoundError: there is no such alias.
            InvalidRequestError: it has pointed to nothing else that still exists.
        """
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._require_alias(connection, subject)
            for target in reversed(_earlier_targets(self._journal(connection, subject))):
                if target != before.target and self._is_ready(connection, target):
                    return self._move(connection, subject, before, target, "aliases.rollback", actor)
        raise InvalidRequestError(
            f"{subject} has pointed to nothing before {before.target} that still exists; see its history", param="alias"
        )

    def set_canary(self, name: str, alias: str, canary: Canary | None, *, actor: str) -> Alias:
        """Send a share of an alias's requests to another version; None: to none.

        Raises:
            ModelNotFoundError: there is no such alias or version.
            InvalidRequestError: the weight is not within 0 and 1, or the version is the target or not ready.
        """
        if canary is not None and not (math.isfinite(canary.weight) and 0.0 <= canary.weight <= 1.0):
            raise InvalidRequestError(f"a canary's weight is from 0 to 1, not {canary.weight}", param="weight")
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._require_alias(connection, subject)
            if canary is not None:
                self._check_beside(connection, before, canary.version)
            if canary == before.canary:
                return before
            values = {"canary_version": canary and canary.version, "canary_weight": canary and canary.weight}
            detail = {"from": _canary_text(before.canary), "to": _canary_text(canary)}
            return self._change(connection, subject, values, "aliases.canary", detail, actor)

    def abort_canary(self, name: str, alias: str, version: int, *, actor: str, reason: str) -> Alias:
        """Set the weight of the canary `version` to 0, unless the alias has another canary by now.

        Raises:
            ModelNotFoundError: there is no such alias.
        """
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._require_alias(connection, subject)
            if before.canary is None or before.canary.version != version or before.canary.weight == 0.0:
                return before
            detail = {"from": _canary_text(before.canary), "to": _canary_text(Canary(version, 0.0)), "reason": reason}
            return self._change(connection, subject, {"canary_weight": 0.0}, "aliases.canary_abort", detail, actor)

    def set_shadow(self, name: str, alias: str, version: int | None, *, actor: str) -> Alias:
        """Let another version be asked what the alias's target is asked; None: none.

        Raises:
            ModelNotFoundError: there is no such alias or version.
            InvalidRequestError: the version is the target or not ready.
        """
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._require_alias(connection, subject)
            if version is not None:
                self._check_beside(connection, before, version)
            if version == before.shadow:
                return before
            detail = {"from": _version_text(before.shadow), "to": _version_text(version)}
            return self._change(connection, subject, {"shadow_version": version}, "aliases.shadow", detail, actor)

    def remove_alias(self, name: str, alias: str, *, actor: str) -> None:
        """Raises ModelNotFoundError when there is no such alias."""
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._require_alias(connection, subject)
            connection.execute(delete(_TABLE).where(*_is_alias(subject)))
            self._audit(connection, actor, "aliases.remove", str(subject), {"from": str(before.target)})

    def alias_history(self, name: str, alias: str) -> list[AuditEntry]:
        """Every change of an alias, the newest first; it may be gone by now."""
        with self._read() as connection:
            return self._journal(connection, ModelName(name, alias=alias))[::-1]

    def list_aliases(self) -> list[Alias]:
        """All aliases by name."""
        with self._read() as connection:
            order = _TABLE.c.name, _TABLE.c.alias
            return [alias_record(row) for row in connection.execute(select(_TABLE).order_by(*order))]

    def resolve(self, name: ModelName) -> ModelRecord | VariantRecord:
        """The model or variant that a public name stands for now. A canary's share is the controller's to give.

        Raises:
            ModelNotFoundError: there is no such model, variant, alias or version, or it has another digest by now.
        """
        with self._read() as connection:
            return self._resolve(connection, name)

    # Within a transaction

    def _alias(self, connection: Connection, name: ModelName) -> Alias | None:
        row = connection.execute(select(_TABLE).where(*_is_alias(name))).one_or_none()
        return None if row is None else alias_record(row)

    def _require_alias(self, connection: Connection, name: ModelName) -> Alias:
        alias = self._alias(connection, name)
        if alias is None:
            raise name_not_found(name)
        return alias

    def _journal(self, connection: Connection, subject: ModelName) -> list[AuditEntry]:
        """The oldest first."""
        log = schema.audit_log
        statement = select(log).where(log.c.subject == str(subject), log.c.action.like("aliases.%")).order_by(log.c.id)
        return [AuditEntry(**row._mapping) for row in connection.execute(statement)]

    def _move(
        self,
        connection: Connection,
        subject: ModelName,
        before: Alias | None,
        target: ModelName,
        action: str,
        actor: str,
    ) -> Alias:
        shadow = None if before is None or before.shadow == target.version else before.shadow
        connection.execute(delete(_TABLE).where(*_is_alias(subject)))
        connection.execute(
            insert(_TABLE).values(
                name=subject.name, alias=subject.alias, target_name=target.name, target_digest=target.digest,
                target_version=target.version, shadow_version=shadow, updated_at=self._clock(),
            )
        )  # fmt: skip
        detail = {"from": None if before is None else str(before.target), "to": str(target)}
        self._audit(connection, actor, action, str(subject), detail)
        return self._require_alias(connection, subject)

    def _change(
        self,
        connection: Connection,
        subject: ModelName,
        values: dict[str, Any],
        action: str,
        detail: dict[str, Any],
        actor: str,
    ) -> Alias:
        connection.execute(update(_TABLE).where(*_is_alias(subject)).values(updated_at=self._clock(), **values))
        self._audit(connection, actor, action, str(subject), detail)
        return self._require_alias(connection, subject)

    def _check_target(self, connection: Connection, subject: ModelName, target: ModelName) -> None:
        if target.version is None:
            self._resolve(connection, target)
            return
        if target.name != subject.name:
            raise InvalidRequestError(
                f"{subject} can point to versions of {subject.name} only, not to {target}", param="target"
            )
        _check_ready(self._require_version(connection, target))

    def _check_beside(self, connection: Connection, alias: Alias, number: int) -> None:
        """Whether a version can be the canary or the shadow of `alias`."""
        if alias.target.version is None:
            raise InvalidRequestError(f"{alias.name}@{alias.alias} is no alias of a release", param="alias")
        if number == alias.target.version:
            raise InvalidRequestError(f"{alias.name}@{alias.alias} points to v{number} already", param="version")
        _check_ready(self._require_version(connection, ModelName(alias.name, version=number)))

    def _is_ready(self, connection: Connection, target: ModelName) -> bool:
        try:
            if target.version is None:
                self._resolve(connection, target)
                return True
            return self._require_version(connection, target).state == "ready"
        except ModelNotFoundError:
            return False

    def _resolve(self, connection: Connection, name: ModelName) -> ModelRecord | VariantRecord:
        if name.alias is not None:
            name = self._require_alias(connection, name).target
        if name.version is not None:
            return self._wanted_version(connection, name)
        record = self._variant(connection, name.name) or self._model(connection, name.name)
        if record is None and (versions := self._versions(connection, name.name)):
            return self._resolve_release(connection, name, versions)
        if record is None:
            raise name_not_found(name)
        if name.digest is not None and name.digest != record.digest:
            raise ModelNotFoundError(
                f"the model {str(name)!r} does not exist: {name.name} now has the digest {record.digest}", param="model"
            )
        return record

    def _resolve_release(
        self, connection: Connection, name: ModelName, versions: list[VersionRecord]
    ) -> ModelRecord | VariantRecord:
        if name.digest is None:
            return self._resolve(connection, ModelName(name.name, alias=DEFAULT_ALIAS))
        for version in versions:
            if version.digest == name.digest and version.state != "failed":
                return self._wanted_version(connection, ModelName(name.name, version=version.number))
        raise name_not_found(name)

    def _wanted_version(self, connection: Connection, name: ModelName) -> VariantRecord:
        record = self._variant(connection, str(name))
        if record is None:
            raise name_not_found(name)
        return record


def _earlier_targets(journal: list[AuditEntry]) -> list[ModelName]:
    """What an alias would point to after one rollback last, after two rollbacks before it, and so on.

    The journal is replayed: setting an alias puts a target on a stack, rolling back takes all down to its target.
    """
    stack: list[str] = []
    for entry in journal:
        if entry.action == "aliases.remove":
            stack.clear()
        if entry.action == "aliases.rollback" and entry.detail["to"] in stack:
            del stack[stack.index(entry.detail["to"]) + 1 :]
        elif entry.action in ("aliases.set", "aliases.rollback") and entry.detail["to"] not in stack[-1:]:
            stack.append(entry.detail["to"])
    return [parse_name(text) for text in stack[:-1]]


def _check_ready(version: VersionRecord) -> None:
    if version.state == "rolling_out":
        raise InvalidRequestError(
            f"{version.name} is still being rolled out; wait until a worker has loaded it and it has passed its probe",
            param="version",
        )
    if version.state == "failed":
        raise InvalidRequestError(
            f"{version.name} has failed ({version.error}); publish a version that works", param="version"
        )


def _is_alias(name: ModelName) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _TABLE.c.name == name.name, _TABLE.c.alias == name.alias


def _version_text(number: int | None) -> str | None:
    return None if number is None else f"v{number}"


def _canary_text(canary: Canary | None) -> str | None:
    return None if canary is None else f"v{canary.version} {canary.weight:g}"
