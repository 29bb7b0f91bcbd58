"""Modules are meant by the same rules as in PEFT; compared with its own functions on random rules."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from delta.peft.adapter_config import TargetRules
from delta.peft.targets import is_target, pattern_value

_MODULES = [
    *(f"model.layers.{i}.self_attn.{name}" for i in (0, 1, 11) for name in ("q_proj", "v_proj")),
    *(f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("down_proj", "up_proj", "experts.3.up_proj")),
    "model.embed_tokens",
    "lm_head",
    "transformer.h.1.attn.c_attn",
    "h.1.c_attn",
]
_NAMES = [
    "q_proj",
    "proj",
    "mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "up_proj",
    "lm_head",
    "mlp",
    "attn",
    "c_attn",
]
_PREFIXES = ["layers", "h", "model.layers", "a|b", "l.*s", "experts"]
_EXPRESSIONS = [r".*_proj", r".*\.1\..*", "lm_head", r"model\..*(q|up)_proj", "q_proj"]
_names = st.lists(st.sampled_from(_NAMES), max_size=3, unique=True).map(tuple)


@given(
    modules=_names | st.sampled_from(_EXPRESSIONS),
    excluded=_names | st.sampled_from(_EXPRESSIONS),
    layers=st.none() | st.sets(st.sampled_from([0, 1, 3, 11]), min_size=1),
    patterns=st.lists(st.sampled_from(_PREFIXES), max_size=2).map(tuple),
    saved=_names,
)
def test_targets_are_those_of_peft(
    modules: tuple[str, ...] | str,
    excluded: tuple[str, ...] | str,
    layers: set[int] | None,
    patterns: tuple[str, ...],
    saved: tuple[str, ...],
) -> None:
    rules = TargetRules(modules, excluded, None if layers is None else frozenset(layers), patterns, saved)
    config = SimpleNamespace(
        target_modules=set(modules) if isinstance(modules, tuple) else modules,
        exclude_modules=set(excluded) if isinstance(excluded, tuple) else excluded,
        layers_to_transform=None if layers is None else sorted(layers),
        layers_pattern=list(patterns),
        modules_to_save=list(saved),
        target_parameters=None,
    )
    for module in _MODULES:
        expected = check_target_module_exists(config, module)
        assert is_target(rules, module) == bool(expected), module


@given(st.lists(st.tuples(st.sampled_from([*_NAMES, *_EXPRESSIONS, r"layers\.1\..*"]), st.integers(1, 9)), max_size=4))
def test_patterns_are_those_of_peft(entries: list[tuple[str, int]]) -> None:
    pattern = dict(entries)
    for module in _MODULES:
        assert pattern_value(pattern, module, 0) == pattern.get(get_pattern_key(list(pattern), module), 0)
