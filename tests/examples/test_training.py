"""`examples/training.py`: what is learned, batches, repeatable steps."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from tests.examples.tiny_model import tiny_model


@pytest.fixture
def training(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("training")


def test_only_the_answer_is_learned(training: ModuleType, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    examples = training.tokenize(tokenizer, [("Hello?", "Ahoy!"), ("A longer question?", "Yes.")])
    (ids, num_given), _ = examples
    assert tokenizer.decode(ids[:num_given]).endswith("Hello?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids[num_given:]) == "Ahoy!<|im_end|>"
    batch = training.make_batch(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for row, (ids, num_given) in enumerate(examples):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["attention_mask"][row].sum() == len(ids)
        labels = batch["labels"][row].tolist()
        assert labels[num_given : len(ids)] == ids[num_given:]
        assert set(labels[:num_given] + labels[len(ids) :]) == {training.IGNORED}


def test_fitting_learns_and_is_repeatable(training: ModuleType) -> None:
    examples = [([1, 2, 3, 10 + number, 20, 21, 22], 4) for number in range(4)]
    settings = training.Training(steps=30, seed=7, learning_rate=1e-2)
    lines: list[str] = []
    losses = training.fit(tiny_model(), examples, settings, lines.append)
    assert losses == training.fit(tiny_model(), examples, settings, lines.append)
    assert losses[-1] < 0.5 * losses[0]
    assert "step  30 of 30" in lines[-1]


@pytest.mark.parametrize("text", ["support.json", "parrot.json"])
def test_the_texts_can_be_read(training: ModuleType, text: str) -> None:
    pairs = training.read_pairs(Path(training.__file__).with_name(text))
    assert len(pairs) == 24
    assert len({question for question, _ in pairs}) == 24


@pytest.mark.parametrize("content", [None, "{", '[["question"]]', "[1]"])
def test_a_text_of_another_form_is_refused(training: ModuleType, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "text.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(training.ExampleError, match="is no list of pairs"):
        training.read_pairs(path)


def test_a_directory_without_a_model_is_refused(training: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(training.ExampleError, match="holds no model"):
        training.load(tmp_path)


def test_weights_are_as_readable_as_what_is_beside_them(training: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch(0o644)
    (tmp_path / "model.safetensors").touch(0o600)
    training.open_to_readers(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
