"""`examples/serving.py`: what a user sees of a controller that is not there or refuses, and of the answers."""

import asyncio
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.controller.conftest import StartController
from tests.fakes.fake_worker import FakeWorker


@pytest.fixture
def serving(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("serving")


@pytest.fixture
def example_error(example: Callable[[str], ModuleType]) -> type[Exception]:
    error: type[Exception] = example("training").ExampleError
    return error


def test_no_controller(serving: ModuleType, example_error: type[Exception]) -> None:
    with pytest.raises(example_error, match=r"no controller answers at http://127\.0\.0\.1:1 "):
        serving.Server("http://127.0.0.1:1/v1", None).check_base("m")


async def test_another_model(
    serving: ModuleType, example_error: type[Exception], start_controller: StartController
) -> None:
    controller = await start_controller()
    async with FakeWorker() as worker:
        await worker.register(controller.url)
        server = serving.Server(controller.url, None)
        await asyncio.to_thread(server.check_base, "m")
        with pytest.raises(example_error, match="does not serve n but m"):
            await asyncio.to_thread(server.check_base, "n")


async def test_the_key_is_sent(
    serving: ModuleType, example_error: type[Exception], start_controller: StartController
) -> None:
    controller = await start_controller(auth="required")
    with pytest.raises(example_error, match="HTTP 401"):
        await asyncio.to_thread(serving.Server(controller.url, "sk-wrong").check_base, "m")


def test_answers_of_different_lengths_stand_side_by_side(serving: ModuleType) -> None:
    assert serving.side_by_side("Q?", ["one two three", "x", "yes"], width=27).splitlines() == [
        "Q?",
        "  one two | x       | yes",
        "  three   |         |",
    ]
