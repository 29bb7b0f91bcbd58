"""`adapter_config.json` of LoRA (with DoRA, rsLoRA and patterns) and (IA)3, read so that nothing in it is passed over.

Every field is used, or harmless for inference (`HARMLESS` says why), or refused at a value that changes what the
adapter computes (`REFUSED` says why). A field that is not known must be null, false or empty.
Source: the configuration classes of PEFT 0.21; docs/formats/peft.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from delta.peft.expressions import flaw_of_expression
from registry.errors import CheckpointError, UnsupportedModelError

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_INTEGER = 2**31

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, slots=True)
class TargetRules:
    """Which modules carry adapter weights. Names match a module or the end of its path; a str is a regular expression.

    Attributes:
        modules: None where the configuration leaves it to the file.
        excluded: never targets.
        layers: only these layers; None: all.
        layers_patterns: regular expressions for what stands before the layer's number.
        saved_modules: modules that the file holds whole, by the end of their path.
    """

    modules: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    layers_patterns: tuple[str, ...]
    saved_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank terms: W + scale · B A.

    Attributes:
        parameters: names (or their ends) of parameters that carry low-rank terms without a module of their own.
        rank_pattern: regular expressions for module paths, the first that matches counts.
        token_indices: rows of an embedding that are replaced; under None for the input embedding.
        tied: terms of the embedding hold for an output head tied to it, too.
    """

    targets: TargetRules
    parameters: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    bias: Bias
    lora_bias: bool
    token_indices: Mapping[str | None, tuple[int, ...]]
    tied: bool


@dataclass(frozen=True, slots=True)
class Ia3Config:
    """Scales of outputs, or of inputs.

    Attributes:
        feedforward: whose inputs are scaled: ends of module paths, or a regular expression; None: as the shapes say.
    """

    targets: TargetRules
    feedforward: tuple[str, ...] | str | None


HARMLESS: Mapping[str, str] = {
    "auto_mapping": "names Python classes",
    "base_model_name_or_path": "a name; the base is told apart by its digest and shapes",
    "revision": "a name",
    "peft_version": "says who wrote the file",
    "inference_mode": "freezes parameters in training",
    "lora_dropout": "training only",
    "fan_in_fan_out": "PEFT sets it from the module's class, and so do we",
    "loftq_config": "initial values; what it does to the base is refused at init_lora_weights",
    "eva_config": "initial values",
    "corda_config": "initial values; what it does to the base is refused at init_lora_weights",
    "lora_ga_config": "initial values; what it does to the base is refused at init_lora_weights",
    "init_ia3_weights": "initial values",
    "megatron_core": "the name of a package; megatron_config is what counts",
    "qalora_group_size": "counts with use_qalora only",
    "runtime_config": "where initial values are computed",
}
"""Fields that do not change what a trained adapter computes, and why."""

REFUSED: Mapping[str, str] = {
    "megatron_config": "weights are split for Megatron; gather them and save again",
    "alora_invocation_tokens": "activated LoRA starts in the middle of a prompt; that is not implemented",
    "use_qalora": "QA-LoRA pools the inputs; that is not implemented. Merge the adapter with PEFT",
    "monteclora_config": "MonteCLoRA samples weights; that is not implemented. Merge the adapter with PEFT",
    "layer_replication": "it computes with repeated layers, another model than the base. Merge it with PEFT",
    "use_bdlora": "block-diagonal LoRA is not implemented. Merge the adapter with PEFT",
    "arrow_config": "Arrow chooses among adapters for each token; that is not implemented",
    "kasa_config": "KaSA changes the base's own weights. Merge the adapter with PEFT",
    "velora_config": "VeLoRA keeps state of training beside the weights. Merge the adapter with PEFT",
}
"""Fields that change what an adapter computes in a way that is not implemented, and what to do."""

_COMMON_USED = frozenset({"peft_type", "task_type", "target_modules", "exclude_modules", "modules_to_save"})
_LORA_USED = _COMMON_USED | {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "ensure_weight_tying",
    "init_lora_weights",
}
_IA3_USED = _COMMON_USED | {"feedforward_modules"}

_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract the initial adapter from the base's weights."""

_CONVERTIBLE = frozenset({"LOHA", "LOKR", "VERA", "C3A", "FOURIERFT", "MISS", "WAVEFT", "PSOFT"})
"""Kinds that PEFT's `convert_to_lora` takes."""


def read_adapter_config(file: Path) -> LoraConfig | Ia3Config:
    """Read and check an `adapter_config.json`.

    Raises:
        CheckpointError: missing, not JSON, or a value of a wrong type.
        UnsupportedModelError: an adapter that we cannot run exactly.
    """
    fields = _Fields(file)
    kind = fields.raw.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UnsupportedModelError(f"{file}: peft_type is {kind!r}; only LORA and IA3 are served. {_remedy(kind)}")
    fields.refuse_unknown(_LORA_USED if kind == "LORA" else _IA3_USED)
    task = fields.raw.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{file}: task_type is {task!r}; only adapters of causal language models are served"
        )
    return _lora_config(fields) if kind == "LORA" else _ia3_config(fields)


def _remedy(kind: object) -> str:
    if isinstance(kind, str) and kind in _CONVERTIBLE:
        return "Convert the adapter with PEFT's convert_to_lora"
    if kind == "XLORA":
        return "X-LoRA weighs adapters for each token; publish the adapters that it mixes one by one"
    if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"):
        return "It adds virtual tokens instead of changing weights; train a LoRA adapter"
    if kind is None:
        return "Was this file written by PEFT?"
    return "Merge it into the base with PEFT (merge_and_unload) and publish the difference"


