"""`python -m adapters list | show MODEL | render MODEL --message TEXT | convert SRC DST`"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.chat_format import require_chat_template
from adapters.chat_template import ChatTemplate
from adapters.convert import convert_checkpoint
from adapters.decoder_config import DECODER_MODEL_TYPES
from adapters.dtype import DTYPES
from adapters.load_plan import LoadPlan
from adapters.plan import plan_load
from adapters.plan_report import plan_rows, plan_to_json
from adapters.quantization import QUANTIZATIONS
from adapters.template_library import load_named_template, template_entries, template_names
from registry.command_parser import CommandParser
from registry.errors import RootgraftError
from registry.families import families
from registry.standard_output import printing


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; an error is one line on stderr and exit status 1."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        verbs = {"list": _list, "show": _show, "render": _render, "convert": _convert}
        with printing():
            verbs[args.verb](args)
    except RootgraftError as error:
        print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m adapters", description="Model adapters and conversation templates.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("list", help="list the model families and the conversation templates")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = verbs.add_parser("show", help="check a checkpoint and show how a worker with CPU kernels would load it")
    verb.add_argument("model", metavar="MODEL", help="checkpoint directory or .gguf file")
    _add_plan_flags(verb)
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb = verbs.add_parser("render", help="print the prompt that a conversation becomes")
    verb.add_argument(
        "model", metavar="MODEL", help="checkpoint directory, .gguf file, or the name of a template (then without BOS)"
    )
    verb.add_argument(
        "--message", action="append", required=True, metavar="TEXT",
        help="a message; given again, the roles alternate: user, assistant, user, ...",
    )  # fmt: skip
    verb.add_argument("--system", metavar="TEXT", help="the system message")
    verb.add_argument("--no-generation-prompt", action="store_true", help="do not open the assistant's reply")
    _add_plan_flags(verb)
    verb = verbs.add_parser("convert", help="write a checkpoint as safetensors with its tokenizer and chat template")
    verb.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory or .gguf file")
    verb.add_argument("target", type=Path, metavar="DST", help="directory to write; must not exist yet")
    verb.add_argument(
        "--dtype", choices=DTYPES, help="type of the written weights (default: as stored; quantized GGUF: bfloat16)"
    )
    return parser


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat-template", metavar="NAME|FILE", help="use this template instead of the model's own")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="type in memory (default: auto)")
    parser.add_argument(
        "--quantization", default="auto", choices=QUANTIZATIONS, help="bits of the weights in memory (default: auto)"
    )
    parser.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together")


def _list(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(_listing(), indent=2, ensure_ascii=False))
        return
    print("model families that are served (python -m registry list shows the refused ones too)")
    served = [family for family in families().values() if family.refused is None]
    _print_table([(family.name, ", ".join(family.architectures)) for family in served])
    print("\nconversation templates (--chat-template NAME)")
    _print_table([(entry.name, entry.description) for entry in template_entries().values()])


def _listing() -> dict[str, Any]:
    return {
        "families": {
            family.name: {
                "model_types": family.model_types,
                "architectures": family.architectures,
                "chat_template": family.chat_template,
                "refused": family.refused,
            }
            for family in families().values()
        },
        "chat_templates": {
            entry.name: {"description": entry.description, "stop": entry.stop, "link": entry.link}
            for entry in template_entries().values()
        },
    }


def _show(args: argparse.Namespace) -> None:
    # Nothing is loaded, so a model that does not fit is shown too, beside what is available.
    plan = _plan(args)
    if args.json:
        print(json.dumps(plan_to_json(plan), indent=2, ensure_ascii=False))
    else:
        _print_table(plan_rows(plan))


def _render(args: argparse.Namespace) -> None:
    template = _template(args)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for index, text in enumerate(args.message):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    sys.stdout.write(template.render(messages, add_generation_prompt=not args.no_generation_prompt))


def _template(args: argparse.Namespace) -> ChatTemplate:
    if args.model in template_names() and not Path(args.model).exists():
        return load_named_template(args.model)
    return require_chat_template(_plan(args))


def _plan(args: argparse.Namespace) -> LoadPlan:
    return plan_load(
        Path(args.model),
        dtype=args.dtype,
        quantization=args.quantization,
        chat_template=args.chat_template,
        max_model_len=args.max_model_len,
        memory_bytes=sys.maxsize,
        native_model_types=DECODER_MODEL_TYPES,
    )


def _convert(args: argparse.Namespace) -> None:
    convert_checkpoint(args.source, args.target, dtype=args.dtype, report=lambda line: print(line, file=sys.stderr))


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


if __name__ == "__main__":
    sys.exit(main())
