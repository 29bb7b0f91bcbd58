"""A tokenizer.json that says all gives the ids that transformers gives; whatever may change them is left to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from adapters.plain_tokenizer import MODEL_TYPES, read_plain_tokenizer
from registry.errors import CheckpointError

_TEXTS = ["", " ", "Hello, world!", "  two  spaces ", "<s>a</s>b<|eot|> c", "日本語 🙂\n\t", "don't 12345"]
_EOT = {"content": "<|eot|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_EOT |= {"special": True}


def _compare(path: Path) -> None:
    plain = read_plain_tokenizer(path)
    assert plain is not None
    backend, special = plain
    theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
    for text in _TEXTS:
        for add_special_tokens in (True, False):
            ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
            assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        assert backend.decode(ids) == theirs.backend_tokenizer.decode(ids)
    assert backend.get_added_tokens_decoder() == theirs.backend_tokenizer.get_added_tokens_decoder()
    for role, index in special.items():
        assert index == getattr(theirs, f"{role}_id")


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_ids_are_those_of_transformers(tiny_llama: Path, edit_json: Callable[..., None], model_type: str) -> None:
    edit_json(tiny_llama / "config.json", model_type=model_type)
    _compare(tiny_llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"pad_token": "</s>", "unk_token": "<s>"},
        {"bos_token": None, "eos_token": None},
        {"added_tokens_decoder": {"258": _EOT}},
        {"model_max_length": 128, "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids"]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_without_effect(tiny_llama: Path, edit_json: Callable[..., None], changes: dict[str, Any]) -> None:
    edit_json(tiny_llama / "tokenizer_config.json", **changes)
    _compare(tiny_llama)


def test_a_template_around_the_text(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 256)])
    tokenizer.enable_truncation(7)
    tokenizer.save(str(tiny_llama / "tokenizer.json"))
    plain = read_plain_tokenizer(tiny_llama)
    assert plain is not None
    assert plain[0].encode("a").ids[0] == 256


def test_the_small_model(smollm2_dir: Path) -> None:
    _compare(smollm2_dir)


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_transformers_has_no_class_of_its_own_for_the_family(model_type: str) -> None:
    assert TOKENIZER_MAPPING_NAMES.get(model_type) in (None, "TokenizersBackend")
    assert model_type not in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": None},
        {"add_bos_token": True},
        {"legacy": False},
        {"pad_token": "<pad>"},
        {"bos_token": "A"},  # in the vocabulary, but no added token yet
        {"added_tokens_decoder": {"258": {**_EOT, "lstrip": True}}},
        {"added_tokens_decoder": {"300": _EOT}},
        {"added_tokens_decoder": ["<|eot|>"]},
        {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_may_change_it_is_left_to_transformers(
    tiny_llama: Path, edit_json: Callable[..., None], changes: dict[str, Any]
) -> None:
    edit_json(tiny_llama / "tokenizer_config.json", **changes)
    assert read_plain_tokenizer(tiny_llama) is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_older_files_beside_it(tiny_llama: Path, name: str) -> None:
    (tiny_llama / name).write_text("{}")
    assert read_plain_tokenizer(tiny_llama) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_not_there(tiny_llama: Path, name: str) -> None:
    (tiny_llama / name).unlink()
    assert read_plain_tokenizer(tiny_llama) is None


def test_other_families_and_padding(tiny_llama: Path, edit_json: Callable[..., None]) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=257, pad_token="</s>")
    tokenizer.save(str(tiny_llama / "tokenizer.json"))
    assert read_plain_tokenizer(tiny_llama) is None
    tokenizer.no_padding()
    tokenizer.save(str(tiny_llama / "tokenizer.json"))
    edit_json(tiny_llama / "config.json", model_type="qwen2")
    assert read_plain_tokenizer(tiny_llama) is None


def test_a_damaged_file_is_named(tiny_llama: Path) -> None:
    content = json.loads((tiny_llama / "tokenizer.json").read_text())
    content["model"]["type"] = "Nothing"
    (tiny_llama / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_plain_tokenizer(tiny_llama)