def _lora_config(fields: _Fields) -> LoraConfig:
    init = fields.raw.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _HARMLESS_INITS):
        raise UnsupportedModelError(
            f"{fields.file}: init_lora_weights is {init!r}, which changes the base's own weights. Save the adapter "
            "with save_pretrained(path_initial_model_for_weight_conversion=...) so that it fits the plain base"
        )
    bias = fields.raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{fields.file}: bias is {bias!r}; it must be 'none', 'all' or 'lora_only'")
    config = LoraConfig(
        targets=_target_rules(fields),
        parameters=fields.strings("target_parameters"),
        rank=fields.integer("r", 8),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern={key: _integer(fields, "rank_pattern", at) for key, at in fields.mapping("rank_pattern")},
        alpha_pattern={key: _number(fields, "alpha_pattern", at) for key, at in fields.mapping("alpha_pattern")},
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        bias=cast(Bias, bias),
        lora_bias=fields.flag("lora_bias"),
        token_indices=_token_indices(fields),
        tied=fields.flag("ensure_weight_tying"),
    )
    for key in (*config.rank_pattern, *config.alpha_pattern):
        fields.check_expression("rank_pattern or alpha_pattern", key)
    if config.use_dora and config.lora_bias:
        raise CheckpointError(f"{fields.file}: use_dora and lora_bias exclude each other")
    return config


def _ia3_config(fields: _Fields) -> Ia3Config:
    given = fields.raw.get("feedforward_modules")
    return Ia3Config(_target_rules(fields), None if given is None else fields.names("feedforward_modules"))


def _target_rules(fields: _Fields) -> TargetRules:
    modules = None if fields.raw.get("target_modules") is None else fields.names("target_modules")
    if modules == "all-linear":
        modules = None
    layers = fields.raw.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise CheckpointError(f"{fields.file}: layers_to_transform must be an integer or a list of integers")
    patterns = fields.strings("layers_pattern")
    for pattern in patterns:
        fields.check_expression("layers_pattern", pattern)
    saved = fields.strings("modules_to_save")
    for name in saved:
        fields.check_expression("modules_to_save", name)
    if "" in saved:
        raise CheckpointError(f"{fields.file}: modules_to_save holds an empty name")
    return TargetRules(modules, fields.names("exclude_modules"), frozenset(numbers) or None, patterns, saved)


def _token_indices(fields: _Fields) -> dict[str | None, tuple[int, ...]]:
    given = fields.raw.get("trainable_token_indices")
    by_module: dict[Any, Any] = {None: given} if isinstance(given, list) else given or {}
    if not isinstance(by_module, dict):
        raise CheckpointError(f"{fields.file}: trainable_token_indices must be a list, or lists by module")
    for indices in by_module.values():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise CheckpointError(f"{fields.file}: trainable_token_indices must be token ids")
        if len(set(indices)) != len(indices):
            raise CheckpointError(f"{fields.file}: trainable_token_indices names a token twice")
    return {module: tuple(indices) for module, indices in by_module.items() if indices}


class _Fields:
    """The fields of one file, with their types checked as they are asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            if file.stat().st_size > _MAX_CONFIG_BYTES:
                raise CheckpointError(f"{file} is larger than {_MAX_CONFIG_BYTES} bytes; it is no configuration")
            raw = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}); is this an adapter's directory?"
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is not JSON ({error}); save the adapter again") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file} does not hold a JSON object; save the adapter again")
        self.raw: dict[str, Any] = raw

    def refuse_unknown(self, used: frozenset[str]) -> None:
        for name, value in self.raw.items():
            if name in used or name in HARMLESS or value is None or value is False or value in ("", [], {}):
                continue
            if name in REFUSED:
                raise UnsupportedModelError(f"{self.file}: {name} is set: {REFUSED[name]}")
            raise UnsupportedModelError(
                f"{self.file}: the field {name!r} is not known and may change what the adapter computes. If it does "
                "not, remove it from the file; otherwise merge the adapter with PEFT"
            )

    def integer(self, name: str, default: int) -> int:
        return _integer(self, name, self.raw.get(name, default))

    def number(self, name: str, default: float) -> float:
        return _number(self, name, self.raw.get(name, default))

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if not (value is None or isinstance(value, bool)):
            raise CheckpointError(f"{self.file}: {name} must be true or false, not {value!r}")
        return bool(value)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        values: Sequence[Any] = [value] if isinstance(value, str) and value else value or []
        if not isinstance(values, list) or not all(isinstance(entry, str) for entry in values):
            raise CheckpointError(f"{self.file}: {name} must be a list of names")
        return tuple(values)

    def names(self, name: str) -> tuple[str, ...] | str:
        """Names, or a regular expression where the file has a single string."""
        value = self.raw.get(name)
        if isinstance(value, str) and value:
            self.check_expression(name, value)
            return value
        return self.strings(name)

    def mapping(self, name: str) -> Sequence[tuple[str, Any]]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.file}: {name} must map names to numbers")
        return tuple(value.items())

    def check_expression(self, name: str, expression: str) -> None:
        if (flaw := flaw_of_expression(expression)) is not None:
            raise CheckpointError(
                f"{self.file}: {name}: {expression[:100]!r} cannot be used, {flaw}; name modules in full"
            )


def _integer(fields: _Fields, name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_INTEGER:
        raise CheckpointError(f"{fields.file}: {name} must be a positive integer, not {value!r:.80}")
    return value


def _number(fields: _Fields, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_INTEGER:
        raise CheckpointError(f"{fields.file}: {name} must be a number, not {value!r:.80}")
    return float(value)
