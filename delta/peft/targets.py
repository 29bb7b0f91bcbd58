"""Which modules an adapter's configuration means, by PEFT's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from delta.peft.adapter_config import LoraConfig, TargetRules
from delta.peft.expressions import LAYER_INDEX

T = TypeVar("T")


def is_target(rules: TargetRules, module: str) -> bool:
    """The module carries adapter weights; of no module where the configuration does not say which."""
    if _is_excluded(rules.excluded, module):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in rules.saved_modules):
        return False
    if rules.modules is None:
        return False
    if isinstance(rules.modules, str):
        return re.fullmatch(rules.modules, module) is not None
    if module in rules.modules:
        return True
    in_layers = rules.layers is None or _layer_index(module, rules.layers_patterns) in rules.layers
    return in_layers and ends_with_any(module, rules.modules)


def ends_with_any(path: str, names: Iterable[str]) -> bool:
    """A name is the path or its end after a dot."""
    return f".{path}".endswith(tuple(f".{name}" for name in names))


def pattern_value(pattern: Mapping[str, T], path: str, default: T) -> T:
    """Of the first regular expression that matches the end of the path."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", path):
            return value
    return default


def rank_and_scale(config: LoraConfig, path: str) -> tuple[int, float]:
    """Of a module, or of a parameter that is a target itself."""
    rank = pattern_value(config.rank_pattern, path, config.rank)
    alpha = pattern_value(config.alpha_pattern, path, config.alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def in_saved_module(rules: TargetRules, module: str) -> bool:
    """The file holds the module, or one around it, whole. As in PEFT a name may begin in the middle of a word."""
    if not rules.saved_modules:
        return False
    parts = module.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(path.endswith(rules.saved_modules) for path in around)


def _is_excluded(excluded: tuple[str, ...] | str, module: str) -> bool:
    """A regular expression matches the whole path."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return ends_with_any(module, excluded)


def _layer_index(module: str, patterns: tuple[str, ...]) -> int | None:
    """The first number in the path: after any name, or after a name that one of the patterns matches."""
    for prefix in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]:
        if match := re.match(rf"{prefix}\.(?P<{LAYER_INDEX}>\d+)\.", module):
            # An expression with alternatives may match without a number behind it.
            return None if match[LAYER_INDEX] is None else int(match[LAYER_INDEX])
    return None
