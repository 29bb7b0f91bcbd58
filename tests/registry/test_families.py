from __future__ import annotations

from collections import Counter

import pytest

from registry.errors import UnsupportedModelError
from registry.families import families, find_family, find_family_of_gguf

SERVED = {
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt2", "gpt_neox", "opt", "bloom",
    "gemma", "gemma2", "gemma3_text", "phi", "phi3", "falcon", "starcoder2", "olmo2", "llama4_text", "granite",
    "smollm3", "deepseek_v3", "gpt_oss", "cohere2",
}  # fmt: skip
TEMPLATES = {
    "chatml", "llama-2", "llama-3", "llama-4", "mistral", "mixtral-instruct", "vicuna-v1.1", "alpaca", "zephyr",
    "gemma", "phi-3", "qwen-2", "qwen-3", "deepseek", "command-r", "falcon", "openchat", "solar", "tulu", "starchat",
    "codellama", "wizardlm", "baichuan", "chatglm", "internlm", "yi", "dolly", "koala", "one-shot", "raw",
}  # fmt: skip


def test_exactly_the_compared_families_are_served() -> None:
    assert {family.name for family in families().values() if family.refused is None} == SERVED


@pytest.mark.parametrize(
    "model_type",
    ["gptj", "mpt", "codegen", "gpt_neo", "xglm", "rwkv", "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "lfm2",
     "falcon_h1", "qwen3_next", "xlstm", "baichuan", "chatglm", "internlm2", "llama4", "gemma3", "bert"],
)  # fmt: skip
def test_silently_wrong_models_are_refused_with_a_sentence(model_type: str) -> None:
    refused = find_family(model_type, ["Whatever"]).refused
    assert refused is not None
    assert " " in refused, "a name of [reasons] that does not exist"


def test_every_entry_is_complete() -> None:
    for family in families().values():
        assert family.model_types
        assert family.architectures
        assert family.context_length >= 512
        assert family.link.startswith("https://")
        assert family.licence
        assert set(family.capabilities) <= {"chat", "completion"}
        assert bool(family.capabilities) == (family.refused is None)
        assert family.chat_template is None or family.chat_template in TEMPLATES


def test_no_two_families_claim_the_same() -> None:
    for claimed in ("model_types", "gguf_architectures"):
        counts = Counter(value for family in families().values() for value in getattr(family, claimed))
        assert [value for value, count in counts.items() if count > 1] == []


def test_unknown_model_type_says_how_to_proceed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'brand_new' is unknown.*llama.*registry list.*CONTRIBUTING"):
        find_family("brand_new", ["BrandNewForCausalLM"])


def test_a_classifier_of_a_served_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        find_family("llama", ["LlamaForSequenceClassification"])


def test_architectures_may_be_absent() -> None:
    assert find_family("llama", []).name == "llama"


def test_a_family_is_not_found_by_a_part_of_its_name() -> None:
    with pytest.raises(UnsupportedModelError):
        find_family("llama2", [])


def test_gguf_architectures() -> None:
    assert find_family_of_gguf("qwen3moe").name == "qwen3_moe"
    with pytest.raises(UnsupportedModelError, match="GGUF architecture 'wavtokenizer-dec' is unknown"):
        find_family_of_gguf("wavtokenizer-dec")


def test_model_types_and_architectures_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for family in families().values():
        if family.refused is None:
            for model_type in family.model_types:
                assert names[model_type] in family.architectures
