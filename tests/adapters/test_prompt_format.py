from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from adapters import plan_load
from adapters.prompt_format import PromptFormat, read_prompt_format
from adapters.tokenizer import load_tokenizer
from registry.errors import CheckpointError, UnsupportedModelError
from tests.fakes.byte_tokenizer import EOS_TOKEN_ID, ByteTokenizer
from tests.fakes.load_plans import make_plan

PIRATE = "{% for message in messages %}Arr, {{ message.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "Hello"}]


def write(directory: Path, **files: Any) -> None:
    """Each file by its name without suffix: a template as text, others as JSON."""
    for name, content in files.items():
        is_template = name == "chat_template"
        text = content if is_template else json.dumps(content, indent=2)
        (directory / f"{name}.{'jinja' if is_template else 'json'}").write_text(text)


def read(directory: Path, **options: bool) -> PromptFormat:
    return read_prompt_format(directory, make_plan(), ByteTokenizer(), **options)


def test_an_adapter_without_tokenizer_files_is_prompted_like_its_base(tmp_path: Path) -> None:
    write(tmp_path, adapter_config={})
    assert read(tmp_path) == PromptFormat()


@pytest.mark.parametrize("where", ["chat_template", "tokenizer_config"])
def test_a_template_of_its_own_with_its_own_special_tokens(tmp_path: Path, where: str) -> None:
    config = {"eos_token": {"content": "a"}}
    if where == "chat_template":
        write(tmp_path, chat_template=PIRATE, tokenizer_config=config)
    else:
        write(tmp_path, tokenizer_config=config | {"chat_template": PIRATE})
    found = read(tmp_path)
    assert found.chat_template is not None
    assert found.chat_template.render([{"role": "user", "content": "ahoy"}]) == "Arr, ahoya"
    assert found.stop_token_ids == (ord("a"),)


def test_the_bases_special_tokens_are_there_for_a_template_that_comes_alone(tmp_path: Path) -> None:
    write(tmp_path, chat_template=PIRATE)
    found = read(tmp_path)
    assert found.chat_template is not None
    assert found.chat_template.render([{"role": "user", "content": "ahoy"}]) == "Arr, ahoy</s>"
    assert found.stop_token_ids == ()


def test_an_end_that_is_the_bases_is_not_said_again(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "</s>"})
    assert EOS_TOKEN_ID in make_plan().stop_token_ids
    assert read(tmp_path).stop_token_ids == ()


def test_a_template_that_another_replaces_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, chat_template="{% if %}", tokenizer_config={"eos_token": "b"})
    with pytest.raises(CheckpointError, match="--chat-template"):
        read(tmp_path)
    assert read(tmp_path, with_template=False) == PromptFormat(None, (ord("b"),))


NEW = {"content": "<pirate>", "special": True}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pirate>": 258}},
        {"tokenizer_config": {"added_tokens_decoder": {"258": NEW}}},
        {"added_tokens": {"</s>": 256}},
    ],
)
def test_new_tokens_without_a_tokenizer_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, **files)
    with pytest.raises(UnsupportedModelError, match=r"a tokenizer\.json with it is needed"):
        read(tmp_path)


def with_tokens(directory: Path, *texts: str) -> None:
    """Write a tokenizer that has these tokens besides."""
    tokenizer = ByteTokenizer()
    tokenizer.backend.add_special_tokens(list(texts))
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    write(directory, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": texts[0]})


def test_tokens_of_its_own_come_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    with_tokens(tmp_path, "<pirate>", "<parrot>")
    found = read(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("a<parrot>") == [ord("a"), 259]
    assert found.tokenizer.decode([258], skip_special_tokens=False) == "<pirate>"
    assert found.stop_token_ids == (258,)


def test_tokens_for_which_the_base_has_no_rows_are_refused(tmp_path: Path) -> None:
    with_tokens(tmp_path, "<pirate>", "<parrot>", "<plank>")
    with pytest.raises(UnsupportedModelError, match=r"260 rows are there"):
        read(tmp_path)


def test_an_adapter_with_rows_of_its_own(tmp_path: Path) -> None:
    """Of a saved embedding, of a copy of the base's resized one, or trained by themselves."""
    with_tokens(tmp_path, "<pirate>", "<parrot>", "<plank>")
    name = "base_model.model.model.embed_tokens"
    save_file({f"{name}.weight": torch.zeros(261, 4)}, tmp_path / "adapter_model.safetensors")
    assert read(tmp_path).tokenizer is not None
    save_file({f"{name}.token_adapter.base_layer.weight": torch.zeros(261, 4)}, tmp_path / "adapter_model.safetensors")
    assert read(tmp_path).tokenizer is not None
    save_file({f"{name}.weight": torch.zeros(260, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"260 rows are there"):
        read(tmp_path)
    write(tmp_path, adapter_config={"peft_type": "LORA", "trainable_token_indices": [5, 260]})
    assert read(tmp_path).tokenizer is not None


def test_tokens_of_the_base_and_padding_are_nothing_new(tmp_path: Path) -> None:
    write(
        tmp_path,
        added_tokens={"<s>": 256, "[PAD]": 258},
        tokenizer_config={"pad_token": "[PAD]", "added_tokens_decoder": {"257": {"content": "</s>"}}},
    )
    ByteTokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    assert read(tmp_path) == PromptFormat()


def test_an_end_that_is_no_token_of_the_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "<over>"})
    with pytest.raises(UnsupportedModelError, match="eos_token"):
        read(tmp_path)


@pytest.mark.parametrize("text", ['{"added_tokens": [', '{"added_tokens": [{"id": 1, ]'])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError):
        read(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read(tmp_path)


def test_the_files_that_training_saves_of_the_bases_own_tokenizer_change_nothing(
    smollm2_dir: Path, smollm2_gguf: Path, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(tmp_path)
    for base in (smollm2_dir, smollm2_gguf):
        plan = plan_load(base)
        assert plan.chat_template is not None
        found = read_prompt_format(tmp_path, plan, load_tokenizer(base))
        assert found.stop_token_ids == ()
        assert found.chat_template is not None
        assert found.chat_template.render(CHAT) == plan.chat_template.render(CHAT)
