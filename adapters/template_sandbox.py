"""A Jinja environment for chat templates that come with a model: sandboxed, and bounded in work and memory.

A chat template is a program that a model's publisher wrote and whose input a client wrote. jinja2's immutable sandbox
keeps it away from Python's internals, but not from `{% for %}` nests that never end, nor from `"x" * 10**9`. So each
rendering has a budget (`Limits`): loop iterations, macro and filter calls are counted, everything that is output is
measured before it is kept, and the operations that can make a large value out of small ones are refused before they
run. Behaviour within the budget is that of `transformers.utils.chat_template_utils`.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class TemplateLimitError(jinja2.TemplateError):
    """The rendering used up its budget."""


class RaisedByTemplateError(jinja2.TemplateError):
    """The template called `raise_exception`: it refuses the conversation."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one template and one rendering of it may cost."""

    max_source_chars: int = 262_144
    max_output_chars: int = 8_388_608
    max_value_chars: int = 67_108_864  # of an intermediate value, estimated from above
    max_steps: int = 1_000_000  # loop iterations, calls and filters
    max_seconds: float = 5.0


# Filters and methods whose result can be much larger than their operands.
_AMPLIFIERS = frozenset(
    (
        *("replace", "join", "translate", "expandtabs", "ljust", "rjust", "center", "zfill", "format", "format_map"),
        *("indent", "wordwrap", "batch", "slice", "round", "tojson", "sum", "xmlattr", "urlize"),
    )
)
_MAX_INT_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{6,}|\*")


class _Budget(threading.local):
    """What the rendering on this thread has used up; one environment may render on several threads."""

    steps = 0
    output_chars = 0
    deadline = float("inf")


def _estimated_size(value: Any, depth: int = 0) -> int:
    """An upper bound for the characters that `value` contributes: text by length, an integer by its worth (a width)."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, bool) or value is None:
        return 5
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, Mapping):
        items: Any = (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    else:
        return 32
    return sum(_content_size(item, depth + 1) + 4 for item in items) if depth < 64 else 32


def _content_size(value: Any, depth: int) -> int:
    return 32 if isinstance(value, int | float) else _estimated_size(value, depth)


class _CountingCodeGenerator(CodeGenerator):
    """Compiles a charge into every loop body and makes `~` check the size of what it joins."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        static_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        charge = nodes.Call(nodes.EnvironmentAttribute("charge"), [nodes.Const(static_chars)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_text((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it only yields its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeDict:
    """`dict(...)` for templates without access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace(...)` that holds no underscore names, which could shadow Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment; `render` is the only way to run a template of it within its limits."""

    code_generator_class = _CountingCodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, limits: Limits) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationExtension, jinja2.ext.loopcontrols],
            finalize=self._charge_output,
            cache_size=0,
        )
        self.limits = limits
        self._budget = _Budget()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bounded_filter(name, function) for name, function in self.filters.items()}
        self.globals.pop("lipsum")
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_SafeDict(), namespace=_SafeNamespace
        )

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Render within the limits.

        Raises: TemplateLimitError, or whatever error of jinja2 or Python the template causes.
        """
        budget = self._budget
        budget.steps, budget.output_chars = 0, 0
        budget.deadline = time.monotonic() + self.limits.max_seconds
        pieces: list[str] = []
        size = 0
        for piece in template.generate(**variables):
            size += len(piece)
            if size > self.limits.max_output_chars:
                raise TemplateLimitError(f"it writes more than {self.limits.max_output_chars} characters")
            pieces.append(piece)
        return "".join(pieces)

    def charge(self, output_chars: int = 0) -> None:
        """Count one step and the text that it will write."""
        budget = self._budget
        budget.steps += 1
        budget.output_chars += output_chars
        if budget.steps > self.limits.max_steps:
            raise TemplateLimitError(f"it takes more than {self.limits.max_steps} steps")
        # Text passes through several macros on its way out, so it may be counted more than once.
        if budget.output_chars > 8 * self.limits.max_output_chars:
            raise TemplateLimitError(f"it writes more than {self.limits.max_output_chars} characters")
        if time.monotonic() > budget.deadline:
            raise TemplateLimitError(f"it runs for more than {self.limits.max_seconds:g} s")

    def join_text(self, parts: tuple[Any, ...]) -> str:
        """The `~` operator."""
        texts = [str(part) for part in parts]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            bits = left.bit_length() if isinstance(left, int) else 64
            if (operator == "**" and bits * abs(right) > _MAX_INT_BITS) or bits > _MAX_INT_BITS:
                raise TemplateLimitError("it computes with numbers that are too large")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            self._check_size(_estimated_size(sequence) * max(0, count))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, (right,))
        elif operator == "+":
            self._check_size(_content_size(left, 0) + _content_size(right, 0))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Positional names as in jinja2: a template may pass keyword arguments called `self` or `obj`.
        if __obj == __self.charge:
            return __self.charge(*args)
        __self.charge()
        name = getattr(__obj, "__name__", "")
        if name in _AMPLIFIERS:
            args = tuple(__self._materialized(arg) for arg in args)
            # The sandbox wraps str.format, which hides the string that it is bound to.
            bound = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", "")
            __self._check_amplified(name, (bound, *args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def _charge_output(self, value: Any) -> Any:
        self.charge(len(value) if isinstance(value, str) else _estimated_size(str(value)))
        return value

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            if name in _AMPLIFIERS:
                args = tuple(self._materialized(arg) for arg in args)
                self._check_amplified(name, (*args, *kwargs.values()))
            return function(*args, **kwargs)

        return bounded

    def _materialized(self, value: Any) -> Any:
        if not isinstance(value, Iterator):
            return value
        items, size = [], 0
        for item in value:
            self.charge()
            size += _content_size(item, 0)
            self._check_size(size)
            items.append(item)
        return items

    def _check_amplified(self, name: str, operands: tuple[Any, ...]) -> None:
        # jinja2 gives some filters its own state first; then comes the value itself, whose worth is no width.
        values = [
            value for value in operands if not isinstance(value, jinja2.Environment | nodes.EvalContext | Context)
        ]
        sizes = [_content_size(values[0], 0), *map(_estimated_size, values[1:])]
        if name in ("format", "format_map"):
            self._check_format(str(values[0]), tuple(values[1:]))
        else:
            self._check_size((max(sizes) + 1) * (1 + sum(sizes) - max(sizes)))

    def _check_format(self, text: str, operands: tuple[Any, ...]) -> None:
        if _WIDE_FORMAT.search(text):
            raise TemplateLimitError("it formats text with a width that is too large or computed")
        self._check_size((text.count("%") + text.count("{") + 1) * sum(map(_estimated_size, operands), len(text)))

    def _check_size(self, size: int | float) -> None:
        if size > self.limits.max_value_chars:
            raise TemplateLimitError("it builds a value that is too large")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise RaisedByTemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
