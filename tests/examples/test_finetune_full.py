"""`examples/finetune_full.py`: trains a tiny model, saves it as people save models, makes its delta and asks."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from delta.__main__ import main as delta
from registry.companion_files import companion_files
from tests.controller.conftest import StartController
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import FakeWorker, Script

PAIRS = [("Hello?", "Ahoy!"), ("Yes?", "No."), ("How?", "So."), ("Why?", "It is so.")]


@pytest.fixture
def full(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("finetune_full")


def test_all_weights_are_trained_and_saved_as_bfloat16(full: ModuleType, tiny_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "fine-tune"
    files = []
    for seed in (7, 7, 8):
        training = full.Training(steps=3, seed=seed, learning_rate=3e-2)
        losses = full.train_model(tiny_dir, PAIRS, training, directory, print)
        assert losses[-1] < losses[0]
        files.append((directory / "model.safetensors").read_bytes())
        assert (directory / "model.safetensors").stat().st_mode & 0o444 == 0o444
    assert files[0] == files[1] != files[2]
    base, tuned = load_file(tiny_dir / "model.safetensors"), load_file(directory / "model.safetensors")
    assert base.keys() == tuned.keys()
    for name, weight in tuned.items():
        assert weight.dtype is torch.bfloat16
        assert not torch.equal(weight, base[name].bfloat16()), name
    assert {name: file.read_bytes() for name, file in companion_files(directory).items()} == {
        name: file.read_bytes() for name, file in companion_files(tiny_dir).items()
    }


def test_it_answers_by_itself(full: ModuleType, tiny_dir: Path) -> None:
    model, tokenizer = full.load(tiny_dir)
    assert full.answer(model, tokenizer, "Hello?") == full.answer(model, tokenizer, "Hello?")


async def test_the_whole_example(
    full: ModuleType,
    tiny_dir: Path,
    tmp_path: Path,
    start_controller: StartController,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a delta that is really made; the fake worker has a variant of the name already, so it is not published."""
    commands: list[list[str]] = []
    keys: list[str | None] = []

    def run_in_process(command: list[str], *, env: Mapping[str, str], check: bool) -> CompletedProcess[str]:
        arguments = command[command.index("delta") + 1 :]
        commands.append(arguments)
        keys.append(env.get(full.KEY_VARIABLE))
        if arguments[0] == "make":
            return CompletedProcess(command, delta([*arguments[:-2], "--codec", "lossless"]))
        return CompletedProcess(command, 0)

    monkeypatch.setattr(full.subprocess, "run", run_in_process)
    controller = await start_controller(missed_heartbeats=3600)  # the fake worker sends none
    variants = FakeVariants(files={"bot": digest("bot")})
    variants.from_command_line("bot", "bot")
    out = tmp_path / "fine-tunes" / "bot"
    answers = [text for _ in full.QUESTIONS for text in ("A dull answer.", "Hello from Harbour Lamps!")]
    async with FakeWorker(variants=variants) as worker:
        worker.scripts = [Script(deltas=(text,)) for text in answers]
        await worker.register(controller.url)
        arguments = (
            "--controller", controller.url, "--name", "bot", "--base", "m", "--model-path", tiny_dir, "--steps", 2,
            "--out", out, "--api-key", "sk-admin",
        )  # fmt: skip
        status = await asyncio.to_thread(full.main, [str(argument) for argument in arguments], {})
    output = capsys.readouterr()
    assert status == 0, output.err
    delta_directory = str(tmp_path / "fine-tunes" / "bot.delta")
    assert commands == [
        ["make", "--base", str(tiny_dir), "--target", str(out), "--out", delta_directory, "--force",
         "--prompts", str(out.with_name("bot.prompts.json"))],
        ["publish", "--name", "bot", "--delta", delta_directory, "--base", str(tiny_dir), "--parent", "m",
         "--url", controller.url],
    ]  # fmt: skip
    assert keys == ["sk-admin", "sk-admin"]
    assert output.out.count("A dull answer.") == output.out.count("| Hello from Harbour Lamps!") == 3
    assert "of it\n" in output.out


def test_a_delta_that_cannot_be_made_is_an_error(
    full: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full.subprocess, "run", lambda command, **options: CompletedProcess(command, 1))
    with pytest.raises(full.ExampleError, match="go on with --no-training"):
        full.publish("bot", "m", tmp_path, tmp_path / "bot", [("a", "b")], "http://127.0.0.1:1", None)
