"""Each template of the library against the text that its model's documentation gives for the same conversation."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from adapters.chat_template import ChatTemplate
from adapters.template_library import load_named_template, load_template, template_entries, template_names
from registry.errors import CheckpointError, InvalidRequestError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "How are you?"},
]

S_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nHow are you?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA_2 = (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] How are you? [/INST]"
)  # fmt: skip
VICUNA = "<s>Be brief. USER: Hi ASSISTANT: Hello!</s>USER: How are you? ASSISTANT:"

# name: (special tokens of such a model, the whole prompt)
GOLDEN: dict[str, tuple[Mapping[str, str], str]] = {
    "chatml": ({"eos_token": "<|im_end|>"}, CHATML),
    "yi": ({"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}, CHATML),
    "qwen-2": ({"eos_token": "<|im_end|>"}, CHATML),
    "qwen-3": ({"eos_token": "<|im_end|>"}, CHATML),
    "internlm": (S_TOKENS, "<s>" + CHATML),
    "llama-2": (S_TOKENS, LLAMA_2),
    "codellama": (S_TOKENS, LLAMA_2),
    "llama-3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-4": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"},
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nHello!<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHow are you?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
    ),
    "mistral": (S_TOKENS, "<s>[INST] Hi[/INST] Hello!</s>[INST] Be brief.\n\nHow are you?[/INST]"),
    "mixtral-instruct": (S_TOKENS, "<s> [INST] Be brief.\n\nHi [/INST] Hello!</s> [INST] How are you? [/INST]"),
    "vicuna-v1.1": (S_TOKENS, VICUNA),
    "wizardlm": (S_TOKENS, VICUNA),
    "koala": (S_TOKENS, "<s>BEGINNING OF CONVERSATION: Be brief. USER: Hi GPT:Hello!</s>USER: How are you? GPT:"),
    "alpaca": (
        S_TOKENS,
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!\n\n"
        "### Instruction:\nHow are you?\n\n### Response:\n",
    ),
    "dolly": (
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!\n\n### End\n\n"
        "### Instruction:\nHow are you?\n\n### Response:\n",
    ),
    "solar": (
        S_TOKENS,
        "<s>### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello!\n\n"
        "### User:\nHow are you?\n\n### Assistant:\n",
    ),
    "one-shot": (
        S_TOKENS,
        "<s>Be brief.\n### Human: Can you name two ways to keep bread fresh?\n"
        "### Assistant: Yes. Wrapped in a cloth in a bread box it stays good for two or three days. "
        "Sliced and frozen it keeps for about three months; toast the slices straight from the freezer.\n"
        "### Human: Hi\n### Assistant: Hello!\n### Human: How are you?\n### Assistant:",
    ),
    "zephyr": (
        S_TOKENS,
        "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n"
        "<|user|>\nHow are you?</s>\n<|assistant|>\n",
    ),
    "tulu": (
        S_TOKENS,
        "<s><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!</s>\n<|user|>\nHow are you?\n<|assistant|>\n",
    ),
    "phi-3": (
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nHow are you?<|end|>\n<|assistant|>\n",
    ),
    "starchat": (
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nHow are you?<|end|>\n<|assistant|>",
    ),
    "chatglm": (
        {"eos_token": "</s>"},
        "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello!<|user|>\n How are you?<|assistant|>",
    ),
    "gemma": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek": (
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜>"
        "<｜User｜>How are you?<｜Assistant｜>",
    ),
    "command-r": (
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello!<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>How are you?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "falcon": (
        {"eos_token": "<|endoftext|>"},
        "Be brief.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: How are you?\n\nAssistant:",
    ),
    "openchat": (
        {"bos_token": "<s>", "eos_token": "<|end_of_turn|>"},
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>"
        "GPT4 Correct Assistant: Hello!<|end_of_turn|>GPT4 Correct User: How are you?<|end_of_turn|>"
        "GPT4 Correct Assistant:",
    ),
    "baichuan": (S_TOKENS, "Be brief.<reserved_106>Hi<reserved_107>Hello!<reserved_106>How are you?<reserved_107>"),
    "raw": (S_TOKENS, "Be brief.HiHello!How are you?"),
}

# What the format puts in front of the first question when no system message is given.
WITHOUT_SYSTEM = {
    "qwen-2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi",
    "qwen-3": "<|im_start|>user\nHi",
    "llama-2": "<s>[INST] Hi [/INST]",
    "mistral": "<s>[INST] Hi[/INST]",
    "mixtral-instruct": "<s> [INST] Hi [/INST]",
    "vicuna-v1.1": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Hi ",
    "koala": "<s>BEGINNING OF CONVERSATION: USER: Hi ",
    "starchat": "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n",
    "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n",
    "falcon": "User: Hi\n\n",
    "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nHi\n\n",
}


def test_every_template_of_the_library_has_a_golden_text() -> None:
    assert set(template_names()) == set(GOLDEN)
    files = {entry.name for entry in (resources.files("adapters") / "templates").iterdir()}
    assert files == {f"{name}.jinja" for name in GOLDEN} | {"templates.toml"}
    for entry in template_entries().values():
        assert entry.description


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden(name: str) -> None:
    special_tokens, expected = GOLDEN[name]
    template = load_named_template(name, special_tokens=special_tokens)
    assert template.render(CHAT) == expected


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_transformers_renders_the_same(name: str) -> None:
    special_tokens, expected = GOLDEN[name]
    template = load_named_template(name, special_tokens=special_tokens)
    rendered, _ = render_jinja_template(
        [CHAT],
        chat_template=template.source,
        add_generation_prompt=True,
        default_system_message=template.default_system_message,
        **special_tokens,
    )
    assert rendered == [expected]


@pytest.mark.parametrize("name", sorted(WITHOUT_SYSTEM))
def test_without_a_system_message(name: str) -> None:
    template = load_named_template(name, special_tokens=S_TOKENS)
    expected = WITHOUT_SYSTEM[name]
    assert template.render(CHAT[1:2], add_generation_prompt=False) == expected + (
        "<|im_end|>\n" if name.startswith("qwen") else ""
    )


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"raw"}))
def test_the_reply_can_be_continued(name: str) -> None:
    """A conversation that ends in half a reply is its generation prompt plus that half (but for a joining blank)."""
    special_tokens, expected = GOLDEN[name]
    template = load_named_template(name, special_tokens=special_tokens)
    chat = [*CHAT, {"role": "assistant", "content": "I am"}]
    text = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("I am")
    between = text.removesuffix("I am").removeprefix(expected)
    assert between in {"", " ", "\n", "\n ", "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("name", ["llama-2", "mistral", "mixtral-instruct", "gemma", "vicuna-v1.1", "baichuan"])
def test_roles_that_do_not_alternate_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        load_named_template(name).render([CHAT[1], CHAT[3]])


def test_qwen_3_shows_reasoning_only_after_the_last_question() -> None:
    template = load_named_template("qwen-3")
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert template.render(chat) == start + "<|im_start|>assistant\n"
    assert template.render(chat, enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    chat.append({"role": "assistant", "content": "d", "reasoning_content": "why"})
    assert template.render(chat, add_generation_prompt=False) == (
        start + "<|im_start|>assistant\n<think>\nwhy\n</think>\n\nd<|im_end|>\n"
    )


def test_deepseek_leaves_earlier_reasoning_out() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b"}]
    assert (
        load_named_template("deepseek")
        .render(chat, add_generation_prompt=False)
        .endswith("<｜Assistant｜>b<｜end▁of▁sentence｜>")
    )


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean llama-3"):
        load_named_template("llama-33")


def test_a_file_is_taken_where_no_name_fits(tmp_path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}!")
    template = load_template(str(file))
    assert isinstance(template, ChatTemplate)
    assert (template.name, template.render(CHAT)) == ("mine.jinja", "Be brief.!")
    assert load_template("chatml").name == "chatml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_template(str(file))
