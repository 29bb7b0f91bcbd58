"""`python -m registry`: what exists, where it is, and whether it is intact."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from registry import commands
from registry.catalog import Catalog
from registry.command_parser import CommandParser
from registry.errors import RootgraftError
from registry.fetch import fetch_model
from registry.listing import format_listing, format_record
from registry.paths import default_cache_dir, default_database_url
from registry.progress import ByteProgress
from registry.standard_output import printing


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run one verb; returns the exit status: 0, or 1 with one line on stderr. Wrong usage exits with 2."""
    args = _parser(environment).parse_args(arguments)
    try:
        with printing():
            args.run(args)
    except RootgraftError as error:
        print(f"registry {args.verb}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"registry {args.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(environment: Mapping[str, str]) -> CommandParser:
    parser = CommandParser(prog="python -m registry", description="What exists, where it is, and whether it is intact.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    database = argparse.ArgumentParser(add_help=False)
    database.add_argument("--database", metavar="URL", default=default_database_url(environment),
                          help="the catalog: sqlite:////PATH or postgresql://... (default: %(default)s)")  # fmt: skip
    cache = argparse.ArgumentParser(add_help=False)
    cache.add_argument("--cache-dir", metavar="DIR", type=Path, default=default_cache_dir(environment),
                       help="where fetched models are kept (default: %(default)s)")  # fmt: skip
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    verb = verbs.add_parser("list", parents=[database, as_json],
                            help="list the catalog's models, known models and families")  # fmt: skip
    verb.set_defaults(run=_list)
    verb = verbs.add_parser("show", parents=[database, cache, as_json],
                            help="show what is known of a model or a family")  # fmt: skip
    verb.add_argument("name", metavar="NAME", help="of a model of the catalog, a known model, or a family")
    verb.set_defaults(run=_show)
    verb = verbs.add_parser("add", parents=[database], help="check a checkpoint and put it into the catalog")
    verb.add_argument("name", metavar="NAME", help="under which it is put there")
    verb.add_argument("path", metavar="PATH", type=Path, help="checkpoint directory, or a .gguf file")
    verb.add_argument("--source", metavar="TEXT", help="where the checkpoint came from")
    verb.add_argument("--chat-template", metavar="NAME", help="conversation template in place of the checkpoint's own")
    verb.add_argument("--max-model-len", metavar="TOKENS", type=_positive,
                      help="context limit in place of the checkpoint's own")  # fmt: skip
    verb.set_defaults(run=_add)
    verb = verbs.add_parser("fetch", parents=[cache], help="fetch a known model and print its path")
    verb.add_argument("name", metavar="NAME", help="of a known model; `list` names them")
    verb.set_defaults(run=_fetch)
    verb = verbs.add_parser("verify", parents=[database, cache, as_json],
                            help="check that a checkpoint is complete and undamaged")  # fmt: skip
    verb.add_argument("target", metavar="PATH|NAME", help="a checkpoint's path, or the name of a model")
    verb.add_argument("--full", action="store_true", help="read every byte and compare with the recorded digest")
    verb.set_defaults(run=_verify)
    return parser


def _list(args: argparse.Namespace) -> None:
    with _existing_catalog(args.database) as catalog:
        listing = commands.list_registry(catalog)
    _print(listing if args.json else format_listing(listing))


def _show(args: argparse.Namespace) -> None:
    with _existing_catalog(args.database) as catalog:
        found = commands.show(args.name, catalog, args.cache_dir)
    _print(found if args.json else format_record(found))


def _add(args: argparse.Namespace) -> None:
    with Catalog.open(args.database) as catalog:
        record = commands.add(
            args.name, args.path, catalog, actor=f"cli:{_user()}", source=args.source,
            chat_template=args.chat_template, max_model_len=args.max_model_len,
            progress=ByteProgress("reading", _say),
        )  # fmt: skip
    _print(f"added {record.name}: {record.family}, {record.digest}")


def _fetch(args: argparse.Namespace) -> None:
    _print(str(fetch_model(args.name, args.cache_dir, report=_say)))


def _verify(args: argparse.Namespace) -> None:
    with _existing_catalog(args.database) as catalog:
        report = commands.verify(
            args.target, catalog, args.cache_dir, full=args.full, progress=ByteProgress("reading", _say)
        )
    _print(report if args.json else format_record(report))


@contextmanager
def _existing_catalog(url: str) -> Iterator[Catalog | None]:
    """The catalog, or None where its SQLite file does not exist: looking at it should not create it."""
    if url.startswith("sqlite:///") and not Path(make_url(url).database or "/").exists():
        yield None
        return
    with Catalog.open(url) as catalog:
        yield catalog


def _print(value: Any) -> None:
    print(value if isinstance(value, str) else json.dumps(value, indent=2, default=str))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("give a positive number of tokens")
    return value


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        # A container may run under a user id that has no name.
        return str(os.getuid())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
