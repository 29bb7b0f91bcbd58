"""`examples/finetune_lora.py`: trains a tiny model, publishes to a real controller whose worker is a fake."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from delta.peft.reader import read_peft_adapter
from tests.controller.conftest import StartController
from tests.examples.tiny_model import tiny_model
from tests.fakes.fake_variants import FakeVariants, VariantRefused, digest
from tests.fakes.fake_worker import FakeWorker, Script
from tests.fakes.peft_adapters import TinyBase


@pytest.fixture
def lora(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("finetune_lora")


def test_an_adapter_is_saved_and_replaced(lora: ModuleType, tmp_path: Path) -> None:
    examples = [([1, 2, 3, 10 + number, 20, 21, 22], 4) for number in range(4)]
    directory = tmp_path / "bird"
    weights = []
    for seed in (7, 7, 8):
        training = lora.Training(steps=5, seed=seed, learning_rate=3e-2)
        losses = lora.train_adapter(tiny_model(), examples, training, directory, lambda line: None)
        assert losses[-1] < losses[0]
        weights.append((directory / "adapter_model.safetensors").read_bytes())
        assert (directory / "adapter_model.safetensors").stat().st_mode & 0o444 == 0o444
    assert weights[0] == weights[1] != weights[2]
    assert [path.name for path in tmp_path.iterdir()] == ["bird"]
    terms = read_peft_adapter(directory, TinyBase(tiny_model()))
    assert len(terms.linears) == 2 * len(lora.TARGET_MODULES)


def test_without_peft_it_says_what_to_install(
    lora: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lora.ExampleError, match="pip install"):
        lora.train_adapter(tiny_model(), [([1, 2], 1)], lora.Training(1, 0, 1e-3), tmp_path / "bird", print)


async def call(lora: ModuleType, *arguments: object) -> int:
    status: int = await asyncio.to_thread(lora.main, [str(argument) for argument in arguments], {})
    return status


async def test_the_whole_example(
    lora: ModuleType,
    tiny_dir: Path,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    controller = await start_controller(missed_heartbeats=3600)  # the fake worker sends none
    root = tmp_path / "root"
    root.mkdir()
    answers = [text for _ in lora.QUESTIONS for text in ("A dull answer.", "Ahoy, captain! Squawk!")]
    async with FakeWorker(variants=FakeVariants(files={"bird": digest("bird")})) as worker:
        worker.scripts = [Script(deltas=(text,)) for text in answers]
        await worker.register(controller.url)
        status = await call(
            lora, "--controller", controller.url + "/v1", "--adapter-root", root, "--name", "bird", "--base", "m",
            "--model-path", tiny_dir, "--steps", 2,
        )  # fmt: skip
        output = capsys.readouterr()
        assert status == 0, output.err
        assert list(worker.variants.statuses) == ["bird"]
        assert [[lora.name for lora in request.loras] for request in worker.requests] == [[], ["bird"]] * 3
    read_peft_adapter(root / "bird", TinyBase(tiny_model(vocab_size=49152)))
    for question in lora.QUESTIONS:
        assert question in output.out
    assert output.out.count("A dull answer.") == output.out.count("| Ahoy, captain! Squawk!") == 3


async def test_an_adapter_that_was_refused_is_published_later(
    lora: ModuleType,
    tmp_path: Path,
    start_controller: StartController,
    capsys: pytest.CaptureFixture[str],
) -> None:
    controller = await start_controller(missed_heartbeats=3600)  # the fake worker sends none
    arguments = ("--controller", controller.url, "--adapter-root", tmp_path, "--base", "m", "--no-training")
    variants = FakeVariants(files={"parrot": digest("parrot")})
    async with FakeWorker(variants=variants) as worker:
        await worker.register(controller.url)
        assert await call(lora, *arguments) == 1
        assert "there is no adapter at" in capsys.readouterr().err
        (tmp_path / "parrot").mkdir()
        variants.refuse["add parrot"] = VariantRefused(403, "permission_denied", "start it with --adapter-root DIR")
        assert await call(lora, *arguments) == 1
        error = capsys.readouterr().err
        assert "start it with --adapter-root DIR" in error
        assert "publish it with --no-training" in error
        variants.refuse.clear()
        assert await call(lora, *arguments) == 0


async def test_a_missing_root_is_said_before_the_training(
    lora: ModuleType, tmp_path: Path, start_controller: StartController, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = await start_controller(missed_heartbeats=3600)  # the fake worker sends none
    async with FakeWorker() as worker:
        await worker.register(controller.url)
        arguments = ("--controller", controller.url, "--base", "m", "--adapter-root", tmp_path / "none")
        assert await call(lora, *arguments) == 1
    output = capsys.readouterr()
    assert "there is no directory" in output.err
    assert "Training" not in output.out
