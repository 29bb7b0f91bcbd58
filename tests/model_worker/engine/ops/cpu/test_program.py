"""Programs on teams of threads: every command after the one before it, whatever the threads' number and luck."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import KernelLibrary, Program, Step, Team
from model_worker.engine.ops.linear import Linear, pack
from model_worker.engine.ops.rms_norm import RMSNorm
from registry.errors import InternalError

_WIDTH = 96
_MAX_ROWS = 7


class _Chain:
    """A residual stream through `depth` pairs of norm and linear layer; each needs all that the one before computed."""

    def __init__(self, team: Team, *, depth: int = 12, width: int = _WIDTH, max_rows: int = _MAX_ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.stream = torch.zeros(max_rows, width)
        normed = torch.zeros(max_rows, width)
        weights = [pack(torch.randn(width, width, generator=generator) / width**0.5) for _ in range(depth)]
        self.operations: list[RMSNorm | Linear] = []
        for weight in weights:
            self.operations.append(RMSNorm("norm", self.stream, torch.ones(width), normed, 1e-5))
            self.operations.append(Linear("linear", normed, weight, self.stream, accumulate=True))
        self.program = Program(team, self.operations)

    def run(self, x: Tensor) -> Tensor:
        self.stream[: len(x)] = x
        self.program.run(Step.of_rows(len(x)))
        return self.stream[: len(x)].clone()

    def reference(self, x: Tensor) -> Tensor:
        self.stream[: len(x)] = x
        for operation in self.operations:
            operation.reference(Step.of_rows(len(x)))
        return self.stream[: len(x)].clone()


def _inputs(num: int) -> list[Tensor]:
    """Of one row to as many as the buffers have, as the batches of a server change."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(i % _MAX_ROWS + 1, _WIDTH, generator=generator) for i in range(num)]


def _run_many(team: Team, inputs: list[Tensor], expected: list[Tensor], repeats: int) -> None:
    chain = _Chain(team)
    for _ in range(repeats):
        for x, want in zip(inputs, expected, strict=True):
            assert torch.equal(chain.run(x), want)


def _expected(library: KernelLibrary, inputs: list[Tensor]) -> list[Tensor]:
    """By one thread, where nothing can race."""
    chain = _Chain(Team(library, 1))
    return [chain.run(x) for x in inputs]


