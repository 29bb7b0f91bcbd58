"""A tokenizer.json that is the whole tokenizer: nothing else in the checkpoint changes what it does.

Such are those that this package writes, and many others. They need no transformers, which takes more than 2 s to import
and to decide that it has nothing to add. What is not certain is left to it. tests/adapters/test_plain_tokenizer.py
compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from registry.checkpoint_file import file_size, read_json_file
from registry.errors import CheckpointError

# Families of which transformers takes tokenizer.json as it is, where tokenizer_config.json names one of these classes.
MODEL_TYPES = frozenset({"granite", "llama", "mixtral", "olmo2", "smollm3"})
_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# What tokenizer_config.json may say beside; none of it changes ids or text.
_WITHOUT_EFFECT = frozenset(
    {"tokenizer_class", "model_max_length", "clean_up_tokenization_spaces", "chat_template", "model_input_names"}
    | {"backend", "is_local", "padding_side", "truncation_side"}
)
_OTHER_FILES = ("added_tokens.json", "special_tokens_map.json")
_PROPERTIES = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def read_plain_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int | None]] | None:
    """The tokenizer of a checkpoint directory, if its tokenizer.json says all about it.

    Returns:
        the tokenizer, and the ids of its tokens by role (bos_token, eos_token, pad_token, unk_token; None: it has no
        such token); None where other files or transformers' own code may change it.

    Raises:
        CheckpointError: one of the files cannot be read.
    """
    file, config_file, model_file = (path / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    if not all(found.is_file() for found in (file, config_file, model_file)):
        return None
    if any((path / name).exists() for name in _OTHER_FILES):
        return None
    config = read_json_file(config_file)
    known = _WITHOUT_EFFECT.union(_SPECIAL, {"added_tokens_decoder"})
    if config.get("tokenizer_class") not in _CLASSES or not known.issuperset(config):
        return None
    if read_json_file(model_file).get("model_type") not in MODEL_TYPES:
        return None
    file_size(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from error
    added = {index: _properties(token) for index, token in backend.get_added_tokens_decoder().items()}
    if backend.padding is not None or not _adds_nothing(config.get("added_tokens_decoder", {}), added):
        return None
    special: dict[str, int | None] = {}
    for role in _SPECIAL:
        value = config.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        special[role] = None if text is None else backend.token_to_id(text)
        if text is not None and special[role] not in added:
            return None  # transformers would add it
    return backend, special


def _properties(token: tokenizers.AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in _PROPERTIES}


def _adds_nothing(wanted: Any, added: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether each of the wanted tokens, by id as text, is there with the same properties."""
    return isinstance(wanted, Mapping) and all(
        index.isdecimal() and isinstance(token, Mapping) and token == added.get(int(index))
        for index, token in wanted.items()
    )
