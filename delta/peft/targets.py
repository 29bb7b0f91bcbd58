"""Which modules an adapter's configuration means, by PEFT's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from delta.peft.adapter_config import LoraConfig, TargetRules

T = TypeVar("T")


def is_target(rules: TargetRules, module: str) -> bool:
    """The module carries adapter weights. `rules.modules` is not None."""
    if names_or_expression(rules.excluded, module):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in rules.saved_modules):
        return False
    if not isinstance(rules.modules, tuple) or module in rules.modules:
        return isinstance(rules.modules, tuple) or re.fullmatch(rules.modules or "", module) is not None
    if not ends_with_any(module, rules.modules):
        return False
    return rules.layers is None or _layer_index(module, rules.layers_patterns) in rules.layers


def names_or_expression(names: tuple[str, ...] | str, module: str) -> bool:
    """A regular expression matches the whole path; a name matches it or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or ends_with_any(module, names)


def ends_with_any(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def pattern_value(pattern: Mapping[str, T], path: str, default: T) -> T:
    """Of the first regular expression that matches the end of the path."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", path):
            return value
    return default


def _layer_index(module: str, patterns: tuple[str, ...]) -> int | None:
    """The first number in the path: after any name, or after a name that one of the patterns matches."""
    for prefix in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]:
        if match := re.match(rf"{prefix}\.(?P<index>\d+)\.", module):
            return int(match["index"])
    return None


def rank_and_scale(config: LoraConfig, path: str) -> tuple[int, float]:
    """Of a module, or of a parameter that is a target itself."""
    rank = pattern_value(config.rank_pattern, path, config.rank)
    alpha = pattern_value(config.alpha_pattern, path, config.alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def in_saved_module(rules: TargetRules, module: str) -> bool:
    """The file holds the module, or one around it, whole. As in PEFT a name may begin in the middle of a word."""
    parts = module.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(path.endswith(rules.saved_modules) for path in around)
