"""`examples/finetune_lora.py`: trains a tiny model, publishes to a real controller whose worker is a fake."""

import asyncio
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from delta.peft.reader import read_peft_adapter
from tests.controller.conftest import StartController
from tests.fakes.fake_variants import FakeVariants, VariantRefused, digest
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.peft_adapters import TinyBase

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as it is when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("finetune_lora")
    sys.modules.pop("finetune_lora", None)


def tiny_model(vocab_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_dir(tmp_path: Path, smollm2_dir: Path) -> Path:
    """A tiny model with the small model's tokenizer."""
    directory = tmp_path / "tiny"
    tiny_model(vocab_size=49152).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2_dir / name, directory)
    return directory


# ---------------------------------------------------------------------------------------------------------- training


def test_only_the_answer_is_learned(example: ModuleType, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    examples = example.tokenize(tokenizer, [("Hello?", "Ahoy!"), ("A longer question?", "Yes.")])
    (ids, num_given), _ = examples
    assert tokenizer.decode(ids[:num_given]).endswith("Hello?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids[num_given:]) == "Ahoy!<|im_end|>"
    batch = example.make_batch(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for row, (ids, num_given) in enumerate(examples):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["attention_mask"][row].sum() == len(ids)
        labels = batch["labels"][row].tolist()
        assert labels[num_given : len(ids)] == ids[num_given:]
        assert set(labels[:num_given] + labels[len(ids) :]) == {example.IGNORED}


def test_training_learns_and_is_repeatable(example: ModuleType, tmp_path: Path) -> None:
    examples = [([1, 2, 3, 10 + number, 20, 21, 22], 4) for number in range(4)]
    training = example.Training(steps=30, seed=7, learning_rate=3e-2)
    lines: list[str] = []
    losses = example.train(tiny_model(), examples, training, tmp_path / "one", lines.append)
    again = example.train(tiny_model(), examples, training, tmp_path / "two", lines.append)
    assert losses == again
    assert losses[-1] < 0.8 * losses[0]
    assert "step  30 of 30" in lines[-1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    terms = read_peft_adapter(tmp_path / "one", TinyBase(tiny_model()))
    assert len(terms.linears) == 2 * len(example.TARGET_MODULES)


def test_without_peft_it_says_what_to_install(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(example.ExampleError, match="pip install"):
        example.train(tiny_model(), [([1, 2], 1)], example.Training(1, 0), tmp_path, print)


# -------------------------------------------------------------------------------------------------------- publishing


async def call(example: ModuleType, *arguments: object, api_key: str | None = None) -> int:
    environment = {} if api_key is None else {"OPENAI_API_KEY": api_key}
    status: int = await asyncio.to_thread(example.main, [str(argument) for argument in arguments], environment)
    return status


async def test_the_whole_example(
    example: ModuleType,
    tiny_dir: Path,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    controller = await start_controller()
    root = tmp_path / "root"
    root.mkdir()
    answers = [text for _ in example.QUESTIONS for text in ("A dull answer.", "Ahoy, captain! Squawk!")]
    async with FakeWorker(variants=FakeVariants(files={"bird": digest("bird")})) as worker:
        worker.scripts = [Script(deltas=(text,)) for text in answers]
        await worker.register(controller.url)
        status = await call(
            example, "--controller", controller.url + "/v1", "--adapter-root", root, "--name", "bird", "--base", "m",
            "--model-path", tiny_dir, "--steps", 2,
        )  # fmt: skip
        output = capsys.readouterr()
        assert status == 0, output.err
        assert list(worker.variants.statuses) == ["bird"]
        assert [[lora.name for lora in request.loras] for request in worker.requests] == [[], ["bird"]] * 3
    read_peft_adapter(root / "bird", TinyBase(tiny_model(vocab_size=49152)))
    for question in example.QUESTIONS:
        assert question in output.out
    assert output.out.count("A dull answer.") == output.out.count("| Ahoy, captain! Squawk!") == 3


async def test_an_adapter_that_was_refused_is_published_later(
    example: ModuleType,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    controller = await start_controller()
    arguments = ("--controller", controller.url, "--adapter-root", tmp_path, "--base", "m", "--no-training")
    variants = FakeVariants(files={"parrot": digest("parrot")})
    async with FakeWorker(variants=variants) as worker:
        await worker.register(controller.url)
        assert await call(example, *arguments) == 1
        assert "there is no adapter at" in capsys.readouterr().err
        (tmp_path / "parrot").mkdir()
        variants.refuse["add parrot"] = VariantRefused(403, "permission_denied", "start it with --adapter-root DIR")
        assert await call(example, *arguments) == 1
        error = capsys.readouterr().err
        assert "start it with --adapter-root DIR" in error
        assert "publish it with --no-training" in error
        variants.refuse.clear()
        assert await call(example, *arguments) == 0


async def test_what_is_not_there_is_said_before_the_training(
    example: ModuleType,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await call(example, "--controller", "http://127.0.0.1:1", "--adapter-root", tmp_path) == 1
    assert "no controller answers at http://127.0.0.1:1" in capsys.readouterr().err
    controller = await start_controller()
    async with FakeWorker() as worker:
        await worker.register(controller.url)
        assert await call(example, "--controller", controller.url, "--adapter-root", tmp_path) == 1
        assert "does not serve smollm2-135m-instruct but m" in capsys.readouterr().err
        arguments = ("--controller", controller.url, "--base", "m", "--adapter-root", tmp_path / "none")
        assert await call(example, *arguments) == 1
        output = capsys.readouterr()
        assert "there is no directory" in output.err
        assert "Training" not in output.out


async def test_a_key_is_sent(
    example: ModuleType,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    controller = await start_controller(auth="required")
    assert await call(example, "--controller", controller.url, "--adapter-root", tmp_path, api_key="sk-wrong") == 1
    assert "HTTP 401" in capsys.readouterr().err


def test_answers_of_different_lengths_stand_side_by_side(example: ModuleType) -> None:
    assert example.side_by_side("Q?", "one two three", "x", width=7).splitlines() == [
        "Q?", "  one two | x", "  three   |",
    ]  # fmt: skip
