"""The command line: what it prints, and one line with exit status 1 when it cannot."""

from __future__ import annotations

import json

import pytest

from adapters.__main__ import main
from adapters.template_library import template_names


def test_list(capsys) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in template_names():
        assert f"  {name} " in out
    assert "LlamaForCausalLM" in out
    assert main(["list", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert set(listing["chat_templates"]) == set(template_names())
    assert listing["families"]["gptj"]["refused"]


def test_show(tiny_llama, capsys) -> None:
    assert main(["show", str(tiny_llama), "--dtype", "float32", "--max-model-len", "64"]) == 0
    rows = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: text.strip() for name, text in rows.items()}
    assert shown["family"] == "llama (LlamaForCausalLM)"
    assert shown["dtype"] == "float32"
    assert shown["context"] == "64 tokens"
    assert shown["chat template"] == "chat_template.jinja"
    assert shown["stop ids"] == "257"
    assert shown["memory"].endswith("available: fits")


def test_show_says_what_a_worker_would_do(smollm2_gguf, capsys) -> None:
    """Whatever this machine multiplies: the native decoder takes half precision and blocks as they are."""
    assert main(["show", str(smollm2_gguf), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["dtype"], shown["kept_types"]) == ("bfloat16", ["Q4_0", "Q4_1", "Q8_0"])
    assert shown["memory"]["weights_bytes"] < 100e6


def test_show_as_json(tiny_llama, capsys) -> None:
    assert main(["show", str(tiny_llama), "--json", "--chat-template", "chatml"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["chat_template"] == {"name": "chatml", "stop": ["<|im_end|>"]}
    assert shown["stop_token_ids"] == [257, 259]
    memory = shown["memory"]
    assert memory["needed_bytes"] == (
        memory["weights_bytes"] + 128 * memory["kv_bytes_per_token"] + memory["activations_bytes"]
    )


def test_render(tiny_llama, capsys) -> None:
    assert main(["render", str(tiny_llama), "--message", "a", "--message", "b", "--system", "S"]) == 0
    assert capsys.readouterr().out == "<s><system>S<user>a<assistant>b"


def test_render_a_template_of_the_library(tiny_llama, capsys) -> None:
    assert main(["render", "chatml", "--message", "a"]) == 0
    turn = "<|im_start|>user\na<|im_end|>\n"
    assert capsys.readouterr().out == turn + "<|im_start|>assistant\n"
    assert (
        main(["render", str(tiny_llama), "--chat-template", "chatml", "--message", "a", "--no-generation-prompt"]) == 0
    )
    assert capsys.readouterr().out == turn


def test_convert(tiny_llama, tmp_path, capsys) -> None:
    assert main(["convert", str(tiny_llama), str(tmp_path / "new"), "--dtype", "float16"]) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tensors"] == 21


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "/nonexistent"], "error: /nonexistent does not exist"),
        (["render", "/nonexistent", "--message", "a"], "error: /nonexistent does not exist"),
        (["convert", "/nonexistent", "/nonexistent2"], "error: /nonexistent does not exist"),
    ],
)
def test_errors_are_one_line(argv, message, capsys) -> None:
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_a_model_without_a_template_is_not_rendered(tiny_llama, capsys) -> None:
    (tiny_llama / "chat_template.jinja").unlink()
    assert main(["render", str(tiny_llama), "--message", "a"]) == 1
    assert "--chat-template NAME|FILE" in capsys.readouterr().err
