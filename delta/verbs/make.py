"""`python -m delta make`: store what a fine-tune changed in its base."""

from __future__ import annotations

import argparse
import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from delta.codecs.policy import EXACT_CODECS, CodecPolicy, Residual
from delta.delta_table import delta_table
from delta.imports.weight_difference import make_weight_difference
from delta.make import Labels, make_delta
from delta.progress_bar import progress_bar
from delta.quality_gate import QualityGate
from delta.quality_prompts import default_prompts, read_prompts
from delta.verbs.making_flags import add_making_flags
from registry.errors import InvalidRequestError


def add_parser(verbs: Any) -> None:
    verb: argparse.ArgumentParser = verbs.add_parser("make", help="store what a fine-tune changed in its base")
    verb.add_argument("--target", type=Path, required=True, metavar="DIR", help="the fine-tune (safetensors)")
    add_making_flags(
        verb, codec="auto", codec_help="how changed matrices are stored; auto: chosen for each by what changed"
    )
    verb.add_argument(
        "--residual",
        choices=typing.get_args(Residual),
        action="append",
        default=[],
        help="what follows a sign or ternary term, of what it left; may be repeated",
    )
    verb.add_argument("--rank", type=int, metavar="INT", help=f"of low-rank terms (default: {CodecPolicy().rank})")
    verb.add_argument(
        "--layout",
        choices=("delta", "huggingface"),
        default="delta",
        help="huggingface: with --codec dense, a model directory of plain differences in the fine-tune's dtype, as "
        "FastChat makes them; exact but for rounding (default: %(default)s)",
    )
    verb.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        help="compute fine-tune, base and delta over some prompts and record how close they are, and a probe for those "
        "who load it (default: with codecs that are not exact, and if a flag below asks for it)",
    )
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="JSON array of texts or conversations for --quality")
    verb.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="mean KL divergence from the fine-tune above which auto stores more, and other codecs fail (default: with "
        f"auto {QualityGate().max_kl}, or {QualityGate().max_kl_share:.0%} of the base's)".replace("%", "%%"),
    )
    verb.add_argument(
        "--min-answers",
        type=float,
        metavar="SHARE",
        help="share of the tokens of the fine-tune's own answers to the prompts, 0 to 1, that have to be the same, or "
        f"auto stores more, and other codecs fail (default: with auto {QualityGate().min_answers})",
    )
    verb.add_argument("--base-name", metavar="NAME", help="name of the base (default: the directory's)")
    verb.add_argument("--base-revision", metavar="REVISION", help="revision of the base")
    verb.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="DIGEST",
        help="a delta that this one continues; may be repeated",
    )
    verb.set_defaults(run=_make)


def _make(args: argparse.Namespace) -> None:
    _check(args)
    if args.layout == "huggingface":
        _make_differences(args)
        return
    policy = CodecPolicy(args.codec, tuple(args.residual), CodecPolicy().rank if args.rank is None else args.rank)
    labels = Labels(args.base_name, args.base_revision, args.name, args.license, tuple(args.parent))
    with progress_bar("making") as progress:
        common: dict[str, Any] = {"labels": labels, "force": args.force, "report": print, "progress": progress}
        if not (args.quality or _asks_for_quality(args) or (args.quality is None and args.codec not in EXACT_CODECS)):
            config = make_delta(args.base, args.target, args.out, policy, **common)
        else:
            # It imports transformers' models, which takes as long as making a small delta.
            from delta.make_measured import make_measured_delta

            prompts = default_prompts() if args.prompts is None else read_prompts(args.prompts)
            config = make_measured_delta(
                args.base, args.target, args.out, policy, prompts=prompts, gate=_gate(args), **common
            )
    print(delta_table(config))
    print(f"wrote {args.out}")


def _check(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError: flags that would not act, or a value that cannot be."""
    if _asks_for_quality(args) and (args.quality is False or args.layout == "huggingface"):
        raise InvalidRequestError(
            "--prompts, --max-kl and --min-answers are about a delta's quality, which --no-quality and --layout "
            "huggingface leave unmeasured; leave out one or the other"
        )
    if args.layout == "huggingface":
        _check_plain_differences(args)
    if args.residual and args.codec not in ("auto", "sign", "ternary"):
        raise InvalidRequestError(f"--codec {args.codec} has no residuals; --residual follows sign, ternary or auto")
    if args.rank is not None and args.rank < 1:
        raise InvalidRequestError(f"--rank is 1 or more, not {args.rank}")
    if args.rank is not None and args.codec not in ("auto", "lowrank") and "lowrank" not in args.residual:
        raise InvalidRequestError(
            f"--codec {args.codec} makes no low-rank terms, so that --rank would not act; leave it out, or add "
            "--residual lowrank"
        )
    if args.max_kl is not None and not args.max_kl >= 0:
        raise InvalidRequestError(f"--max-kl is 0 or more, not {args.max_kl}")
    if args.min_answers is not None and not 0 <= args.min_answers <= 1:
        raise InvalidRequestError(f"--min-answers is a share from 0 to 1, not {args.min_answers}")


def _check_plain_differences(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError: something is to be written beside them."""
    if args.codec != "dense":
        raise InvalidRequestError("--layout huggingface holds plain differences; add --codec dense")
    written = ("name", "license", "base_name", "base_revision", "parent", "quality")
    given = [f"--{label.replace('_', '-')}" for label in written if getattr(args, label)]
    if given:
        raise InvalidRequestError(
            f"--layout huggingface has no place for what {' and '.join(given)} would write; leave out one or the other"
        )


def _asks_for_quality(args: argparse.Namespace) -> bool:
    return any(value is not None for value in (args.prompts, args.max_kl, args.min_answers))


def _make_differences(args: argparse.Namespace) -> None:
    with progress_bar("making") as progress:
        make_weight_difference(args.base, args.target, args.out, force=args.force, progress=progress)
    print(f"wrote {args.out}")


def _gate(args: argparse.Namespace) -> QualityGate | None:
    asked = args.max_kl is not None or args.min_answers is not None
    if not asked and args.codec != "auto":
        return None
    gate = QualityGate() if args.codec == "auto" else QualityGate(max_kl=math.inf, min_answers=0)
    if args.max_kl is not None:
        gate = replace(gate, max_kl=args.max_kl, max_kl_share=0)
    if args.min_answers is not None:
        gate = replace(gate, min_answers=args.min_answers)
    return gate
