"""Configuration of a worker process and its command line."""

from __future__ import annotations

import argparse
import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from adapters.quantization import QUANTIZATIONS
from model_worker.engine.config import GPU_STEPS, EngineConfig, ProfileConfig
from model_worker.engine.machine import check_num_threads, choose_device
from registry.errors import InvalidRequestError
from registry.flags import add_flags, config_from_args
from registry.names import is_name

DEFAULT_PORT = 21002
DEFAULT_CONTROLLER = "http://127.0.0.1:8000"
SignaturePolicy: TypeAlias = Literal["off", "warn", "require"]
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class GivenVariant:
    """A fine-tune of the command line: FLAG NAME=PATH[,pin]."""

    flag: str
    name: str
    path: Path
    pinned: bool


@dataclass(frozen=True, slots=True)
class SignatureConfig:
    """Attributes:
    policy: for fine-tunes that are not signed with one of the keys. off: nothing is looked at; warn: they are served,
        and logged; require: they are refused.
    keys: PEM files with public keys; none if and only if the policy is off.
    """

    policy: SignaturePolicy = "off"
    keys: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What one worker process serves and where.

    Attributes:
        model: directory, GGUF file or known model name.
        model_name: public name; None: the known name, or that of the directory or file.
        controller: base URL of the controller; None: standalone.
        host: address to listen on.
        port: 0 lets the OS choose; None: DEFAULT_PORT or the next free one.
        advertise_url: where the controller reaches this worker; None: made from host and port.
        worker_token: the secret shared with the controller, checked in both directions; None: no check.
        dtype, quantization, chat_template, max_model_len, deltas: as in `adapters.plan_load`.
        variants: adapters and deltas that are loaded before the worker registers.
        adapter_root: directory below which those named over HTTP must be; None: there can be none.
        signatures: which fine-tunes may be served, by who signed them.
        drain_timeout_s: how long running requests may go on after SIGTERM.
        log_level: of the worker's own log lines on stderr.
        engine: configuration of the engine.
        profile: what is recorded of its first steps.
    """

    model: str
    model_name: str | None
    controller: str | None
    host: str
    port: int | None
    advertise_url: str | None
    worker_token: str | None
    dtype: str
    quantization: str
    chat_template: str | None
    max_model_len: int | None
    deltas: tuple[Path, ...]
    variants: tuple[GivenVariant, ...]
    adapter_root: Path | None
    signatures: SignatureConfig
    drain_timeout_s: float
    log_level: str
    engine: EngineConfig
    profile: ProfileConfig


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_worker",
        description="Serve one base model: load it into the engine, register with the controller, answer its requests.",
        epilog="`python -m model_worker inspect --help`: see what a model needs and what a step of it does.",
    )
    model = add_model_flags(parser)
    model.add_argument("--model-name", metavar="NAME", help="public name (default: that of the directory or file)")
    model.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="instead of the model's own, and its fine-tunes' own; `python -m adapters list` names them",
    )
    variants = parser.add_argument_group("fine-tunes served beside the model")
    for flag, what in (("--lora", "LoRA adapter in PEFT's format"), ("--delta", "delta (python -m delta)")):
        variants.add_argument(
            flag,
            type=partial(_given_variant, flag),
            action="append",
            default=[],
            metavar="NAME=PATH[,pin]",
            help=f"{what} to serve under this name; pin: always ready to run; may be repeated",
        )
    variants.add_argument(
        "--adapter-root",
        type=Path,
        metavar="DIR",
        help="those named over HTTP are read below this directory only (default: none are)",
    )
    variants.add_argument(
        "--signatures",
        choices=get_args(SignaturePolicy),
        default="off",
        help="fine-tunes that are not signed with one of the keys are served (off), served and logged (warn), or "
        "refused (require), from the command line, --adapter-root or a release alike (default: %(default)s)",
    )
    variants.add_argument(
        "--signature-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="public key (PEM) that is trusted; may be repeated",
    )
    where = parser.add_argument_group("network")
    controller = where.add_mutually_exclusive_group()
    controller.add_argument(
        "--controller", metavar="URL", default=DEFAULT_CONTROLLER, help="(default: %(default)s)", type=_url
    )
    controller.add_argument("--no-controller", action="store_true", help="serve without registering anywhere")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    where.add_argument(
        "--port",
        type=_port,
        metavar="INT",
        help=f"0: the system chooses (default: {DEFAULT_PORT}, or the next free port)",
    )
    where.add_argument(
        "--advertise-url",
        metavar="URL",
        type=_url,
        help="where the controller reaches this worker (default: made from host and port)",
    )
    where.add_argument(
        "--worker-token",
        metavar="SECRET",
        help="shared with the controller; better given as the environment variable ROOTGRAFT_WORKER_TOKEN",
    )
    where.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (default: %(default)s)",
    )
    where.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="(default: %(default)s)")
    add_flags(parser, EngineConfig, title="engine")
    add_flags(parser, ProfileConfig, title="profile")
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which model, and what `plan_load` has to know of it. -> their group"""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-path", required=True, metavar="PATH|NAME", help="checkpoint directory, GGUF file or known model name"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights that are not quantized, and of the KV cache (default: %(default)s)",
    )
    model.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="auto",
        help="bits of the weights: int8, int4 or, on GPUs only, fp8, rounded to while loading; none: all in --dtype; "
        "auto: in --dtype, but blocks of type Q8_0, Q4_0 and Q4_1 in a GGUF file stay as they are (default: "
        "%(default)s)",
    )
    model.add_argument(
        "--max-model-len",
        type=positive_int,
        metavar="INT",
        help="most tokens of prompt and output together (default: the model's context length)",
    )
    model.add_argument(
        "--apply-delta",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="delta to add to the weights while loading, so that the fine-tune is the model; may be repeated",
    )
    return model


