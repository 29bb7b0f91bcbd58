"""A tiny random llama with a byte-level tokenizer, as a checkpoint directory that each test may damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ("<s>", "</s>", "<|eot|>", "<|im_end|>")
VOCAB_SIZE = 272  # 256 bytes, the special tokens, and padding rows
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def _tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def tiny_llama(_tiny_llama: Path, tmp_path: Path) -> Path:
    """A fresh copy: bfloat16 safetensors, context 128, BOS 256, EOS 257, <|eot|> 258, <|im_end|> 259."""
    return Path(shutil.copytree(_tiny_llama, tmp_path / "model"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(file, key=value, ...): set keys of a JSON file; None removes the key."""

    def edit(file: Path, **changes: Any) -> None:
        content = json.loads(file.read_text()) if file.exists() else {}
        content.update(changes)
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit
