"""What is right in the LoRA soak: which versions of an adapter a request may have got, and its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

Part = tuple[str, str, float]
"""Name, version and scale."""

Token = tuple[str, float]
"""Text and log-probability. An adapter that leaves a text as it is still changes the second."""

Content = tuple[Part, ...]
"""What a request is answered with; () for the base."""


_SAME_LOGPROB = 1e-4


@dataclass(slots=True)
class Change:
    """Attributes:
    began_s, ended_s: when the server was told and when it had answered; infinite until then.
    version: that the name stands for afterwards, what was refused leaves it as it was; None: it is not there.
    """

    began_s: float
    version: str | None
    ended_s: float = math.inf


@dataclass(slots=True)
class History:
    """What a name stood for and when. While a change is under way, both what was and what will be are possible.

          began          ended
    before ───┼──────────────┤
              ├──────────────┼─── version ...
    """

    changes: list[Change] = field(default_factory=list)

    @property
    def version(self) -> str | None:
        return self.changes[-1].version if self.changes else None

    def possible(self, from_s: float, to_s: float) -> set[str | None]:
        """What it may have stood for between the two."""
        changes = [Change(-math.inf, None, -math.inf), *self.changes]
        ends = [change.ended_s for change in changes[1:]] + [math.inf]
        return {
            change.version
            for change, until_s in zip(changes, ends, strict=True)
            if change.began_s <= to_s and from_s <= until_s
        }

    def may_be_loading(self, from_s: float, to_s: float) -> bool:
        """Somebody tried to load it between the two while it was not there: known already, but not read yet."""
        before = [None, *(change.version for change in self.changes)]
        return any(
            old is None and change.began_s <= to_s and from_s <= change.ended_s
            for old, change in zip(before, self.changes, strict=False)
        )


@dataclass(frozen=True, slots=True)
class Request:
    """Attributes:
    loras: names and scales; one at scale 1 is asked for as the model.
    prompt: number of one.
    leaves: the client goes away: at once, or at the first token.
    """

    loras: tuple[tuple[str, float], ...]
    prompt: int
    num_tokens: int
    stream: bool = False
    seed: int | None = None
    leaves: str | None = None


@dataclass(slots=True)
class Reply:
    """Attributes:
    sent_s, answered_s: the second is when the status came.
    status: None: the client left before it came.
    complete: the answer, or the error, came to its end.
    error: the server's message.
    """

    sent_s: float
    answered_s: float = math.inf
    status: int | None = None
    complete: bool = False
    tokens: list[Token] = field(default_factory=list)
    error: str = ""


def fault(
    request: Request,
    reply: Reply,
    histories: Mapping[str, History],
    expected: Mapping[tuple[Content, int], Sequence[Token]],
) -> str | None:
    """What is wrong with a reply; None: nothing."""
    if reply.status is None:
        return None if request.leaves else "no answer"
    versions = [histories[name].possible(reply.sent_s, reply.answered_s) for name, _ in request.loras]
    if reply.status == 200:
        return _fault_of_answer(request, reply, versions, expected)
    if not reply.error:
        return f"HTTP {reply.status} without a message"
    if reply.status == 404:
        return None if any(None in possible for possible in versions) else f"404 for what is loaded: {reply.error}"
    if reply.status == 503 and any(
        histories[name].may_be_loading(reply.sent_s, reply.answered_s) for name, _ in request.loras
    ):
        return None
    return f"HTTP {reply.status}: {reply.error}"


def _fault_of_answer(
    request: Request,
    reply: Reply,
    versions: Sequence[set[str | None]],
    expected: Mapping[tuple[Content, int], Sequence[Token]],
) -> str | None:
    if reply.error:
        return f"broken off: {reply.error}"
    loaded = [sorted(version for version in possible if version is not None) for possible in versions]
    contents = [
        tuple((name, version, scale) for (name, scale), version in zip(request.loras, chosen, strict=True))
        for chosen in product(*loaded)
    ]
    if not contents:
        return "answered, although it is not loaded"
    if not reply.complete:
        return None if request.leaves else "the answer has no end"
    if len(reply.tokens) != request.num_tokens:
        return f"{len(reply.tokens)} tokens instead of {request.num_tokens}"
    if request.seed is not None:
        return None
    answers = [list(expected[content, request.prompt][: request.num_tokens]) for content in contents]
    if any(same_tokens(reply.tokens, answer) for answer in answers):
        return None
    return f"answered {reply.tokens}, not one of {answers}"


def same_tokens(tokens: Sequence[Token], others: Sequence[Token]) -> bool:
    return len(tokens) == len(others) and all(
        text == other_text and abs(logprob - other_logprob) < _SAME_LOGPROB
        for (text, logprob), (other_text, other_logprob) in zip(tokens, others, strict=True)
    )
