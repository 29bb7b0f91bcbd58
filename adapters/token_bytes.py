"""The exact bytes that one token stands for, which a decoder for whole texts cannot say.

A token may hold part of a character: decoding it alone gives U+FFFD. Log-probabilities therefore report bytes, and
those come from the vocabulary's own spelling, of which there are two:

- byte-level BPE (GPT-2 and most that came after it) writes each byte as one printable character;
- SentencePiece writes a space as U+2581 and a byte without a piece of its own as `<0xNN>`.

Source: openai/gpt-2 `encoder.py`, `bytes_to_unicode`; SentencePiece, `docs/special_symbols.md` and byte fallback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from registry.errors import UnsupportedModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The 256 characters of byte-level BPE and the byte that each stands for.

    A printable Latin-1 character stands for itself; the other 68 bytes, in order, are written U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def token_speller(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How this tokenizer's ordinary tokens are spelled: a function from the vocabulary's string to the token's bytes.

    Raises:
        UnsupportedModelError: the tokenizer's decoder is neither byte-level nor SentencePiece-like.
    """
    if backend.decoder is None:
        return _literal_bytes
    decoder = json.loads(backend.decoder.__getstate__())
    steps = {step["type"] for step in _steps(decoder)}
    if "ByteLevel" in steps:
        return _byte_level_speller()
    if steps <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return _sentencepiece_bytes
    raise UnsupportedModelError(
        f"the tokenizer's decoder ({', '.join(sorted(steps))}) is neither byte-level nor SentencePiece-like; "
        "the bytes of its tokens are not defined. Use a model whose tokenizer.json has one of those decoders"
    )


def decodes_bytes(backend: tokenizers.Tokenizer) -> bool:
    """Whether this tokenizer decodes by joining the bytes of the tokens and reading them as UTF-8, and does no more."""
    return backend.decoder is not None and json.loads(backend.decoder.__getstate__())["type"] == "ByteLevel"


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _steps(inner)
    else:
        yield decoder


def _literal_bytes(token: str) -> bytes:
    return token.encode()


def _byte_level_speller() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    def spell(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # a token that was added as plain text
            return token.encode()

    return spell


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
