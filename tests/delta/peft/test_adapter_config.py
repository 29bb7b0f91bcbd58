"""Every field of PEFT's configurations is used, harmless or refused; nothing is passed over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from peft import IA3Config as PeftIa3, LoraConfig as PeftLora
from peft.utils import PeftType

from delta.peft import adapter_config
from delta.peft.adapter_config import HARMLESS, REFUSED, Ia3Config, LoraConfig, read_adapter_config
from registry.errors import CheckpointError, UnsupportedModelError


def _read(path: Path, **fields: object) -> LoraConfig | Ia3Config:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields))
    return read_adapter_config(file)


def test_every_field_of_peft_is_known() -> None:
    lora = {field.name for field in dataclasses.fields(PeftLora)}
    ia3 = {field.name for field in dataclasses.fields(PeftIa3)}
    known = {*HARMLESS, *REFUSED}
    assert not set(HARMLESS) & set(REFUSED)
    assert lora - known - adapter_config._LORA_USED == set()
    assert ia3 - known - adapter_config._IA3_USED == set()
    assert known | adapter_config._LORA_USED | adapter_config._IA3_USED <= lora | ia3


def test_what_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    PeftLora(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path / "adapter_config.json")
    assert isinstance(config, LoraConfig)
    assert (config.rank, config.alpha, config.targets.modules, config.bias) == (8, 8, ("q_proj",), "none")
    PeftIa3(target_modules=["a", "b"], feedforward_modules=["b"]).save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path / "adapter_config.json")
    assert isinstance(config, Ia3Config)
    assert config.feedforward == ("b",)


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind.value not in ("LORA", "IA3")])
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"adapter_config\.json: peft_type is '{kind}'"):
        _read(tmp_path, peft_type=kind)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"peft_type": "LOHA"}, "convert_to_lora"),
        ({"peft_type": "VERA"}, "convert_to_lora"),
        ({"peft_type": "XLORA"}, "one by one"),
        ({"peft_type": "PREFIX_TUNING"}, "virtual tokens"),
        ({"peft_type": "OFT"}, "merge_and_unload"),
        ({"peft_type": None}, "written by PEFT"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"task_type": "SEQ_CLS"}, "causal"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "base's own weights"),
        ({"init_lora_weights": "loftq"}, "base's own weights"),
        ({"init_lora_weights": "corda"}, "base's own weights"),
        ({"init_lora_weights": "lora_ga"}, "base's own weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeated layers"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"velora_config": {"num_groups": 4}}, "VeLoRA"),
        ({"some_new_field": 0}, "'some_new_field' is not known"),
        ({"some_new_field": "x"}, "'some_new_field' is not known"),
    ],
)
def test_what_we_cannot_compute_is_refused(fields: dict[str, object], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=remedy):
        _read(tmp_path, **fields)


def test_unknown_fields_at_nothing_are_passed_over(tmp_path: Path) -> None:
    _read(tmp_path, new_one=None, new_two=False, new_three=[], new_four={}, layer_replication=None)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": 2.5},
        {"r": True},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"r": 10**400},
        {"use_dora": "yes"},
        {"bias": "some"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": None}},
        {"target_modules": "("},
        {"target_modules": [1]},
        {"target_modules": "(a*)*b"},
        {"target_modules": "((a|b)+){2,}"},
        {"target_modules": "(a?){50}"},
        {"target_modules": ".*" * 7 + "x"},
        {"target_modules": "x" * 5000},
        {"layers_to_transform": ["1"]},
        {"layers_pattern": ["["]},
        {"layers_pattern": ["(?P<layer_index>h)"]},
        {"rank_pattern": {"(?i)Q_PROJ": 4}},
        {"modules_to_save": [""]},
        {"trainable_token_indices": [1, 1]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": "all"},
        {"use_dora": True, "lora_bias": True},
    ],
)
def test_contradictions_and_endless_expressions_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        _read(tmp_path, **fields)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter_config(file)


@pytest.mark.parametrize(
    "expression",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up_proj)",
        r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
        r".*\.(q|v)_proj$",
        r"(.*\.)?layers\.[*+?]\+\*\?",
    ],
)
def test_expressions_that_people_write_are_read(expression: str, tmp_path: Path) -> None:
    config = _read(tmp_path, target_modules=expression)
    assert config.targets.modules == expression
