"""The fastest of some choices, for each class of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Choice = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """One class of shapes of one op.

    Attributes:
        candidates: choices; the first is the default.
        run: computes it once, with a choice, on the device.
        check: raises AssertionError where what a choice computes is wrong.
    """

    op: str
    shape_class: str
    candidates: tuple[Choice, ...]
    run: Callable[[Choice], object]
    check: Callable[[Choice], None]


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to one problem.

    Attributes:
        default_ms: None: the default cannot be launched on this device.
        num_refused: candidates that cannot be, for lack of registers or shared memory, say.
    """

    problem: Problem
    choice: Choice
    best_ms: float
    default_ms: float | None
    num_refused: int


def search(problem: Problem, measure_ms: Callable[[Callable[[], object]], float]) -> Found:
    """Try every candidate.

    Args:
        measure_ms: milliseconds that one call of a function takes on the device.

    Raises:
        AssertionError: a candidate computes something wrong.
        RuntimeError: none can be launched.
    """
    times: dict[int, float] = {}
    for place, choice in enumerate(problem.candidates):
        try:
            problem.run(choice)
        except Exception as error:  # compilers and drivers refuse what does not fit with errors of many kinds
            refused = f"{type(error).__name__}: {error}"
            continue
        problem.check(choice)
        times[place] = measure_ms(lambda choice=choice: problem.run(choice))  # type: ignore[misc]
    if not times:
        raise RuntimeError(f"{problem.op}, {problem.shape_class}: nothing can be launched; the last error: {refused}")
    best = min(times, key=times.__getitem__)
    num_refused = len(problem.candidates) - len(times)
    return Found(problem, problem.candidates[best], times[best], times.get(0), num_refused)


def choices_of(found: Iterable[Found]) -> dict[str, dict[str, Choice]]:
    """As a table has them."""
    ops: dict[str, dict[str, Choice]] = {}
    for answer in found:
        ops.setdefault(answer.problem.op, {})[answer.problem.shape_class] = dict(answer.choice)
    return ops
