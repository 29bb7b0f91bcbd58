"""`python -m delta import`: make a delta of what others store as differences."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delta.checkpoint_tensors import open_checkpoint
from delta.codecs.policy import CodecPolicy
from delta.delta_table import delta_table
from delta.imports.bitdelta import BitDeltaChanges
from delta.imports.weight_difference import WeightDifferences
from delta.imports.write_import import Changes, write_import
from delta.make import Labels
from delta.progress_bar import progress_bar
from delta.verbs.making_flags import add_making_flags
from registry.errors import InvalidRequestError


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "import", help="make a delta of BitDelta's diff.pt, FastChat's weight differences or a LoRA adapter"
    )
    verb.add_argument("kind", choices=_OPENERS, help="what is imported")
    verb.add_argument(
        "source", type=Path, metavar="PATH", help="diff.pt, the directory of differences, or the adapter's"
    )
    add_making_flags(verb, codec="lossless", codec_help="of matrices that the source holds whole")
    verb.add_argument(
        "--files",
        type=Path,
        metavar="DIR",
        help="of the fine-tune's config and tokenizer (default: the source's or base's)",
    )
    verb.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> None:
    paths = {"the source": args.source, "the base (--base)": args.base, "--files": args.files}
    if missing := [f"{what} {path}" for what, path in paths.items() if path is not None and not path.exists()]:
        raise InvalidRequestError(f"there is no such file or directory: {', '.join(missing)}")
    labels = Labels(target_name=args.name or args.source.resolve().name, license=args.license)
    # The configuration beside an adapter or a diff.pt is not that of a model.
    files = args.source if args.files is None and args.kind == "fastchat" else args.files
    with _OPENERS[args.kind](args.source, args.base) as changes, progress_bar("importing") as progress:
        config = write_import(
            args.base,
            changes,
            args.out,
            CodecPolicy(args.codec),
            files_from=files,
            labels=labels,
            force=args.force,
            progress=progress,
        )
    print(delta_table(config))
    print(f"wrote {args.out}")


@contextmanager
def _bitdelta(source: Path, base: Path) -> Iterator[Changes]:
    yield BitDeltaChanges(source)


@contextmanager
def _fastchat(source: Path, base: Path) -> Iterator[Changes]:
    with open_checkpoint(source) as tensors:
        yield WeightDifferences(tensors)


@contextmanager
def _peft(source: Path, base: Path) -> Iterator[Changes]:
    # It imports transformers' models, which takes as long as the work itself.
    from delta.imports.peft_adapter import read_adapter

    with open_checkpoint(base) as tensors:
        yield read_adapter(source, tensors)


_OPENERS: Mapping[str, Callable[[Path, Path], Any]] = {"bitdelta": _bitdelta, "fastchat": _fastchat, "peft": _peft}
