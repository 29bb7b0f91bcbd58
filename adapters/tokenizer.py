"""Text to token ids and back, for every kind of checkpoint through one class.

The work is done by the Rust tokenizer directly; where tokenizer.json does not say all, transformers configures it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from adapters.gguf_tokenizer import tokenizer_from_gguf
from adapters.plain_tokenizer import read_plain_tokenizer
from adapters.token_bytes import decodes_bytes, token_speller
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError, UnsupportedModelError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """A tokenizer of one model. Immutable, and safe to use from several threads.

    Attributes:
        vocab_size: one more than the highest id; a model's embedding may have more rows (padding) but not fewer.
        special_ids: ids that `decode` leaves out with `skip_special_tokens`.
        text_is_bytes: the text of any ids is that of their `token_bytes` in a row, read as UTF-8.
        bos_token_id, eos_token_id, pad_token_id: None where the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        pad_token_id: int | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._spell = token_speller(backend)
        added = backend.get_added_tokens_decoder()
        self._added = {index: token.content.encode() for index, token in added.items()}
        self.text_is_bytes = decodes_bytes(backend) and all(
            self._spell(content.decode()) == content for content in self._added.values()
        )
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The Rust tokenizer, for incremental decoding."""
        return self._backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written out in the text become their ids.

        Args:
            add_special_tokens: add what this tokenizer puts around a text (BOS, for many models). False for text that
                already has it, such as a rendered chat template.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, exactly as spelled: spaces before punctuation are never cleaned up.

        Incomplete UTF-8 becomes U+FFFD; ids without a token (padding rows of the embedding) give nothing.
        """
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_str(self, token_id: int) -> str:
        """The vocabulary's own spelling of one token (for instance `\u0120the`); empty for an id without a token."""
        token = self._backend.id_to_token(token_id)
        return "" if token is None else token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, possibly a part of a character; empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spell(token)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: a directory, or a GGUF file.

    Raises:
        CheckpointError: no tokenizer files, or they cannot be read.
        UnsupportedModelError: a tokenizer that cannot be reproduced exactly, or that needs code from the checkpoint.
    """
    if path.is_dir() and any((path / name).is_file() for name in _TOKENIZER_FILES):
        return _from_directory(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.format != "gguf":
        raise CheckpointError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the tokenizer files of its model there"
        )
    metadata = checkpoint.metadata
    return Tokenizer(
        tokenizer_from_gguf(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which give the same ids here and in transformers."""
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    roles = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    config |= {f"{role}_token": tokenizer.token_str(index) for role, index in roles.items() if index is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _from_directory(path: Path) -> Tokenizer:
    plain = read_plain_tokenizer(path)
    if plain is None:
        return _from_transformers(path)
    backend, special = plain
    return Tokenizer(
        backend,
        bos_token_id=special["bos_token"],
        eos_token_id=special["eos_token"],
        pad_token_id=special["pad_token"],
    )


def _from_transformers(path: Path) -> Tokenizer:
    # Imported here because it takes more than 2 s, which a plain tokenizer need not spend.
    from transformers import AutoTokenizer

    try:
        chosen = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"the tokenizer in {path} cannot be read: {reason[0] if reason else type(error).__name__}"
        ) from error
    if not chosen.is_fast:
        raise UnsupportedModelError(
            f"the tokenizer in {path} ({type(chosen).__name__}) has no fast form; "
            "put the tokenizer.json of its model there"
        )
    return Tokenizer(
        chosen.backend_tokenizer,
        bos_token_id=chosen.bos_token_id,
        eos_token_id=chosen.eos_token_id,
        pad_token_id=chosen.pad_token_id,
    )
