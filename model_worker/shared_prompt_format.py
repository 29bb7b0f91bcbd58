"""How a request is prompted that several fine-tunes answer together."""

from __future__ import annotations

from collections.abc import Mapping

from adapters.chat_template import ChatTemplate
from adapters.prompt_format import PromptFormat
from registry.errors import InvalidRequestError


def shared_prompt_format(formats: Mapping[str, PromptFormat]) -> PromptFormat:
    """The format that suits all of them; without any, the base's own.

    Args:
        formats: by the names that the request gives.

    Raises:
        InvalidRequestError: their chat templates or tokenizers differ.
    """
    templates: dict[tuple[str, ...], ChatTemplate] = {}  # by what decides the text
    for prompts in formats.values():
        if (template := prompts.chat_template) is not None:
            templates[template.source, *template.special_tokens.values()] = template
    if len(templates) > 1:
        raise InvalidRequestError(
            f"{', '.join(formats)} have different chat templates, so no prompt suits them all; start the worker "
            "with --chat-template to choose one for all of them.",
            param="loras",
        )
    tokenizers = [prompts.tokenizer for prompts in formats.values()]
    if len(formats) > 1 and any(tokenizers):
        raise InvalidRequestError(
            f"One of {', '.join(formats)} has tokens of its own, so that no prompt suits them all; use it alone.",
            param="loras",
        )
    stop = {token_id for prompts in formats.values() for token_id in prompts.stop_token_ids}
    return PromptFormat(next(iter(templates.values()), None), tuple(sorted(stop)), next(iter(tokenizers), None))
