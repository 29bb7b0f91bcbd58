"""Tokenizers from directories and GGUF files: right ids, exact bytes, and nothing guessed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from adapters.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from adapters.token_bytes import byte_alphabet
from adapters.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.tiny_gguf import CORPUS, SPECIAL, byte_level_metadata, train_byte_level, write_gguf

_ZEROS = np.zeros((4, 4), np.float32)
_TEXTS = [
    *CORPUS,
    "",
    " ",
    "   leading and trailing   ",
    "\n\n \t x\r\n y",
    "a1b22c333d4444 ²³ ½ Ⅷ ٣٤",
    "don't DON'T we'Ll ſ'ſ",
    "!!! ... ?! --- $$ ~~ `code` (a)[b]{c}",
    "日本語テキスト 中文 한국어 🙂👩‍👩‍👧 𝔘𝔫𝔦",
    "e\u0301 cafe\u0301 é",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "\u00a0nbsp\u2003em zero\u200bwidth",
]


_PARTS = (
    *("a", "b", "The", "don't", "'re", "\n", "\t", "1", "23", "456", "7890", "é", "e\u0301", "ß", "ж", "中", "🙂"),
    *(".", ",", "!?", "$", "<=>", "\u00a0", "'", " ", " ", "  "),
)


def _random_texts(count: int) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices(_PARTS, k=rng.randint(1, 12))) for _ in range(count)]


# What the tokenizer.json of the models says that a name stands for, written with the library's own parts.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_ORIGINALS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "llama-bpe": _split(_CL100K),
    "dbrx": _split(_CL100K),
    "qwen2": _split(_CL100K.replace("{1,3}", "")),
}


@pytest.mark.parametrize("pre", list(_ORIGINALS))
def test_byte_level_ids_equal_those_of_the_original_tokenizer(pre: str) -> None:
    original = train_byte_level(_ORIGINALS[pre])
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    rebuilt = tokenizer_from_gguf(byte_level_metadata(original, pre))
    for text in [*_TEXTS, *_random_texts(300)]:
        assert rebuilt.encode(text).ids == original.encode(text).ids, text


def test_every_known_split_keeps_all_text() -> None:
    original = train_byte_level(_BYTE_LEVEL)
    for name in PRE_TOKENIZERS:
        rebuilt = tokenizer_from_gguf(byte_level_metadata(original, name))
        for text in _TEXTS:
            ids = rebuilt.encode(text).ids
            expected = text if rebuilt.normalizer is None else rebuilt.normalizer.normalize_str(text)
            assert rebuilt.decode(ids, skip_special_tokens=False) == expected


def test_the_pre_tokenizer_matters() -> None:
    metadata = byte_level_metadata(train_byte_level(_BYTE_LEVEL), "gpt-2")
    digits = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "smollm"})
    assert tokenizer_from_gguf(metadata).encode("12345").ids != digits.encode("12345").ids


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.pre": "gpt-99"}, UnsupportedModelError, "'gpt-99'"),
        ({"tokenizer.ggml.pre": None}, UnsupportedModelError, "guess"),
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModelError, "'t5'"),
        ({"tokenizer.ggml.precompiled_charsmap": [1]}, UnsupportedModelError, "precompiled_charsmap"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, UnsupportedModelError, "remove_extra_whitespaces"),
        ({"tokenizer.ggml.add_space_prefix": True}, UnsupportedModelError, "space"),
        ({"tokenizer.ggml.tokens": None}, CheckpointError, "without its vocabulary"),
        ({"tokenizer.ggml.merges": ["a zzzzzz"]}, CheckpointError, "a zzzzzz"),
        ({"tokenizer.ggml.merges": None}, CheckpointError, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "1 token types"),
        ({"tokenizer.ggml.token_type": [9] * 400}, UnsupportedModelError, "token_type"),
        ({"tokenizer.ggml.tokens": 5}, CheckpointError, "wrong type"),
        ({"tokenizer.ggml.merges": [1, 2]}, CheckpointError, "wrong type"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, CheckpointError, "wrong type"),
        ({"tokenizer.ggml.bos_token_id": "1"}, CheckpointError, "wrong type"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 4000}, CheckpointError, "4000"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    metadata = byte_level_metadata(train_byte_level(_BYTE_LEVEL), "gpt-2") | changes
    with pytest.raises(error, match=message):
        tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None})


def test_bos_and_eos_around_the_text(tmp_path: Path) -> None:
    metadata = byte_level_metadata(train_byte_level(_BYTE_LEVEL), "llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]  # for this name the default is to add it
    path = write_gguf(tmp_path / "t.gguf", "llama", metadata | {"tokenizer.ggml.add_eos_token": True}, {"w": _ZEROS})
    tokenizer = load_tokenizer(path)
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [1, *plain, 2]
    assert tokenizer.decode([1, *plain, 2]) == "Hello"
    assert tokenizer.decode([1, *plain, 2], skip_special_tokens=False) == "<|im_start|>Hello<|im_end|>"


def test_saving_and_loading_keeps_every_id(tmp_path: Path) -> None:
    original = train_byte_level(_BYTE_LEVEL)
    metadata = byte_level_metadata(original, "smollm") | {"tokenizer.ggml.add_bos_token": True}
    first = load_tokenizer(write_gguf(tmp_path / "t.gguf", "llama", metadata, {"w": _ZEROS}))
    save_tokenizer(first, tmp_path, model_max_length=128)
    (tmp_path / "t.gguf").unlink()
    again = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 128
    for text in [*_TEXTS, *_random_texts(100)]:
        assert again.encode(text) == first.encode(text) == theirs(text)["input_ids"]
    for ours in (first, again):
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, None)
        assert ours.special_ids == {0, 1, 2}
        assert ours.vocab_size == 400


def test_bytes_of_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    metadata = byte_level_metadata(train_byte_level(_BYTE_LEVEL), "gpt-2")
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", "llama", metadata, {"w": _ZEROS}))
    for text in _TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(1) == b"<|im_start|>"
    assert tokenizer.token_str(1) == "<|im_start|>"
    for unknown in (400, 10**6):
        assert tokenizer.token_bytes(unknown) == b""
        assert tokenizer.token_str(unknown) == ""


def test_text_is_the_bytes_of_the_tokens_where_the_decoder_only_joins_them() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))

    def text_is_bytes(decoder: decoders.Decoder | None, *added: str) -> bool:
        tokenizer = tokenizers.Tokenizer.from_str(backend.to_str())
        tokenizer.add_tokens(list(added))
        tokenizer.decoder = decoder
        return Tokenizer(tokenizer, bos_token_id=None, eos_token_id=None, pad_token_id=None).text_is_bytes

    assert text_is_bytes(decoders.ByteLevel(), "<|plain|>", "two words", "日本")
    assert not text_is_bytes(decoders.ByteLevel(), "é")  # decoded as the byte that is written so
    assert not text_is_bytes(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]))
    assert not text_is_bytes(decoders.Metaspace())
    assert not text_is_bytes(None)


def test_byte_alphabet_covers_all_bytes_once() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["!"]) == (32, 10, 33)


def test_token_vectors_of_the_small_model(
    smollm2_gguf: Path, smollm2_dir: Path, smollm2_token_vectors: list[tuple[str, list[int]]]
) -> None:
    for path in (smollm2_gguf, smollm2_dir):
        tokenizer = load_tokenizer(path)
        assert len(smollm2_token_vectors) == 30
        for text, ids in smollm2_token_vectors:
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_directories_without_a_tokenizer_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def _sentencepiece(tmp_path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A SentencePiece model trained on the corpus, and the metadata that a GGUF file of it has."""
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=460,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.98, allow_whitespace_only_pieces=True, minloglevel=2, **options,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = model.get_piece_size()

    def kind(index: int) -> int:
        return 2 if model.is_unknown(index) else 3 if model.is_control(index) else 6 if model.is_byte(index) else 1

    return model, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": [float(model.get_score(index)) for index in range(size)],
        "tokenizer.ggml.token_type": [kind(index) for index in range(size)],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_those_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    model, metadata = _sentencepiece(tmp_path, add_dummy_prefix=prefix)
    metadata["tokenizer.ggml.add_space_prefix"] = prefix
    path = write_gguf(tmp_path / "t.gguf", "llama", metadata, {"w": _ZEROS})
    tokenizer = load_tokenizer(path)
    for text in [text for text in [*_TEXTS, *_random_texts(500)] if "<|" not in text]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == model.encode(text), text
        assert tokenizer.encode(text) == [model.bos_id(), *ids]
        assert tokenizer.decode(ids) == text
        spelled = b"".join(map(tokenizer.token_bytes, ids))
        assert spelled == (b" " if prefix and text else b"") + text.encode()


def test_sentencepiece_without_an_order_of_merges_is_refused(tmp_path: Path) -> None:
    _, metadata = _sentencepiece(tmp_path)
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.scores"])
    with pytest.raises(UnsupportedModelError, match="one score"):
        tokenizer_from_gguf(metadata)


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    metadata = byte_level_metadata(train_byte_level(_BYTE_LEVEL), "gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think> x"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", "llama", metadata, {"w": _ZEROS}))
    ids = tokenizer.encode("a<think> xb")
    assert 400 in ids
    assert tokenizer.decode(ids) == "a<think> xb"
    assert tokenizer.token_bytes(400) == b"<think> x"
    assert 400 not in tokenizer.special_ids


def test_truncation_and_padding_settings_of_the_file_are_not_applied(tmp_path: Path) -> None:
    original: tokenizers.Tokenizer = train_byte_level(_BYTE_LEVEL)
    original.enable_truncation(2)
    original.enable_padding(length=8, pad_token=SPECIAL[0], pad_id=0)
    original.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = load_tokenizer(tmp_path)
    text = "The quick brown fox jumps"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1
