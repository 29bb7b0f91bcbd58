"""`python -m delta publish`: make a fine-tune a version of a release that running workers serve."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from delta.codecs.policy import CodecPolicy
from delta.delta_config import CONFIG_FILE, read_delta_config
from delta.make import Labels
from delta.progress_bar import progress_bar
from delta.publish import Publication, publish
from delta.quality_prompts import default_prompts, read_prompts
from delta.temporary_directory import temporary_directory
from delta.verify import check_target, verify_delta
from registry.errors import InvalidRequestError
from registry.names import ModelName

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "ROOTGRAFT_API_KEY"


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser(
        "publish", help="upload a fine-tune as a new version of a release, roll it out, and point an alias to it"
    )
    verb.add_argument("--name", required=True, help="of the release: what clients give as `model`")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--target", type=Path, metavar="DIR", help="a full fine-tune; its delta from --base is made first"
    )
    what.add_argument("--delta", type=Path, metavar="DIR", help="a delta that was made before")
    what.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter in PEFT's format")
    verb.add_argument(
        "--base", type=Path, metavar="DIR", help="the base model (safetensors); a delta is compared with it"
    )
    verb.add_argument("--out", type=Path, metavar="DIR", help="where to keep the delta of --target (default: nowhere)")
    verb.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON array of texts or conversations over which the delta of --target is measured",
    )
    verb.add_argument(
        "--sign-key",
        type=Path,
        metavar="FILE",
        help="sign the files first, with this private key (PEM); a signature of it that holds is kept",
    )
    verb.add_argument("--parent", metavar="NAME", help="served name of the base (default: found by its digest)")
    verb.add_argument("--url", default=DEFAULT_URL, help="of the controller (default: %(default)s)")
    verb.add_argument(
        "--key-file", type=Path, metavar="FILE", help=f"holds an admin key (default: the environment's {KEY_VARIABLE})"
    )
    alias = verb.add_mutually_exclusive_group()
    alias.add_argument("--alias", default="prod", help="to point to the version (default: %(default)s)")
    alias.add_argument("--no-alias", action="store_true", help="point none to it: it is served as NAME@vN only")
    verb.add_argument(
        "--canary", type=float, metavar="WEIGHT", help="share of the alias's requests that it gets, 0 to 1, not all"
    )
    verb.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="to wait for workers (default: %(default)s)"
    )
    verb.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> None:
    _check(args)
    key = os.environ.get(KEY_VARIABLE) or None if args.key_file is None else _read_key(args.key_file)
    with ExitStack() as held:
        directory = args.adapter or args.delta or _made(args, held)
        base_digest = quality = None
        if (directory / CONFIG_FILE).is_file():
            config = read_delta_config(directory)
            base_digest = config.base.digest
            quality = None if config.quality is None else asdict(config.quality)
            if args.target is None:  # what was just made has been verified
                with progress_bar("verifying") as progress:
                    verify_delta(directory, args.base, progress=progress)
        if args.sign_key is not None:
            # The packages that it needs are optional.
            from delta.signature import sign

            sign(directory, args.sign_key)
        publication = Publication(
            args.name, directory, args.parent, base_digest, quality, None if args.no_alias else args.alias, args.canary
        )
        name = publish(
            publication, args.url, key=key, timeout_s=args.timeout, report=_report, progress_bar=progress_bar
        )
    _report(f"published: {name}")


def _check(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError: flags that contradict each other, or a value that cannot be."""
    ModelName(args.name, alias=None if args.no_alias else args.alias)
    if not _is_http_url(args.url):
        raise InvalidRequestError(f"--url is that of the controller, such as {DEFAULT_URL}, not {args.url!r}")
    if not (args.timeout > 0 and math.isfinite(args.timeout)):
        raise InvalidRequestError(f"--timeout is a number of seconds above 0, not {args.timeout}")
    if args.canary is not None and not 0.0 <= args.canary <= 1.0:
        raise InvalidRequestError(f"--canary is a share from 0 to 1, not {args.canary}")
    if args.canary is not None and args.no_alias:
        raise InvalidRequestError("a canary gets a share of an alias's requests: leave out --no-alias or --canary")
    if args.target is not None and args.base is None:
        raise InvalidRequestError("a fine-tune is published as its delta from a base: give --base DIR")
    if args.target is None and (args.out is not None or args.prompts is not None):
        raise InvalidRequestError("--out and --prompts are for the delta that is made of a --target; leave them out")


def _is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
    except ValueError:  # such as half an IPv6 address
        return False
    return url.scheme in ("http", "https") and bool(url.hostname)


def _read_key(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidRequestError(f"{file} cannot be read ({reason}); give a --key-file that holds a key") from error


def _made(args: argparse.Namespace, held: ExitStack) -> Path:
    """The delta of a full fine-tune; one that an earlier call has left in --out is taken, if it is this one's.

    Raises:
        CheckpointError: --out holds the delta of another base or fine-tune, or is damaged.
    """
    if args.out is not None and (args.out / CONFIG_FILE).is_file():
        with progress_bar("verifying") as progress:
            verify_delta(args.out, args.base, progress=progress)
        with progress_bar("reading") as progress:
            check_target(args.out, args.target, progress=progress)
        return Path(args.out)
    out = args.out
    if out is None:
        out = held.enter_context(temporary_directory("rootgraft-publish-")) / "delta"
    # It imports transformers' models, which takes as long as making a small delta.
    from delta.make_measured import make_measured_delta
    from delta.quality_gate import QualityGate

    labels = Labels(None, None, args.name, None, ())
    with progress_bar("making") as progress:
        make_measured_delta(
            args.base,
            args.target,
            out,
            CodecPolicy(),
            prompts=default_prompts() if args.prompts is None else read_prompts(args.prompts),
            gate=QualityGate(),
            labels=labels,
            report=_report,
            progress=progress,
        )
    return Path(out)


def _report(line: str) -> None:
    print(line, flush=True)
