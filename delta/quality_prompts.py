"""The prompts over which a delta is compared with its fine-tune.

A JSON array. Each item is a text, which is taken as it is, or a conversation, which gets the fine-tune's chat template:
an array of {"role": "user", "content": "..."}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from registry.errors import CheckpointError

Message: TypeAlias = dict[str, str]
Conversation: TypeAlias = str | list[Message]
MAX_TOKENS = 512
"""Of one prompt; what follows is left out."""


@dataclass(frozen=True, slots=True)
class QualityPrompts:
    """Attributes:
    name: "default", or "sha256:…" of the file.
    """

    name: str
    conversations: tuple[Conversation, ...]

    def halves(self) -> tuple[QualityPrompts, QualityPrompts]:
        """Every second prompt from the first, over which deltas are measured, and the others, for which they are made.

        What a delta was made for says too much good about it.
        """
        return (
            QualityPrompts(self.name, self.conversations[::2]),
            QualityPrompts(self.name, self.conversations[1::2]),
        )


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Attributes:
    text: for people; the end of what is asked.
    question: the tokens up to where the model would answer.
    whole: the tokens with the answer, where there is one.
    """

    text: str
    question: tuple[int, ...]
    whole: tuple[int, ...]


def default_prompts() -> QualityPrompts:
    """Questions and answers of our own, about two thousand tokens."""
    content = resources.files("delta").joinpath("data/quality_prompts.json").read_text(encoding="utf-8")
    return QualityPrompts("default", _conversations(json.loads(content)))


def read_prompts(file: Path) -> QualityPrompts:
    """Raises CheckpointError: it cannot be read, or does not hold prompts."""
    try:
        content = file.read_bytes()
        conversations = _conversations(json.loads(content))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} does not hold prompts ({error}); it should be a JSON array of texts, or of conversations as in "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        ) from error
    return QualityPrompts(f"sha256:{hashlib.sha256(content).hexdigest()}", conversations)


def tokenize_prompts(prompts: QualityPrompts, tokenizer: Any) -> Iterator[TokenizedPrompt]:
    """With a tokenizer of transformers. Prompts of less than two tokens are left out: they predict nothing."""
    for conversation in prompts.conversations:
        if isinstance(conversation, str):
            whole = question = _token_ids(tokenizer, conversation, add_special_tokens=True)
            text = conversation
        else:
            question = _conversation_ids(tokenizer, _before_answer(conversation), answered=False)
            whole = _conversation_ids(tokenizer, conversation, answered=True)
            text = _before_answer(conversation)[-1]["content"]
        if len(whole) > 1 and question:
            yield TokenizedPrompt(text, question[-MAX_TOKENS:], whole[:MAX_TOKENS])


def _before_answer(conversation: list[Message]) -> list[Message]:
    is_answered = len(conversation) > 1 and conversation[-1]["role"] == "assistant"
    return conversation[:-1] if is_answered else conversation


def _conversation_ids(tokenizer: Any, conversation: list[Message], *, answered: bool) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in conversation)
        return _token_ids(tokenizer, text if answered else f"{text}\n", add_special_tokens=True)
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=not answered)
    return _token_ids(tokenizer, text, add_special_tokens=False)


def _token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _conversations(document: Any) -> tuple[Conversation, ...]:
    if not isinstance(document, list) or not document:
        raise ValueError("it is no array with at least one item")
    for index, item in enumerate(document):
        is_conversation = isinstance(item, list) and item and all(_is_message(message) for message in item)
        if not (isinstance(item, str) and item) and not is_conversation:
            raise ValueError(f"item {index} is neither a text nor a conversation")
    return tuple(document)


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, dict) and item.keys() == {"role", "content"} and all(isinstance(v, str) for v in item.values())
    )
