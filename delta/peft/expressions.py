"""Regular expressions out of a file that anybody may have written: none may keep the process busy for minutes.

Python matches by trying, and holds the interpreter's lock meanwhile: with q repeats on a path of n characters it may
try n^q ways, and repeats of groups that hold repeats cost 2^n.
"""

from __future__ import annotations

import re

LAYER_INDEX = "layer_index"
"""The name of a group in the expressions that ours are made part of."""

_MAX_REPEATS = 6
_MAX_CHARACTERS = 4000


def flaw_of_expression(expression: str) -> str | None:
    """Why the expression is not used, or None: it may be."""
    if len(expression) > _MAX_CHARACTERS:
        return f"it is longer than {_MAX_CHARACTERS} characters"
    try:
        re.compile(expression)
        re.compile(rf"(?P<{LAYER_INDEX}>.*)({expression})")
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression: {error}"
    num_repeats, nested = _repeats(expression)
    if nested:
        return "it repeats a group that holds repeats"
    if num_repeats > _MAX_REPEATS:
        return f"it holds more than {_MAX_REPEATS} repeats"
    return None


def _repeats(expression: str) -> tuple[int, bool]:
    """How many quantifiers a valid expression has, and whether one repeats a group with one inside."""
    tokens = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|[*+?]\??|\{\d*,?\d*\}\??|.", expression, re.DOTALL)
    counts, num_repeats, closed = [0], 0, 0
    nested = False
    for token in tokens:
        inside, closed = closed, 0
        if token in ("(", "(?"):
            counts.append(0)
        elif token == ")":
            closed = counts.pop()
            counts[-1] += closed
        elif token[0] in "*+?{":
            nested |= inside > 0 and token[0] != "?"
            num_repeats += 1
            counts[-1] += 1
    return num_repeats, nested
