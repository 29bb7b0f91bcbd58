"""What the directory of a fine-tune says about its prompts, which may differ from those of its base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.chat_format import read_chat_template, special_tokens, turn_end_ids
from adapters.chat_template import ChatTemplate
from adapters.load_plan import LoadPlan
from adapters.tokenizer import Tokenizer, load_tokenizer
from delta.fine_tune_files import is_delta, write_small_files
from delta.vocabulary_rows import vocabulary_rows
from registry.checkpoint_file import MAX_JSON_BYTES, file_size, read_json_file
from registry.errors import CheckpointError, UnsupportedModelError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*')


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Where the prompts and replies of a fine-tune differ from those of its base.

    Attributes:
        chat_template: its own; None: it has none, so that the base's holds.
        stop_token_ids: ids that end its replies and not the base's, ascending.
        tokenizer: its own, which has tokens that the base's has not; None: the base's holds.
    """

    chat_template: ChatTemplate | None = None
    stop_token_ids: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None


def read_prompt_format(
    directory: Path, base: LoadPlan, tokenizer: Tokenizer, *, with_template: bool = True
) -> PromptFormat:
    """Read the tokenizer files that training leaves beside an adapter, or that come with a delta.

    Most adapters have none, or those of the base. A tokenizer with added tokens that the base's has not is used for the
    fine-tune's texts, if the base's embedding or its own has rows for them; the rest of the vocabulary, which no
    fine-tune changes, is not compared.

    Args:
        directory: of the adapter or delta.
        with_template: False: another chat template was asked for, and the fine-tune's own is not even read.

    Raises:
        CheckpointError: one of the files cannot be read, or the template is not valid.
        UnsupportedModelError: the tokenizer has tokens for which neither has rows.
    """
    if not is_delta(directory):
        return _read(directory, directory, base, tokenizer, with_template=with_template)
    with TemporaryDirectory(prefix="rootgraft-") as files:
        write_small_files(base.path, directory, Path(files))
        return _read(Path(files), directory, base, tokenizer, with_template=with_template)


def _read(
    directory: Path, fine_tune: Path, base: LoadPlan, tokenizer: Tokenizer, *, with_template: bool
) -> PromptFormat:
    """`directory` holds the small files of the fine-tune."""
    file = directory / "tokenizer_config.json"
    config = read_json_file(file) if file.exists() else {}
    own = {name: text for name in _SPECIAL if (text := _text(config.get(name))) is not None}
    new = _new_tokens(directory, config, tokenizer, padding=own.get("pad_token"))
    own_tokenizer = _own_tokenizer(directory, new, max(base.vocab_size, vocabulary_rows(fine_tune))) if new else None
    tokenizer = own_tokenizer or tokenizer
    template: ChatTemplate | None = None
    stop: set[int] = set()
    if with_template:
        template = read_chat_template(directory, {**special_tokens(base.checkpoint, tokenizer), **own})
    if template is not None:
        stop.update(turn_end_ids(tokenizer, template))
    if "eos_token" in own:
        stop.add(_token_id(tokenizer, own["eos_token"], directory))
    return PromptFormat(template, tuple(sorted(stop.difference(base.stop_token_ids))), own_tokenizer)


def _new_tokens(
    directory: Path, config: Mapping[str, Any], tokenizer: Tokenizer, *, padding: str | None
) -> list[tuple[str, Any]]:
    """Added tokens that the base has not. Padding is never part of a prompt, so the base need not know it."""
    return [
        (text, index)
        for text, index in _added_tokens(directory, config)
        if text != padding and tokenizer.backend.token_to_id(text) != index
    ]


def _own_tokenizer(directory: Path, new: list[tuple[str, Any]], num_rows: int) -> Tokenizer:
    """`num_rows`: of the embedding."""
    (text, index) = new[0]
    if (directory / "tokenizer.json").exists():
        own = load_tokenizer(directory)
        if all(own.backend.token_to_id(text) == index and index < num_rows for text, index in new):
            return own
    raise UnsupportedModelError(
        f"The tokenizer has the token {text!r} with id {index}, which the base model's tokenizer has not; for that, a "
        f"tokenizer.json with it is needed, and an embedding that has a row for it, of the base or in the fine-tune's "
        f"own files ({num_rows} rows are there). Train it without new tokens, save it with its embedding and head, "
        "take the tokenizer's files away if no prompt holds this one, or serve the fine-tune as a model of its own."
    )


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Text and id of each added token, from wherever some version of transformers writes them."""
    decoder = config.get("added_tokens_decoder", {})
    for index, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if (text := _text(token)) is not None:
            yield text, int(index) if index.isdecimal() else index
    file = directory / "added_tokens.json"
    if file.exists():
        yield from read_json_file(file).items()
    file = directory / "tokenizer.json"
    if file.exists():
        for token in _added_in_tokenizer_file(file):
            if isinstance(token, Mapping) and (text := _text(token)) is not None:
                yield text, token.get("id")


def _added_in_tokenizer_file(file: Path) -> list[Any]:
    """Only the part that lists them, which comes first: to parse megabytes of vocabulary would stop all streams."""
    if file_size(file) > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES} bytes, which no tokenizer is")
    try:
        text = file.read_text(encoding="utf-8")
        found = _ADDED_TOKENS.search(text)
        tokens = [] if found is None else json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON; copy the tokenizer of the base model there") from error
    return tokens if isinstance(tokens, list) else []


def _token_id(tokenizer: Tokenizer, text: str, directory: Path) -> int:
    index: int | None = tokenizer.backend.token_to_id(text)
    if index is None:
        raise UnsupportedModelError(
            f"{directory}/tokenizer_config.json: replies end with {text!r}, which is no token of the base model; set "
            "eos_token to one that is."
        )
    return index


def _text(token: Any) -> str | None:
    """Of a token that is written as a text, or as an object with properties."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
