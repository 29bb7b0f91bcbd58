from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from delta.checkpoint_tensors import open_checkpoint
from delta.quality import QualityMeter
from delta.quality_prompts import QualityPrompts, default_prompts, read_prompts, tokenize_prompts
from registry.errors import CheckpointError, UnsupportedModelError
from tests.delta.tiny_llama import byte_tokenizer, save_tiny_llama

PROMPTS = QualityPrompts(
    "default", ("A first text.", [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "Yes."}])
)


def _weights(directory: Path) -> dict[str, Tensor]:
    with open_checkpoint(directory) as tensors:
        return {name: tensors.read(name) for name in tensors.names()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base", 0)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "target", 1)


def test_the_fine_tune_itself_and_the_base(base: Path, target: Path) -> None:
    meter = QualityMeter(base, target, PROMPTS)
    same, probe = meter.measure(_weights(target))
    assert (same.kl_mean, same.kl_max, same.top1) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-5), 1)
    assert (same.num_prompts, same.num_tokens) == (
        2,
        len("A first text.") - 1 + len("[user]A question?[assistant]Yes.") - 1,
    )
    other, _ = meter.measure(_weights(base))
    assert other.kl_mean == pytest.approx(same.base_kl_mean)
    assert other.kl_mean > 0.1
    assert other.kl_max > other.kl_mean
    assert other.top1 < 1
    assert [bytes(case.token_ids).decode() for case in probe.cases] == ["A first text.", "[user]A question?[a]"]


def test_closer_weights_have_a_smaller_divergence(base: Path, target: Path) -> None:
    meter = QualityMeter(base, target, PROMPTS)
    ours, theirs = _weights(base), _weights(target)
    found = []
    for share in (0.0, 0.5, 0.9, 0.99):
        mixed = {name: ours[name] + share * (theirs[name] - ours[name]) for name in theirs}
        found.append(meter.measure(mixed)[0].kl_mean)
    assert found == sorted(found, reverse=True)


def test_the_divergence_is_that_of_its_definition(base: Path, target: Path) -> None:
    text = "Some text"
    meter = QualityMeter(base, target, QualityPrompts("default", (text,)))
    ids = torch.tensor([list(text.encode())[:-1]])
    with torch.inference_mode():
        p, q = (LlamaForCausalLM.from_pretrained(path)(ids).logits[0].double().softmax(-1) for path in (target, base))
    expected = (p * (p / q).log()).sum(-1)
    quality, _ = meter.measure(_weights(base))
    assert quality.kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert quality.kl_max == pytest.approx(float(expected.max()), rel=1e-4)


def test_a_larger_vocabulary_is_compared_with_the_base_where_both_have_tokens(tmp_path: Path, target: Path) -> None:
    small = save_tiny_llama(tmp_path / "small", 0, vocab_size=200)
    quality, _ = QualityMeter(small, target, PROMPTS).measure(_weights(target))
    assert quality.base_kl_mean is not None
    assert quality.base_kl_mean > 0.1
    tiny = save_tiny_llama(tmp_path / "tiny", 0, vocab_size=40)
    assert QualityMeter(tiny, target, PROMPTS).measure(_weights(target))[0].base_kl_mean is None


def test_weights_that_are_missing_are_not_made_up(base: Path, target: Path) -> None:
    meter = QualityMeter(base, target, PROMPTS)
    weights = _weights(target)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="up_proj"):
        meter.measure(weights)


@pytest.mark.parametrize("character", "Fo")  # of the measured texts, and of one that inputs are sampled of
def test_a_fine_tune_of_spoiled_weights_is_refused(base: Path, target: Path, character: str) -> None:
    weights = _weights(target)
    token_id = byte_tokenizer()(character)["input_ids"][0]
    weights["model.embed_tokens.weight"][token_id, 3] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    measured, other = QualityPrompts("default", ("First text.",)), QualityPrompts("default", ("So on.",))
    with pytest.raises(CheckpointError, match="not finite"):
        QualityMeter(base, target, measured, calibration=[other])


def test_models_that_cannot_be_computed(tmp_path: Path, base: Path, target: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "of_the_future"}))
    with pytest.raises((UnsupportedModelError, CheckpointError)):
        QualityMeter(base, target, PROMPTS)
    with pytest.raises(CheckpointError, match="two tokens"):
        QualityMeter(target, target, QualityPrompts("default", ("a",)))


def test_the_default_prompts_are_whole() -> None:
    found = list(tokenize_prompts(default_prompts(), byte_tokenizer()))
    assert len(found) == 32
    for prompt in found:
        assert prompt.whole[: len(prompt.question) - 3] == prompt.question[:-3]  # but for "[a]"
        assert len(prompt.whole) > len(prompt.question)
        assert prompt.text


def test_conversations_without_a_template_are_texts() -> None:
    (prompt,) = tokenize_prompts(QualityPrompts("default", (PROMPTS.conversations[1],)), byte_tokenizer(template=None))
    assert bytes(prompt.question) == b"A question?\n"
    assert bytes(prompt.whole) == b"A question?\nYes."


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(PROMPTS.conversations))
    prompts = read_prompts(file)
    assert prompts.conversations == PROMPTS.conversations
    assert prompts.name.startswith("sha256:")
    for content in (
        "",
        "{}",
        "[]",
        '[""]',
        "[[]]",
        '[[{"role": "user"}]]',
        '[[{"role": "user", "content": 1}]]',
        "[1]",
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match="does not hold prompts"):
            read_prompts(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_prompts(tmp_path / "absent.json")


def test_every_second_prompt_is_for_the_making() -> None:
    measured, others = QualityPrompts("default", ("a", "b", "c")).halves()
    assert (measured.conversations, others.conversations) == (("a", "c"), ("b",))


def test_answers_are_the_fine_tunes_own(base: Path, target: Path) -> None:
    meter = QualityMeter(base, target, PROMPTS)
    same, _ = meter.measure(_weights(target))
    assert same.answers == 1
    assert 0 < same.num_answer_tokens <= 2 * 32
    other, _ = meter.measure(_weights(base))
    assert other.answers < 1
    assert other.num_answer_tokens == same.num_answer_tokens


def test_inputs_are_those_of_the_calibrating_prompts(base: Path, target: Path) -> None:
    meter = QualityMeter(base, target, PROMPTS, calibration=(QualityPrompts("x", ("Some text.", "More.")),))
    names = {name for name in _weights(target) if name.endswith("proj.weight")}
    assert names <= meter.inputs.keys()
    assert all(sum(map(len, meter.inputs[name])) == len("Some text.More.") for name in names)
    assert QualityMeter(base, target, PROMPTS).inputs == {}
