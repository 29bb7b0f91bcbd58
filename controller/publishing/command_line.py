"""`python -m controller releases`: the releases of the catalog. Running controllers and workers follow within seconds.

Fine-tunes are published with `python -m delta publish`, which needs a running controller.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from controller.cli_actor import cli_actor
from registry.catalog import DEFAULT_ALIAS, Alias, Canary, Catalog, VersionRecord
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, parse_name


def add_release_actions(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to a parser's. -> the parsers of its actions"""
    about = "Manage releases: published fine-tunes, version by version, and the aliases that point to them."
    releases = commands.add_parser("releases", help="manage releases: published fine-tunes", description=about)
    actions = releases.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="print each release with its aliases")
    show = actions.add_parser("show", help="print the versions and aliases of a release")
    show.add_argument("name", help="of the release")
    history = actions.add_parser("history", help="print who moved an alias when, from where to where")
    alias = actions.add_parser("alias", help="point an alias to a version")
    canary = actions.add_parser("canary", help="give a share of an alias's requests to another version")
    shadow = actions.add_parser("shadow", help="let another version be asked the same, and compare its answers")
    rollback = actions.add_parser("rollback", help="point an alias to the version that it pointed to before")
    for action in (history, alias, canary, shadow, rollback):
        action.add_argument("name", help=f"NAME@ALIAS; NAME alone is NAME@{DEFAULT_ALIAS}")
    alias.add_argument("version", help="vN; `none` removes the alias")
    canary.add_argument("version", help="vN; `none` ends it")
    canary.add_argument("weight", nargs="?", type=float, help="share of the requests, 0 to 1; not needed to end it")
    shadow.add_argument("version", help="vN; `none` ends it")
    remove = actions.add_parser("remove", help="forget a version that no alias uses")
    remove.add_argument("name", help="NAME@vN")
    return [listing, show, history, alias, canary, shadow, rollback, remove]


def manage_releases(args: argparse.Namespace, catalog: Catalog) -> Iterator[str]:
    """Carry out an action; yields the lines that it prints.

    Raises:
        RootgraftError: as the catalog's operations.
    """
    if args.action == "list":
        for release in catalog.list_releases():
            aliases = ", ".join(_alias_text(alias) for alias in release.aliases) or "no alias"
            yield f"{release.name}  {len(release.versions)} versions  {aliases}"
        return
    if args.action == "show":
        release = catalog.get_release(args.name)
        yield from (_version_text(version) for version in release.versions)
        yield from (_alias_text(alias) for alias in release.aliases)
        return
    if args.action == "remove":
        yield f"{catalog.remove_version(parse_name(args.name), actor=cli_actor()).name} is removed"
        return
    name, alias = _parse_alias(args.name)
    if args.action == "history":
        entries = catalog.alias_history(name, alias)
        if not entries:
            raise ModelNotFoundError(f"there never was an alias {name}@{alias}; list the releases", param="name")
        for entry in entries:
            detail = entry.detail
            reason = f"  ({detail['reason']})" if "reason" in detail else ""
            move = f"{entry.action.removeprefix('aliases.')}  {detail.get('from')} -> {detail.get('to')}"
            yield f"{entry.at:%Y-%m-%d %H:%M:%S}  {entry.actor}  {move}{reason}"
        return
    yield _alias_text(_change(args, catalog, name, alias))


def _change(args: argparse.Namespace, catalog: Catalog, name: str, alias: str) -> Alias | None:
    actor = cli_actor()
    if args.action == "rollback":
        return catalog.rollback_alias(name, alias, actor=actor)
    version = _parse_version(args.version)
    match args.action:
        case "alias" if version is None:
            catalog.remove_alias(name, alias, actor=actor)
            return None
        case "alias":
            return catalog.set_alias(name, alias, ModelName(name, version=version), actor=actor)
        case "canary":
            if version is not None and args.weight is None:
                raise InvalidRequestError("a canary needs a weight: its share of the requests, 0 to 1")
            canary = None if version is None else Canary(version, args.weight)
            return catalog.set_canary(name, alias, canary, actor=actor)
    return catalog.set_shadow(name, alias, version, actor=actor)


def _parse_alias(text: str) -> tuple[str, str]:
    name = parse_name(text)
    if name.version is not None or name.digest is not None:
        raise InvalidRequestError(f"{text} is a version; give NAME@ALIAS, or NAME for NAME@{DEFAULT_ALIAS}")
    return name.name, name.alias or DEFAULT_ALIAS


def _parse_version(text: str) -> int | None:
    if text == "none":
        return None
    if not re.fullmatch(r"v?[1-9][0-9]{0,8}", text):
        raise InvalidRequestError(f"{text!r} is no version: give v and its number, or none")
    return int(text.removeprefix("v"))


def _version_text(version: VersionRecord) -> str:
    error = "" if version.error is None else f"  {version.error}"
    made = f"{version.created_at:%Y-%m-%d %H:%M:%S} by {version.created_by}"
    return f"{version.name}  {version.kind}  {version.state}  {version.parent}  {version.digest[:19]}  {made}{error}"


def _alias_text(alias: Alias | None) -> str:
    if alias is None:
        return "the alias is removed"
    text = f"{alias.name}@{alias.alias} -> {alias.target}"
    if alias.canary is not None:
        text += f", canary v{alias.canary.version} {alias.canary.weight:.0%}"
    return text if alias.shadow is None else f"{text}, shadow v{alias.shadow}"
