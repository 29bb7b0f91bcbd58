"""The order in which a model computes, read off a traced step.

Operations that follow each other and do the same kind of work are one block; layers that do the same are one section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from model_worker.engine.model_parts import OpKind
from model_worker.engine.trace import Shape, TraceRow
from model_worker.inspection.measured_step import StepTrace
from model_worker.inspection.quantities import format_list

_TOKENS, _ROWS = "T", "R"
"""Names of sizes in shapes: the tokens of the step, and those of them whose logits are computed."""


@dataclass(frozen=True, slots=True)
class Block:
    """Operations of one kind.

    Attributes:
        names: of the modules, within their layer.
        inputs: shapes of the first operation's inputs, as text: `[T, 576]`.
        outputs: shapes of the outputs of all of them.
        self_ns: time of all of them, in all layers of the section.
    """

    kind: OpKind
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    self_ns: int

    @property
    def flow(self) -> str:
        """Shapes from inputs to outputs, those of them that there are: `[T, 576] → [T, 64] ×2`"""
        return " → ".join(format_list(shapes) for shapes in (self.inputs, self.outputs) if shapes)


@dataclass(frozen=True, slots=True)
class Section:
    """What is computed once (no layers), or alike in each of some layers."""

    layers: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Flowchart:
    """Sections in the order in which they are first reached.

    Attributes:
        phase, num_tokens: of the step that was traced.
        total_ns: time of all blocks.
    """

    phase: str
    num_tokens: int
    sections: tuple[Section, ...]

    @property
    def total_ns(self) -> int:
        return sum(block.self_ns for section in self.sections for block in section.blocks)


def draw_flowchart(trace: StepTrace) -> Flowchart:
    """The flowchart of a traced step."""
    num_tokens = trace.shape.num_tokens
    sections: list[Section] = []
    for layer, rows in groupby(trace.rows, key=lambda row: row.layer):
        section = Section(() if layer is None else (layer,), tuple(_blocks(rows, num_tokens)))
        alike = next((other for other in sections if other.layers and _same(other, section)), None)
        if layer is None or alike is None:
            sections.append(section)
        else:
            sections[sections.index(alike)] = _merged(alike, section)
    return Flowchart(trace.shape.phase, num_tokens, tuple(sections))


def layer_ranges(layers: Iterable[int]) -> str:
    """`0-5, 8` for layers 0 to 5 and 8."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][-1] == layer - 1:
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)


def _blocks(rows: Iterable[TraceRow], num_tokens: int) -> Iterator[Block]:
    """Blocks in the order of execution; last, what the modules compute between those that they call."""
    ordered = list(rows)
    between = [row for row in ordered if row.kind is OpKind.BETWEEN]
    for _, run in groupby((row for row in ordered if row.kind is not OpKind.BETWEEN), key=lambda row: row.kind):
        yield _block(list(run), num_tokens)
    if between:
        yield Block(
            OpKind.BETWEEN,
            tuple(row.name or "residual" for row in between),
            (),
            (),
            sum(row.self_ns for row in between),
        )


def _block(rows: list[TraceRow], num_tokens: int) -> Block:
    of_head = rows[0].kind is OpKind.HEAD or rows[0].name.startswith("head.")  # its product, or what prepares its input
    first_size = _ROWS if of_head else _TOKENS

    def text(shape: Shape) -> str:
        sizes = [
            first_size if index == 0 and (size == num_tokens or first_size == _ROWS) else str(size)
            for index, size in enumerate(shape)
        ]
        return f"[{', '.join(sizes)}]"

    return Block(
        kind=rows[0].kind,
        names=tuple(row.name for row in rows),
        inputs=tuple(text(shape) for shape in rows[0].inputs),
        outputs=tuple(text(shape) for row in rows for shape in row.outputs),
        self_ns=sum(row.self_ns for row in rows),
    )


def _same(one: Section, other: Section) -> bool:
    return [_without_time(block) for block in one.blocks] == [_without_time(block) for block in other.blocks]


def _without_time(block: Block) -> Block:
    return replace(block, self_ns=0)


def _merged(one: Section, other: Section) -> Section:
    blocks = (replace(a, self_ns=a.self_ns + b.self_ns) for a, b in zip(one.blocks, other.blocks, strict=True))
    return Section(one.layers + other.layers, tuple(blocks))
