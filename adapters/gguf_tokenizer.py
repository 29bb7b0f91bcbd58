"""The tokenizer that a GGUF file describes, rebuilt exactly or refused.

A GGUF file holds a vocabulary and merges (or scores), but of the pre-tokenizer only a name (`tokenizer.ggml.pre`), and
a wrong split gives ids that look right and are not. So a name is accepted only if its split is known, and every
metadata key under `tokenizer.ggml.` is either used or refused. docs/formats/gguf.md lists the keys.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md); for each pre-tokenizer the tokenizer.json of the model
that it is named for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from registry.errors import CheckpointError, UnsupportedModelError

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a `tokenizer.ggml.pre` name stands for.

    Attributes:
        splits: regular expressions applied one after the other; matches and the text between them become pieces.
        nfc: whether the text is first brought to Unicode normal form C.
        whole_words: a piece that is a token is taken as it is, without merging (`ignore_merges`).
        add_bos: whether a BOS token comes first where the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer((_CL100K,), whole_words=True, add_bos=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2_WORDS,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2_WORDS)),
    "starcoder": PreTokenizer((r"\p{N}", _GPT2_WORDS)),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": PreTokenizer((_CL100K,)),
    "dbrx": PreTokenizer((_CL100K,)),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Keys under tokenizer.ggml. that this module or adapters.gguf uses, or that do not change how text becomes ids: roles
# such as fill-in-the-middle are named for tools, and the tokens themselves are in the vocabulary anyway.
_USED_KEYS = frozenset(
    {"model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"}
    | {f"{role}_token_id" for role in ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator")}
    | {f"{role}_token_id" for role in ("cls", "mask", "prefix", "suffix", "middle")}
    | {f"fim_{role}_token_id" for role in ("pre", "suf", "mid", "pad", "rep", "sep")}
)
_LISTS: Mapping[str, type | tuple[type, ...]] = {
    "tokens": str,
    "merges": str,
    "token_type": int,
    "scores": (int, float),
}
# Keys that may be there as long as they are off.
_OFF_KEYS = frozenset({"add_sep_token", "remove_extra_whitespaces"})


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from the metadata of a GGUF file.

    Raises:
        UnsupportedModelError: a tokenizer model, pre-tokenizer or key that is not known to be reproduced exactly.
        CheckpointError: the vocabulary is missing or contradicts itself.
    """
    ggml = {key.removeprefix("tokenizer.ggml."): metadata[key] for key in metadata if key.startswith("tokenizer.ggml.")}
    _check_keys(ggml)
    vocabulary = Vocabulary.from_keys(ggml)
    kind = ggml.get("model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(vocabulary, ggml)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(vocabulary, ggml)
    else:
        raise UnsupportedModelError(
            f"the GGUF file's tokenizer model is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are "
            "supported. Use the model's safetensors release with its tokenizer.json"
        )
    vocabulary.add_whole_tokens(tokenizer)
    _add_template(tokenizer, vocabulary, ggml, add_bos=ggml.get("add_bos_token", add_bos))
    return tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, their kinds, and which of them are recognised whole in the text before anything else."""

    tokens: Sequence[str]
    types: Sequence[TokenType]

    @classmethod
    def from_keys(cls, ggml: Mapping[str, Any]) -> Vocabulary:
        tokens = ggml.get("tokens")
        if not tokens:
            raise CheckpointError("the GGUF file has no tokenizer.ggml.tokens; it was written without its vocabulary")
        if len(set(tokens)) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
            raise CheckpointError(f"the GGUF file's vocabulary has the token {twice!r} twice; convert the model again")
        types = ggml.get("token_type") or [TokenType.NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise CheckpointError(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
        try:
            return cls(tokens, [TokenType(value) for value in types])
        except ValueError as error:
            raise UnsupportedModelError(f"the GGUF file's tokenizer.ggml.token_type: {error}") from error

    def token(self, token_id: int, key: str) -> str:
        if not 0 <= token_id < len(self.tokens):
            raise CheckpointError(f"tokenizer.ggml.{key} is {token_id}, but there are {len(self.tokens)} tokens")
        return self.tokens[token_id]

    def add_whole_tokens(self, tokenizer: Tokenizer) -> None:
        """Control tokens and the unknown token are special; user-defined ones are ordinary text that is never cut."""
        pairs = list(zip(self.tokens, self.types, strict=True))
        special = [token for token, kind in pairs if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        plain = [token for token, kind in pairs if kind is TokenType.USER_DEFINED]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])


def _check_keys(ggml: Mapping[str, Any]) -> None:
    for key, value in ggml.items():
        if key in _USED_KEYS:
            _check_type(key, value)
            continue
        if key in _OFF_KEYS and not value:
            continue
        raise UnsupportedModelError(
            f"the GGUF file sets tokenizer.ggml.{key}, which is not supported and may change the tokens. "
            "Use the model's safetensors release with its tokenizer.json"
        )


def _check_type(key: str, value: Any) -> None:
    """Raises CheckpointError for a value of another type than the specification gives the key."""
    if key in _LISTS:
        right = isinstance(value, list) and all(isinstance(entry, _LISTS[key]) for entry in value)
    elif key in ("model", "pre"):
        right = isinstance(value, str)
    else:
        right = isinstance(value, bool if key.startswith("add_") else int)
    if not right:
        raise CheckpointError(f"the GGUF file's tokenizer.ggml.{key} has the wrong type; convert the model again")


def _byte_level_bpe(vocabulary: Vocabulary, ggml: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = ggml.get("pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        shown = "no tokenizer.ggml.pre" if name is None else f"the pre-tokenizer {name!r}"
        raise UnsupportedModelError(
            f"the GGUF file has {shown}; a guess would give wrong tokens. Known are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Use the model's safetensors release with its tokenizer.json"
        )
    if ggml.get("add_space_prefix"):
        raise UnsupportedModelError("the GGUF file asks for a space before byte-level text, which is not supported")
    pre = PRE_TOKENIZERS[name]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges: list[tuple[str, str]] = []
    for line in ggml.get("merges", ()):
        # From the second character on: the left half may not be empty but may be any character.
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"the GGUF file's merge {line!r} names tokens that are not in its vocabulary")
        merges.append((left, right))
    if not merges:
        raise CheckpointError("the GGUF file has no tokenizer.ggml.merges; it was written without them")
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece_bpe(vocabulary: Vocabulary, ggml: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: of all neighbours whose join is a token, the join with the best score comes first.

    As merges with ranks this is exact if no two joins have one score, which is checked.
    """
    if TokenType.UNUSED in vocabulary.types:
        raise UnsupportedModelError(
            "the GGUF file's SentencePiece vocabulary has unused pieces, which are not supported"
        )
    if TokenType.BYTE not in vocabulary.types:
        raise UnsupportedModelError("the GGUF file's SentencePiece vocabulary has no byte pieces; it is not supported")
    scores = ggml.get("scores") or ()
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"the GGUF file has {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.token(ggml.get("unknown_token_id", 0), "unknown_token_id")
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "\u2581")
    unspell = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if ggml.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
        tokenizer.decoder = decoders.Sequence([*unspell, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Sequence([space])
        tokenizer.decoder = decoders.Sequence(unspell)
    return tokenizer, True


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    pairs = zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
    score_of = {token: score for token, score, kind in pairs if kind is TokenType.NORMAL}
    joins = [
        (score, [(token[:cut], token[cut:]) for cut in range(1, len(token))])
        for token, score in score_of.items()
        if len(token) > 1
    ]
    ranked = [
        (score, [(left, right) for left, right in cuts if left in score_of and right in score_of])
        for score, cuts in joins
    ]
    ranked = sorted((entry for entry in ranked if entry[1]), key=lambda entry: -entry[0])
    if any(first[0] == second[0] for first, second in itertools.pairwise(ranked)):
        raise UnsupportedModelError(
            "the GGUF file's SentencePiece vocabulary gives several pieces one score, so its merges have no order. "
            "Use the model's safetensors release with its tokenizer files"
        )
    return [cut for _, cuts in ranked for cut in cuts]


def _add_template(tokenizer: Tokenizer, vocabulary: Vocabulary, ggml: Mapping[str, Any], *, add_bos: bool) -> None:
    """Let `add_special_tokens` put BOS before and EOS behind the text, as far as the file asks for it."""
    around: dict[str, tuple[str, int]] = {}
    for wanted, key in ((add_bos, "bos_token_id"), (ggml.get("add_eos_token", False), "eos_token_id")):
        if not wanted:
            continue
        if key not in ggml:
            raise CheckpointError(f"the GGUF file asks for a token around the text but has no tokenizer.ggml.{key}")
        around[key] = (vocabulary.token(ggml[key], key), ggml[key])
    if not around:
        return
    before = [around["bos_token_id"][0]] if "bos_token_id" in around else []
    behind = [around["eos_token_id"][0]] if "eos_token_id" in around else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *[f"{token}:1" for token in before], "$B:1", *[f"{token}:1" for token in behind]],
        special_tokens=list(dict.fromkeys(around.values())),
    )