def parse_config(argv: Sequence[str] | None, *, worker_token: str | None) -> WorkerConfig:
    """Read the command line; `worker_token` is what the environment says, and a flag wins over it.

    Raises:
        InvalidRequestError: a token that no header can hold, or none for a worker that a network can reach; fine-tunes
            of one name; a directory, device or processor that does not exist; a policy for signatures without keys, or
            keys without one; an address for a controller that there is not.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if choose_device(args.device).type == "cuda":
        parser.set_defaults(**GPU_STEPS)
        args = parser.parse_args(argv)
    check_num_threads(args.num_threads)
    if args.no_controller and args.advertise_url is not None:
        raise InvalidRequestError(
            "--advertise-url is where the controller reaches this worker, and with --no-controller there is none; "
            "leave one of them out."
        )
    variants = (*args.lora, *args.delta)
    _check_variants(variants, args.adapter_root)
    _check_signatures(args.signatures, args.signature_key)
    token = _token(args.worker_token if args.worker_token is not None else worker_token)
    if token is None and not _is_loopback(args.host):
        raise InvalidRequestError(
            f"A worker that listens on {args.host} would answer anybody; give it and the controller the same "
            "--worker-token (or ROOTGRAFT_WORKER_TOKEN), or listen on a loopback address."
        )
    return WorkerConfig(
        model=args.model_path,
        model_name=args.model_name,
        controller=None if args.no_controller else args.controller,
        host=args.host,
        port=args.port,
        advertise_url=args.advertise_url,
        worker_token=token,
        dtype=args.dtype,
        quantization=args.quantization,
        chat_template=args.chat_template,
        max_model_len=args.max_model_len,
        deltas=tuple(args.apply_delta),
        variants=variants,
        adapter_root=args.adapter_root,
        signatures=SignatureConfig(args.signatures, tuple(args.signature_key)),
        drain_timeout_s=args.drain_timeout,
        log_level=args.log_level,
        engine=config_from_args(args, EngineConfig),
        profile=config_from_args(args, ProfileConfig),
    )


def _check_variants(variants: Sequence[GivenVariant], adapter_root: Path | None) -> None:
    names = [given.name for given in variants]
    for given in variants:
        if names.count(given.name) > 1:
            raise InvalidRequestError(f"{given.flag} {given.name} is given more than once; give each its own name.")
        if not given.path.is_dir():
            raise InvalidRequestError(f"{given.flag} {given.name}: {given.path} is no directory; check the path.")
    if adapter_root is not None and not adapter_root.is_dir():
        raise InvalidRequestError(f"--adapter-root {adapter_root} is no directory; make it or check the path.")


def _check_signatures(policy: SignaturePolicy, keys: Sequence[Path]) -> None:
    if policy != "off" and not keys:
        raise InvalidRequestError(f"--signatures {policy} has to know whom to trust; add --signature-key FILE.")
    if policy == "off" and keys:
        raise InvalidRequestError("--signature-key is of use only with --signatures warn or require; add that.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _token(text: str | None) -> str | None:
    if not text:
        return None
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise InvalidRequestError("The worker token must be printable ASCII without blanks around it.")
    return text


def _given_variant(flag: str, text: str) -> GivenVariant:
    name, equals, path = text.partition("=")
    without_pin = path.removesuffix(",pin")
    if not (equals and without_pin and is_name(name)):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH or NAME=PATH,pin, got {text!r}")
    return GivenVariant(flag, name, Path(without_pin), pinned=without_pin != path)


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"expected a URL such as http://host:8000, got {text!r}")
    return text.rstrip("/")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return value
