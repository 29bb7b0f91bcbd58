"""A chat template: how a conversation becomes the prompt of a model.

The text is exactly that of `transformers`' `apply_chat_template(..., tokenize=False)`. It is tokenized with
`add_special_tokens=False`: a template writes the BOS token itself wherever its format wants one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta

from adapters.template_sandbox import BoundedEnvironment, Limits, RaisedByTemplateError, TemplateLimitError
from registry.errors import CheckpointError, InvalidRequestError

# A message's reasoning goes by several names; templates read the first (gpt-oss the second).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "PROBE-OF-TEXT-PARTS"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One Jinja template with the variables that belong to the model.

    Attributes:
        name: name in the library, or where it came from ("chat_template.jinja", ...).
        source: the Jinja text.
        stop: strings at which a reply ends although no stop token is sampled.
        special_tokens: variables such as `bos_token` and `eos_token`.
        default_system_message: given to the template under this name, where the format has one.

    Raises:
        CheckpointError: the template is no valid Jinja or is too large.
    """

    name: str
    source: str
    stop: tuple[str, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    default_system_message: str | None = None
    limits: Limits = field(default_factory=Limits, repr=False)
    _environment: BoundedEnvironment = field(init=False, repr=False, compare=False)
    _template: jinja2.Template = field(init=False, repr=False, compare=False)
    _takes_parts: bool = field(init=False, repr=False, compare=False)
    _variables: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.source) > self.limits.max_source_chars:
            raise CheckpointError(
                f"the chat template {self.name} has {len(self.source)} characters, the limit is "
                f"{self.limits.max_source_chars}; choose another with --chat-template"
            )
        environment = BoundedEnvironment(self.limits)
        try:
            template = environment.from_string(self.source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(self.source))
        except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, OverflowError) as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(
                f"the chat template {self.name} is no valid Jinja template: {error}{line}; "
                "mend it or choose another with --chat-template"
            ) from error
        object.__setattr__(self, "_environment", environment)
        object.__setattr__(self, "_template", template)
        object.__setattr__(self, "_variables", frozenset(variables))
        object.__setattr__(self, "_takes_parts", self._probe_parts())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: `role`, `content` (text, or a list of `{"type": "text", "text": ...}`) and what else the template
                reads (`tool_calls`, `reasoning_content`, ...).
            add_generation_prompt: end with what opens the assistant's reply.
            continue_final_message: end inside the last message, for the model to write on.
            **kwargs: more variables of the template (`tools`, `documents`, `enable_thinking`, ...); they win over the
                special tokens of the same name.

        Raises:
            InvalidRequestError: the template refuses the conversation or cannot render it within its limits.
        """
        if not messages:
            raise InvalidRequestError("messages is empty; give at least one message", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                param="continue_final_message",
            )
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in self._variables:
                raise InvalidRequestError(f"the model's chat template takes no {name}; leave them out", param=name)
        chat = [self._message(message, index) for index, message in enumerate(messages)]
        final_text = self._tag_final_message(chat) if continue_final_message else ""
        try:
            prompt = self._render(chat, add_generation_prompt, kwargs)
        except RaisedByTemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses this conversation: {error}") from error
        except TemplateLimitError as error:
            raise InvalidRequestError(
                f"the chat template {self.name} was stopped on this conversation: {error}"
            ) from error
        except Exception as error:
            # A template is a foreign program: its faults are of any type and must not look like ours.
            raise InvalidRequestError(
                f"the chat template {self.name} cannot render this conversation: {type(error).__name__}: {error}"
            ) from error
        return _cut_at_tag(prompt, final_text) if continue_final_message else prompt

    def _render(self, chat: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        given: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens}
        if self.default_system_message is not None:
            given["default_system_message"] = self.default_system_message
        given.update(_plain(variables), messages=chat, add_generation_prompt=add_generation_prompt)
        return self._environment.render(self._template, given)

    def _message(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A copy of plain data without nulls, reasoning under all its names, text parts joined where need be."""
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{index}] must be an object with role and content", param="messages")
        result: dict[str, Any] = {key: _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((result[name] for name in _REASONING_FIELDS if name in result), None)
        if reasoning is not None:
            result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
        content = result.get("content")
        if isinstance(content, list):
            for part in content:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    raise InvalidRequestError(
                        f"messages[{index}].content holds a part that is not text; this model reads text only",
                        param="messages",
                    )
            if not self._takes_parts:
                result["content"] = "\n".join(part["text"] for part in content)
        return result

    def _probe_parts(self) -> bool:
        """Whether the template itself reads content given as a list of parts (many print the list's repr instead)."""
        try:
            text = self._render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], False, {})
        except Exception:
            # Whatever it raises, it does not read lists; a true fault of the template shows on the first request.
            return False
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text

    def _tag_final_message(self, chat: list[dict[str, Any]]) -> str:
        """Append the tag to the text of the last message and return that text."""
        message = chat[-1]
        content = message.get("content")
        if isinstance(content, list) and content:
            text = content[-1]["text"]
            content[-1]["text"] = text + _CONTINUE_TAG
        elif isinstance(content, str):
            text = content
            message["content"] = text + _CONTINUE_TAG
        else:
            raise InvalidRequestError(
                "continue_final_message needs text in the last message; give it content to continue",
                param="continue_final_message",
            )
        return str(text)


def _cut_at_tag(prompt: str, final_text: str) -> str:
    if final_text.strip() not in prompt or _CONTINUE_TAG.strip() not in prompt:
        raise InvalidRequestError(
            "the model's chat template drops part of the last message, so it cannot be continued",
            param="continue_final_message",
        )
    end = prompt.rindex(_CONTINUE_TAG.strip())
    if prompt.startswith(_CONTINUE_TAG, end):
        return prompt[:end]
    # The template trims messages, so the tag lost its blank and the text must lose its own.
    return prompt[:end].rstrip()


def _plain(value: Any) -> Any:
    """JSON types only: an object of any other class has methods that the sandbox cannot judge."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise InvalidRequestError(f"a chat template takes JSON values only, not {type(value).__name__}")
