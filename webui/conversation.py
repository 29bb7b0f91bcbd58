"""A conversation and what can be done to it. Pure: every change makes a new list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a conversation.

    The chat display shows one bubble for each, in the same order, so that its indices are ours. `notice` entries tell
    the person that an answer failed; the model never sees them.
    """

    role: Literal["user", "assistant", "notice"]
    text: str


Conversation = list[Message]


def ask(conversation: Sequence[Message], text: str) -> Conversation:
    return [*conversation, Message("user", text)]


def answer(conversation: Sequence[Message], text: str) -> Conversation:
    """With an answer (so far); an answer of nothing is shown as one, so that it can be asked for again."""
    return [*conversation, Message("assistant", text)]


def notice(conversation: Sequence[Message], text: str) -> Conversation:
    return [*conversation, Message("notice", text)]


def until_last_question(conversation: Sequence[Message]) -> Conversation:
    """Everything up to the last question, which is then the last entry; empty without one."""
    for index in range(len(conversation) - 1, -1, -1):
        if conversation[index].role == "user":
            return list(conversation[: index + 1])
    return []


def edited(conversation: Sequence[Message], index: int, text: str) -> tuple[Conversation, bool]:
    """With other words in one entry, and whether that asks for a new answer.

    A changed question drops all that followed it. A changed answer stays in its place, and what followed it too.
    """
    if not 0 <= index < len(conversation):
        return list(conversation), False
    entry = replace(conversation[index], text=text)
    if entry.role == "user":
        return [*conversation[:index], entry], True
    return [*conversation[:index], entry, *conversation[index + 1 :]], False


def for_request(conversation: Sequence[Message], system_prompt: str) -> list[dict[str, str]]:
    """`messages` of a request: the system prompt, and what the model may see."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    said = [{"role": entry.role, "content": entry.text} for entry in conversation if entry.role != "notice"]
    return system + said


def for_display(conversation: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages of `gr.Chatbot`."""
    return [
        {"role": "assistant", "content": f"⚠ {entry.text}"}
        if entry.role == "notice"
        else {"role": entry.role, "content": entry.text}
        for entry in conversation
    ]
