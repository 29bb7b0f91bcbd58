"""`python -m controller`: serve; with `keys`, `variants` or `releases`: manage those of the catalog."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from controller.auth import keys_required
from controller.config import ControllerConfig
from controller.keys import create_key, list_keys, revoke_key
from controller.publishing.command_line import add_release_actions, manage_releases
from controller.server import serve
from controller.trusted_networks import is_loopback
from controller.variants.commands import add_variant, list_variants, pin_variant, remove_variant
from registry.catalog import Catalog
from registry.command_parser import CommandParser
from registry.errors import RootgraftError
from registry.flags import add_flags, config_from_args
from registry.paths import default_database_url, default_state_dir
from registry.standard_output import printing
from registry.store import Store

logger = logging.getLogger(__name__)

_Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DATABASE_HELP = "SQLAlchemy URL of the catalog (default: an SQLite file in the state directory)"

TOKEN_VARIABLE = "ROOTGRAFT_WORKER_TOKEN"


def create_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m controller",
        description="Serve the OpenAI-compatible API and route its requests to the model workers that register here.",
        allow_abbrev=False,
    )
    add_flags(parser, ControllerConfig)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    keys = commands.add_parser("keys", help="manage API keys", description="Manage the API keys of the catalog.")
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and print it; it is shown only this once")
    create.add_argument("--name", required=True, help="whose key it is")
    create.add_argument("--admin", action="store_true", help="the key may call /admin and /metrics too")
    listing = actions.add_parser("list", help="print id, name, kind and state of each key")
    revoke = actions.add_parser("revoke", help="make a key invalid, within seconds")
    revoke.add_argument("id", help="the key's id, as `list` prints it")
    for action in (create, listing, revoke, *_add_variant_actions(commands), *add_release_actions(commands)):
        action.add_argument("--database", default=argparse.SUPPRESS, help=_DATABASE_HELP)
    return parser


def _add_variant_actions(commands: _Subparsers) -> list[argparse.ArgumentParser]:
    about = "Manage the variants (LoRA adapters and deltas) that all workers of their base model should have."
    variants = commands.add_parser("variants", help="manage variants: LoRA adapters and deltas", description=about)
    actions = variants.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="want a variant; running controllers and workers follow within seconds")
    add.add_argument("name", help="public name, as clients give it in `model`")
    add.add_argument("--parent", required=True, help="name of its base model")
    add.add_argument("--path", required=True, help="its directory, below the workers' --adapter-root")
    add.add_argument("--pin", action="store_true", help="keep it ready to be used at once")
    add.add_argument("--replace", action="store_true", help="a variant of that name may be there; it is replaced")
    listing = actions.add_parser("list", help="print name, base model, pin, digest and path of each variant")
    named = [
        actions.add_parser("pin", help="keep it ready to be used at once"),
        actions.add_parser("unpin", help="let it be evicted again"),
        actions.add_parser("remove", help="want it no longer; its files stay"),
    ]
    for action in named:
        action.add_argument("name", help="public name of the variant")
    return [add, listing, *named]


def main(argv: Sequence[str] | None = None) -> int:
    args = create_parser().parse_args(argv)
    try:
        config = config_from_args(args, ControllerConfig)
        catalog = Catalog.open(config.server.database or default_database_url(os.environ))
        try:
            if args.command is None:
                _serve(config, catalog)
            else:
                with printing():
                    _manage(args, catalog)
        finally:
            catalog.close()
    except RootgraftError as error:
        print(f"controller: {error.message}", file=sys.stderr)
        return 1
    return 0


def _manage(args: argparse.Namespace, catalog: Catalog) -> None:
    match args.command:
        case "keys":
            _manage_keys(args, catalog)
        case "variants":
            _manage_variants(args, catalog)
        case "releases":
            for line in manage_releases(args, catalog):
                print(line)


def _manage_keys(args: argparse.Namespace, catalog: Catalog) -> None:
    match args.action:
        case "create":
            print(create_key(catalog, args.name, admin=args.admin))
        case "list":
            for line in list_keys(catalog):
                print(line)
        case "revoke":
            revoke_key(catalog, args.id)


def _manage_variants(args: argparse.Namespace, catalog: Catalog) -> None:
    match args.action:
        case "add":
            pinned, replace = args.pin, args.replace
            add_variant(catalog, args.name, parent=args.parent, path=args.path, pinned=pinned, replace=replace)
        case "list":
            for line in list_variants(catalog):
                print(line)
        case "pin" | "unpin":
            pin_variant(catalog, args.name, args.action == "pin")
        case "remove":
            remove_variant(catalog, args.name)


def _serve(config: ControllerConfig, catalog: Catalog) -> None:
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )  # fmt: skip
    if config.workers.worker_token is None and os.environ.get(TOKEN_VARIABLE):
        workers = dataclasses.replace(config.workers, worker_token=os.environ[TOKEN_VARIABLE])
        config = dataclasses.replace(config, workers=workers)
    if config.publishing.store is None:
        publishing = dataclasses.replace(config.publishing, store=str(default_state_dir(os.environ) / "store"))
        config = dataclasses.replace(config, publishing=publishing)
    else:
        Store(Path(config.publishing.store)).check_writable()  # rather now than when somebody publishes
    if not is_loopback(config.server.host) and not keys_required(config.auth, config.server.host):
        logger.warning("--auth off on %s: whoever reaches this address may use the models", config.server.host)
    serve(config, catalog)


if __name__ == "__main__":
    sys.exit(main())
