"""plan_load on whole checkpoints: what it decides, and that every kind of damage gets its own clear error."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from adapters import plan_load, require_chat_template
from adapters.plan_report import plan_rows
from registry.errors import CheckpointError, InsufficientMemoryError, InvalidRequestError, UnsupportedModelError

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello\n"},
    {"role": "user", "content": "é 漢\t"},
]


def test_the_whole_plan(tiny_llama) -> None:
    plan = plan_load(tiny_llama, native_bf16=True)
    num_values = sum(tensor.numel() for tensor in load_file(tiny_llama / "model.safetensors").values())
    assert plan.path == plan.tokenizer_path == tiny_llama
    assert plan.family.name == "llama"
    assert plan.config["model_type"] == "llama"
    assert plan.dtype == "bfloat16"
    assert plan.quantization is None
    assert plan.deltas == ()
    assert plan.chat_template is not None
    assert plan.chat_template.name == "chat_template.jinja"
    assert plan.chat_template.render(CHAT[:1]) == "<s><user>Hi"
    assert plan.stop_token_ids == (257,)
    assert plan.max_model_len == 128
    assert plan.memory.weights_bytes == 2 * num_values
    assert plan.memory.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2  # layers, k and v, heads, head_dim, bytes
    assert plan.memory.activations_bytes > 0


def test_the_real_model(smollm2_gguf) -> None:
    plan = plan_load(smollm2_gguf, native_bf16=False)
    assert (plan.family.name, plan.dtype, plan.max_model_len) == ("llama", "float32", 8192)
    assert plan.tokenizer_path == smollm2_gguf
    assert plan.stop_token_ids == (2,)
    assert plan.memory.weights_bytes == 134_515_008 * 4
    assert plan.memory.kv_bytes_per_token == 30 * 2 * 3 * 64 * 4
    template = require_chat_template(plan)
    expected, _ = render_jinja_template(
        [CHAT], chat_template=template.source, add_generation_prompt=True, **template.special_tokens
    )
    assert template.render(CHAT) == expected[0]
    assert expected[0].startswith("<|im_start|>system\n")


def test_the_prompt_equals_apply_chat_template(tiny_llama) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{% for m in messages %}[{{ m | tojson }}]\n{% endfor %}"
    (tiny_llama / "chat_template.jinja").write_text(source)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for chat in (CHAT, CHAT[:1]):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert require_chat_template(plan_load(tiny_llama)).render(chat) == expected


def test_a_directory_with_one_gguf_file(smollm2_gguf, tmp_path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    plan = plan_load(tmp_path)
    assert plan.tokenizer_path == tmp_path / "model.gguf"
    assert plan.chat_template is not None


def test_the_family_follows_the_config_not_the_path(tiny_llama, tmp_path) -> None:
    misleading = tiny_llama.rename(tmp_path / "mistral-7b-instruct-vicuna-gguf")
    assert plan_load(misleading).family.name == "llama"


def test_bin_checkpoints(tiny_llama) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    torch.save(weights, tiny_llama / "pytorch_model.bin")
    (tiny_llama / "model.safetensors").unlink()
    plan = plan_load(tiny_llama, native_bf16=True)
    assert plan.dtype == "bfloat16"  # as config.json says, because a pickle's own types are not read
    exact = 2 * sum(tensor.numel() for tensor in weights.values())
    assert exact <= plan.memory.weights_bytes < 1.5 * exact


# ------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("dtype", "native", "expected"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float16", True, "float16"),
        ("float32", True, "float32"),
    ],
)
def test_dtype(tiny_llama, dtype, native, expected) -> None:
    assert plan_load(tiny_llama, dtype=dtype, native_bf16=native).dtype == expected


def test_the_change_to_float32_is_logged(tiny_llama, caplog) -> None:
    with caplog.at_level(logging.INFO):
        plan_load(tiny_llama, native_bf16=False)
    assert "no bfloat16 instructions" in caplog.text
    assert "--dtype bfloat16" in caplog.text


# ----------------------------------------------------------------------------------------- quantization


def test_the_real_model_keeps_its_blocks_where_the_engine_computes_with_them(smollm2_gguf) -> None:
    plan = plan_load(smollm2_gguf, native_model_types={"llama"})
    assert (plan.quantization, plan.dtype) == (None, "bfloat16")
    assert plan.kept_types == {"Q8_0", "Q4_0", "Q4_1"}
    embedding, norms = 49152 * 576, 61 * 576
    matrices = 134_515_008 - embedding - norms
    assert plan.memory.weights_bytes == embedding * 34 // 32 + matrices * 20 // 32 + norms * 2
    assert dict(plan_rows(plan))["compression"] == "Q4_1, Q8_0 as the file has them"
    plain = plan_load(smollm2_gguf, native_model_types={"llama"}, quantization="none")
    assert (plain.kept_types, plain.memory.weights_bytes) == (frozenset(), 134_515_008 * 2)


@pytest.mark.parametrize(("quantization", "group_bytes"), [("int8", 34), ("int4", 20)])
def test_quantized_weights(tiny_llama, quantization, group_bytes) -> None:
    plan = plan_load(tiny_llama, quantization=quantization, native_bf16=True)
    shapes = {name: tensor.shape for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    expected = 0
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % 32 == 0:
            wide = name in ("model.embed_tokens.weight", "lm_head.weight")
            expected += shape.numel() // 32 * (34 if wide else group_bytes)
        else:  # norms, and the down projections of 48 inputs
            expected += shape.numel() * 2
    assert plan.quantization == quantization
    assert plan.memory.weights_bytes == expected
    assert dict(plan_rows(plan))["compression"] == quantization


def test_quantized_weights_of_a_bin_checkpoint(tiny_llama) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    torch.save(weights, tiny_llama / "pytorch_model.bin")
    (tiny_llama / "model.safetensors").unlink()
    plain, quantized = (plan_load(tiny_llama, quantization=kind, native_bf16=True) for kind in ("none", "int8"))
    assert quantized.memory.weights_bytes == plain.memory.weights_bytes * 34 // 64


def test_unknown_quantization(tiny_llama) -> None:
    with pytest.raises(InvalidRequestError, match="auto, none, int8, int4, fp8, not 'int3'"):
        plan_load(tiny_llama, quantization="int3")


def test_unknown_dtype(tiny_llama) -> None:
    with pytest.raises(InvalidRequestError, match="auto, float32, bfloat16, float16, not 'int8'"):
        plan_load(tiny_llama, dtype="int8")


# ------------------------------------------------------------------------------------------------- chat template


def test_a_template_asked_for_goes_before_the_models_own(tiny_llama, tmp_path) -> None:
    assert plan_load(tiny_llama, chat_template="chatml").chat_template.name == "chatml"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}!")
    assert plan_load(tiny_llama, chat_template=str(file)).chat_template.render(CHAT) == "<s>!"
    with pytest.raises(CheckpointError, match="no chat template named 'nothing'"):
        plan_load(tiny_llama, chat_template="nothing")


def test_where_the_models_own_template_is_looked_for(tiny_llama, edit_json, caplog) -> None:
    def source() -> str | None:
        template = plan_load(tiny_llama).chat_template
        return template.source if template else None

    config = tiny_llama / "tokenizer_config.json"
    edit_json(config, chat_template="config")
    edit_json(tiny_llama / "chat_template.json", chat_template="json")
    assert source().startswith("{{ bos_token }}")
    (tiny_llama / "chat_template.jinja").unlink()
    assert source() == "json"
    (tiny_llama / "chat_template.json").unlink()
    assert source() == "config"
    edit_json(config, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
    assert source() == "d"
    edit_json(config, chat_template=[{"name": "rag", "template": "r"}])
    assert source() is None
    assert "named rag" in caplog.text
    edit_json(config, chat_template=3)
    with pytest.raises(CheckpointError, match="neither a text nor a list"):
        source()
    edit_json(config, chat_template=None)
    assert source() is None


def test_a_base_model_has_no_template_and_says_how_to_give_one(tiny_llama, edit_json) -> None:
    (tiny_llama / "chat_template.jinja").unlink()
    plan = plan_load(tiny_llama)
    assert plan.chat_template is None
    with pytest.raises(InvalidRequestError, match=r"/v1/completions, or .*--chat-template NAME\|FILE"):
        require_chat_template(plan)


def test_a_broken_template_is_found_before_loading(tiny_llama) -> None:
    (tiny_llama / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="no valid Jinja template"):
        plan_load(tiny_llama)
    (tiny_llama / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        plan_load(tiny_llama)


# ------------------------------------------------------------------------------------------------- stop ids


def test_stop_ids_are_a_union(tiny_llama, edit_json) -> None:
    edit_json(tiny_llama / "config.json", eos_token_id=[5, -1])
    edit_json(tiny_llama / "generation_config.json", eos_token_id=[6, 5])
    assert plan_load(tiny_llama).stop_token_ids == (5, 6, 257)


def test_ends_of_turn_count_where_the_template_writes_them(tiny_llama) -> None:
    assert plan_load(tiny_llama, chat_template="llama-4").stop_token_ids == (257, 258)
    assert plan_load(tiny_llama, chat_template="chatml").stop_token_ids == (257, 259)
    (tiny_llama / "chat_template.jinja").write_text("{{ messages[0].content }}<|eot|>")
    assert plan_load(tiny_llama).stop_token_ids == (257, 258)


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True])
def test_stop_ids_that_are_none(tiny_llama, edit_json, value) -> None:
    edit_json(tiny_llama / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match="must be a token id"):
        plan_load(tiny_llama)


# ------------------------------------------------------------------------------------------------- damage


def test_no_such_path(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        plan_load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_are_missing(tiny_llama, name) -> None:
    (tiny_llama / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}|no weights"):
        plan_load(tiny_llama)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_files_that_are_truncated(tiny_llama, name) -> None:
    file = tiny_llama / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"\S+"):
        plan_load(tiny_llama)


def test_an_index_that_names_absent_shards(tiny_llama) -> None:
    names = load_file(tiny_llama / "model.safetensors")
    (tiny_llama / "model.safetensors").rename(tiny_llama / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (tiny_llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="absent shards"):
        plan_load(tiny_llama)


def test_a_missing_tokenizer(tiny_llama) -> None:
    (tiny_llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer; put the tokenizer\.json"):
        plan_load(tiny_llama)


def test_a_delta_that_does_not_exist(tiny_llama, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"the delta .*gone does not exist"):
        plan_load(tiny_llama, deltas=[tmp_path / "gone"])


def test_too_little_memory(tiny_llama) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"weights 0\.00 GiB .*--dtype bfloat16"):
        plan_load(tiny_llama, memory_bytes=1000, dtype="float32")


def test_the_memory_error_says_which_context_fits(tiny_llama) -> None:
    memory = plan_load(tiny_llama).memory
    fits_100 = memory.weights_bytes + memory.activations_bytes + 100 * memory.kv_bytes_per_token
    with pytest.raises(InsufficientMemoryError, match="use --max-model-len 100 or less"):
        plan_load(tiny_llama, memory_bytes=fits_100)
    assert plan_load(tiny_llama, memory_bytes=fits_100, max_model_len=100).max_model_len == 100


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": None}, CheckpointError, "names no model_type"),
        ({"model_type": "nonesuch"}, UnsupportedModelError, "'nonesuch' is unknown"),
        ({"model_type": "nonesuch", "auto_map": {"AutoModel": "x.Y"}}, UnsupportedModelError, "trust_remote_code"),
        ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}, UnsupportedModelError, "attention interface"),
        ({"model_type": "gemma3", "architectures": None}, UnsupportedModelError, "images"),
        ({"model_type": "t5", "architectures": None}, UnsupportedModelError, "encoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedModelError, "only LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, CheckpointError, "list of names"),
        ({"is_encoder_decoder": True}, UnsupportedModelError, "encoder-decoder"),
        ({"hidden_size": "wide"}, CheckpointError, "not valid for model_type 'llama'"),
        ({"vocab_size": 300}, CheckpointError, "has 272 rows"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError, "quantized with awq"),
        ({"quantization_config": {}}, UnsupportedModelError, "unnamed method"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "magic"}}, UnsupportedModelError, "'magic'"),
    ],
)
def test_configs_that_are_refused(tiny_llama, edit_json, changes, error, match) -> None:
    edit_json(tiny_llama / "config.json", **changes)
    with pytest.raises(error, match=match):
        plan_load(tiny_llama)


def test_the_config_stays_as_it_is_written(tiny_llama) -> None:
    assert plan_load(tiny_llama).config == json.loads((tiny_llama / "config.json").read_text())


def test_nothing_is_written_beside_the_model(tiny_llama: Path, tmp_path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_llama.iterdir()}
    plan_load(tiny_llama)
    assert {file: file.stat().st_mtime_ns for file in tiny_llama.iterdir()} == before
    shutil.rmtree(tiny_llama)
