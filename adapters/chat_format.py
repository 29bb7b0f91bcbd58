"""Where a model's chat template, its special tokens and its stop ids come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.chat_template import ChatTemplate
from adapters.gguf import chat_template_from_gguf, stop_ids_from_gguf
from adapters.load_plan import LoadPlan
from adapters.template_library import load_template
from adapters.tokenizer import Tokenizer
from registry.checkpoint import Checkpoint
from registry.checkpoint_file import file_size, read_json_file
from registry.errors import CheckpointError, InvalidRequestError

# Tokens that end a turn and nothing else; one counts where the model's own template writes it. `<|end|>` is not among
# them: where gpt-oss writes it, another message of the same turn may follow.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>")
_OTHER_SPECIAL_TOKENS = ("unk_token", "sep_token", "cls_token", "mask_token")

log = logging.getLogger(__name__)


def special_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, str]:
    """The variables `bos_token`, `eos_token`, ... of chat templates; a token that the model lacks is left out."""
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    tokens = {f"{role}_token": tokenizer.token_str(index) for role, index in ids.items() if index is not None}
    config = _tokenizer_config(checkpoint)
    for name in _OTHER_SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def choose_chat_template(
    checkpoint: Checkpoint, name_or_file: str | None, tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template asked for, else the model's own, else None: a template is never guessed.

    Raises: CheckpointError when what was asked for does not exist or a template is not valid.
    """
    if name_or_file is not None:
        return load_template(name_or_file, special_tokens=tokens)
    if checkpoint.format == "gguf":
        source = chat_template_from_gguf(checkpoint)
        return ChatTemplate("tokenizer.chat_template", source, special_tokens=tokens) if source else None
    return read_chat_template(checkpoint.path, tokens)


def read_chat_template(directory: Path, tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template among the files of a directory; None: there is none.

    Raises: CheckpointError when it is not valid.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        file_size(file)
        try:
            return ChatTemplate(file.name, file.read_text(encoding="utf-8"), special_tokens=tokens)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 text; download it again") from error
    file = directory / "chat_template.json"
    value = read_json_file(file).get("chat_template") if file.exists() else None
    if value is None:
        file = directory / "tokenizer_config.json"
        value = read_json_file(file).get("chat_template") if file.exists() else None
    source = _default_source(value, file)
    return ChatTemplate(file.name, source, special_tokens=tokens) if source else None


def require_chat_template(plan: LoadPlan) -> ChatTemplate:
    """The plan's template.

    Raises: InvalidRequestError for a model without one, naming the flag that gives it one.
    """
    if plan.chat_template is not None:
        return plan.chat_template
    family_default = plan.family.chat_template
    hint = f" ({family_default} if it is a chat model of the {plan.family.name} family)" if family_default else ""
    raise InvalidRequestError(
        "this model has no chat template, so it is probably a base model: use /v1/completions, or start its worker "
        f"with --chat-template NAME|FILE{hint}",
        param="messages",
    )


def stop_token_ids(
    checkpoint: Checkpoint, config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[int, ...]:
    """Every id that ends a sequence, sorted.

    The union of the `eos_token_id` of generation_config.json and of the config, the tokenizer's EOS, a GGUF file's ends
    of text and turn, the ends of turn that the template writes, and its stop strings that are single special tokens.
    """
    ids = set(_ids(config.get("eos_token_id"), "config.json"))
    if checkpoint.format == "gguf":
        ids.update(stop_ids_from_gguf(checkpoint))
    else:
        file = checkpoint.path / "generation_config.json"
        if file.exists():
            ids.update(_ids(read_json_file(file).get("eos_token_id"), file.name))
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if template is not None:
        ids.update(turn_end_ids(tokenizer, template))
    return tuple(sorted(ids))


def turn_end_ids(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """Ids of the ends of turn that the template writes, and of its stop strings that are single special tokens."""
    written = (text for text in _END_OF_TURN if text in template.source)
    ids = (tokenizer.backend.token_to_id(text) for text in (*written, *template.stop))
    return {index for index in ids if index is not None and index in tokenizer.special_ids}


def _ids(value: Any, where: str) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise CheckpointError(f"{where}: eos_token_id must be a token id or a list of them, not {value!r}")
    return [index for index in ids if index >= 0]


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / "tokenizer_config.json"
    return read_json_file(file) if checkpoint.format != "gguf" and file.exists() else {}


def _default_source(value: Any, file: Path) -> str | None:
    """The template among what a file holds: one text, or a list of named ones of which "default" is taken."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in value
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str)
        }
        if "default" in named:
            return str(named["default"])
        if named:
            log.warning(
                "%s has chat templates named %s but none is the default; choose one with --chat-template FILE",
                file,
                ", ".join(map(str, named)),
            )
            return None
    raise CheckpointError(f"{file}: chat_template is neither a text nor a list of named templates")