@contextmanager
def _busy_machine() -> Iterator[None]:
    """As many processes that do nothing but compute as there are cores."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_program_does_what_its_operations_say(team: Team) -> None:
    chain = _Chain(team)
    for x in _inputs(_MAX_ROWS):
        torch.testing.assert_close(chain.run(x), chain.reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_many_short_programs_give_the_same_bits_on_any_number_of_threads(
    best_kernels: KernelLibrary, num_threads: int
) -> None:
    inputs = _inputs(50)
    _run_many(Team(best_kernels, num_threads), inputs, _expected(best_kernels, inputs), repeats=60 // num_threads)


def test_programs_are_right_on_a_busy_machine(best_kernels: KernelLibrary) -> None:
    inputs = _inputs(20)
    expected = _expected(best_kernels, inputs)
    with _busy_machine():
        _run_many(Team(best_kernels, 2), inputs, expected, repeats=2)


def test_two_teams_at_once_do_not_meet(best_kernels: KernelLibrary) -> None:
    inputs = _inputs(50)
    expected = _expected(best_kernels, inputs)
    failures: list[BaseException] = []

    def use_a_team() -> None:
        try:
            _run_many(Team(best_kernels, 2), inputs, expected, repeats=10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use_a_team) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_two_programs_take_turns_on_one_team(team: Team) -> None:
    """As the decoder's program and the head's do."""
    first, second = _Chain(team), _Chain(team, depth=3)
    for x in _inputs(20):
        wants = first.reference(x), second.reference(x)
        for chain, want in zip((first, second), wants, strict=True):
            torch.testing.assert_close(chain.run(x), want, rtol=1e-4, atol=1e-4)


def test_a_team_sleeps_between_programs_and_wakes_up(team: Team) -> None:
    chain = _Chain(team)
    x = _inputs(1)[0]
    want = chain.run(x)
    for _ in range(3):
        time.sleep(0.02)  # a hundred times as long as waiting threads spin
        assert torch.equal(chain.run(x), want)


def test_threads_end_with_their_team(best_kernels: KernelLibrary) -> None:
    gc.collect()
    before = _num_threads()
    for num_threads in (1, 2, 5):
        unused, used = Team(best_kernels, num_threads), Team(best_kernels, num_threads)
        _Chain(used).run(_inputs(1)[0])
        assert _num_threads() == before + 2 * (num_threads - 1)
        del unused, used
        gc.collect()
        assert _num_threads() == before


def test_a_program_keeps_its_team(best_kernels: KernelLibrary) -> None:
    chain = _Chain(Team(best_kernels, 2))
    gc.collect()
    x = _inputs(1)[0]
    torch.testing.assert_close(chain.run(x), chain.reference(x), rtol=1e-4, atol=1e-4)


def test_nothing_to_do(team: Team) -> None:
    empty = Program(team, [])
    empty.run(Step.of_rows(3))
    assert len(empty.time(Step.of_rows(3))) == 0
    chain = _Chain(team)
    chain.stream.fill_(7.0)
    chain.program.run(Step.of_rows(0))
    assert (chain.stream == 7.0).all()


def test_a_step_of_other_numbers_is_refused(team: Team) -> None:
    """The kernels would read its bytes as what they are not."""
    chain, step = _Chain(team), Step.of_rows(2)
    for wrong in (
        replace(step, input_ids=step.input_ids.int()),
        replace(step, block_tables=step.block_tables.long()),
        replace(step, slot_mapping=step.slot_mapping[:, :1]),
    ):
        with pytest.raises(AssertionError):
            chain.program.run(wrong)


def test_times_are_those_of_the_commands(team: Team) -> None:
    chain = _Chain(team)
    for num_rows in (0, 1, _MAX_ROWS):
        began = time.monotonic()
        durations = chain.program.time(Step.of_rows(num_rows))
        took = time.monotonic() - began
        assert durations.shape == (len(chain.operations),)
        assert (durations >= 0).all()
        assert 0 < durations.sum() <= took


def test_other_python_threads_go_on_during_a_run(best_kernels: KernelLibrary) -> None:
    chain = _Chain(Team(best_kernels, 1), depth=60, width=512, max_rows=64)  # some hundredth of a second
    step = Step.of_rows(64)
    moments: list[float] = []
    stop = threading.Event()

    def note_the_time() -> None:
        while not stop.wait(0.0002):
            moments.append(time.monotonic())

    thread = threading.Thread(target=note_the_time)
    thread.start()
    try:
        for _ in range(200):
            began = time.monotonic()
            took = chain.program.time(step).sum()
            # The run began within microseconds after `began`, so that its second half lies in the run for certain.
            if any(began + took / 2 < moment < began + took for moment in moments):
                return
            moments.clear()
    finally:
        stop.set()
        thread.join()
    pytest.fail("no other thread ran while a program did")


def test_too_many_threads_are_an_error_that_says_so(best_kernels: KernelLibrary) -> None:
    """In a process that has no memory left for their stacks."""
    code = f"""
import resource
from pathlib import Path
from model_worker.engine.ops.cpu.machine_level import PORTABLE
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from registry.errors import InternalError
library = KernelLibrary(Path({str(best_kernels.path)!r}), PORTABLE)
before = len(list(Path("/proc/self/task").iterdir()))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
try:
    Team(library, 64)
except InternalError as error:
    print(error)
assert len(list(Path("/proc/self/task").iterdir())) == before
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "64 threads cannot be started; lower --num-threads.\n"


def test_a_file_that_is_no_library_is_an_error_that_says_so(best_kernels: KernelLibrary, tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"not a library")
    with pytest.raises(InternalError, match="delete the file"):
        KernelLibrary(path, best_kernels.level)
