"""Loading: every tensor of the checkpoint goes to exactly one place, and every place gets exactly one tensor."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.load_plan import LoadPlan
from adapters.stretches import Stretches
from adapters.weights import iterate_weights
from compression.grouped_weight import GroupedWeight
from model_worker.engine.freed_memory import return_freed_memory
from model_worker.engine.load_report import LoadReport, Outcome
from model_worker.engine.models.causal_model import CausalModel, DividedModel
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.models.native_decoder import NativeDecoder
from model_worker.engine.ops.cpu.program import Team
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.staged_weights import stage_weights
from registry.errors import CheckpointError, UnsupportedModelError
from registry.parameter_names import current_name, expert_matrix

logger = logging.getLogger(__name__)

# Tensors that are recomputed, not loaded: rotary frequencies and causal masks that old checkpoints carry.
_IGNORED = re.compile(
    r"\.rotary_emb\.inv_freq$"
    r"|(^|\.)h\.\d+\.attn\.(bias|masked_bias)$"  # gpt2
    r"|\.attention\.(bias|masked_bias)$"  # gpt_neox
    r"|(^|\.)position_ids$"
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: a weight, or of a weight [E, 2I, H] or [E, H, I] expert `index`, or its `half` (of 2I)."""

    weight: str
    index: int | None = None
    half: int | None = None


@dataclass(frozen=True, slots=True)
class NativeRoute:
    """What the native decoder for CPUs runs on.

    Attributes:
        team: threads and kernels.
        max_rows: most tokens of one step.
    """

    team: Team
    max_rows: int


@torch.no_grad()
def load_model(
    plan: LoadPlan,
    device: torch.device,
    report: LoadReport | None = None,
    *,
    model_impl: str = "auto",
    native: NativeRoute | None = None,
    group: RankGroup | None = None,
) -> CausalModel:
    """Build the planned model and fill it.

    Of each tensor no more is read than this rank has of it. Beside the model at most one matrix is in memory; on a
    GPU's host, what is on its way there (`stage_weights`).

    Args:
        report: takes note of what happens to each tensor.
        model_impl: "native", "transformers", or "auto": native where the model and the machine allow it.
        native: of CPUs; None: there is none, or the device is none.
        group: the ranks that the model is divided among, natively by the decoder for GPUs; None: it is whole.

    Raises:
        CheckpointError: tensors are missing, unknown, given twice or of the wrong shape; names them.
        UnsupportedModelError: the model cannot be computed exactly, or not in the way that was asked for.
    """
    report = LoadReport() if report is None else report
    with report.phase("build"):
        model = _build(plan, device, model_impl, native, group)
        filler = _Filler(model, report)
    weights = iterate_weights(plan, keep_blocks=model.keeps_blocks, select=filler.select)
    if device.type == "cuda":
        weights = stage_weights(weights, device)
    for name, tensor in report.timed("read", weights):
        with report.phase("fill"):
            filler.put(name, tensor)
    with report.phase("finish"):
        filler.check_complete()
        model.finish()
        return_freed_memory()
    report.ties.update(model.ties)
    return model


def _build(
    plan: LoadPlan, device: torch.device, model_impl: str, native: NativeRoute | None, group: RankGroup | None
) -> CausalModel:
    dtype = getattr(torch, plan.dtype)
    assert isinstance(dtype, torch.dtype)
    why = "--model-impl transformers was asked for"
    if model_impl != "transformers":
        try:
            return _build_natively(plan, device, dtype, native, group)
        except UnsupportedModelError as error:
            why = error.message
        if model_impl == "native":
            raise UnsupportedModelError(f"--model-impl native is not possible: {why}")
    if plan.quantization is not None:
        raise UnsupportedModelError(
            f"Only the native decoders keep weights in {plan.quantization}, and none can be used: "
            f"{why.rstrip('.')}. Load the model with --quantization none."
        )
    logger.info("The native decoder is not used: %s", why)
    return _build_from_transformers(plan, device, dtype, group)


def _build_natively(
    plan: LoadPlan, device: torch.device, dtype: torch.dtype, native: NativeRoute | None, group: RankGroup | None
) -> CausalModel:
    """Raises UnsupportedModelError where the native decoder of the device does not know the model."""
    if device.type == "cuda" or group is not None:
        return GpuDecoder(
            plan.config,
            dtype=dtype,
            device=device,
            quantization=plan.quantization,
            max_model_len=plan.max_model_len,
            group=group,
        )
    if native is None:
        raise UnsupportedModelError(
            "there are no kernels for this machine: a C++ compiler is needed once, to build them"
        )
    if plan.quantization == "fp8":
        raise UnsupportedModelError("fp8 is for GPUs; on CPUs weights can be int8 or int4")
    return NativeDecoder(
        plan.config,
        dtype=dtype,
        quantization=plan.quantization,
        max_model_len=plan.max_model_len,
        max_rows=native.max_rows,
        team=native.team,
    )


def _build_from_transformers(
    plan: LoadPlan, device: torch.device, dtype: torch.dtype, group: RankGroup | None
) -> CausalModel:
    # Imported here because transformers' modeling code takes 3 s, which the native decoder need not spend.
    from model_worker.engine.models.transformers_model import TransformersModel

    if group is not None and group.size == 1:
        group = None
    return TransformersModel(plan.config, dtype=dtype, device=device, max_model_len=plan.max_model_len, group=group)


class _Filler:
    """Puts tensors into a model and keeps account of them."""

    def __init__(self, model: CausalModel, report: LoadReport) -> None:
        self._model = model
        self._report = report
        self._weights = dict(model.weights())  # on meta
        self._begun: set[str] = set()  # weights of which something has come
        self._filled: dict[_Place, str] = {}  # to the name in the checkpoint

    def select(self, name: str, shape: tuple[int, ...]) -> Stretches | None:
        """What `put` takes of a tensor, which has this shape in the checkpoint; None: all of it.

        Raises:
            CheckpointError: the model needs another shape.
        """
        place = self._find(name)
        if place is None:
            return None
        needed = self._shape(place)
        is_transposed = len(shape) == 2 and self._model.is_stored_transposed(place.weight)
        if (shape[::-1] if is_transposed else shape) != needed:
            raise CheckpointError(
                f"{name!r} has shape {list(shape)}, the model needs {list(needed)}; config.json and the weights are of "
                "different models."
            )
        if not isinstance(self._model, DividedModel):
            return None
        share = self._model.share_of(place.weight, len(needed), half=place.half)
        return replace(share, axis=1 - share.axis) if share is not None and is_transposed else share

    def put(self, name: str, tensor: Tensor | GroupedWeight) -> None:
        place = self._find(name)
        if place is None:
            if _IGNORED.search(name) is None:
                raise CheckpointError(
                    f"The checkpoint holds {name!r}, for which this model has no place; config.json and the weights "
                    "are of different models."
                )
            self._report.add(name, Outcome.IGNORED, None, tensor.nbytes)
        elif place in self._filled:
            self._check_tied(name, place, tensor)
            self._report.add(name, Outcome.TIED, place.weight, tensor.nbytes)
        else:
            self._filled[place] = name
            self._fill(name, place, tensor)
            fused = self._model.fused.get(place.weight)
            outcome = Outcome.FILLED if place.index is None and fused is None else Outcome.FUSED
            self._report.add(name, outcome, fused or place.weight, tensor.nbytes)

    def check_complete(self) -> None:
        wanted = {name: self._parts(name) for name in self._weights}
        missing = [
            place
            for name, parts in wanted.items()
            if _Place(name) not in self._filled
            for place in (parts if any(part in self._filled for part in parts) else [_Place(name)])
            if place not in self._filled
        ]
        if missing:
            names = ", ".join(
                place.weight if place.index is None else f"{place.weight}[{place.index}]" for place in missing[:8]
            )
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise CheckpointError(f"The checkpoint lacks {names}{more}; it is incomplete or of another model.")

    def _find(self, name: str) -> _Place | None:
        name = current_name(name)
        if (expert := expert_matrix(name)) is not None:
            weight = self._known(expert.parameter)
            return None if weight is None else _Place(weight, expert.index, expert.half)
        weight = self._known(name)
        return None if weight is None else _Place(weight)

    def _known(self, name: str) -> str | None:
        """The model's own name: checkpoints of a bare decoder lack the prefix, tied weights have two names."""
        for candidate in (name, f"{self._model.decoder_prefix}.{name}"):
            candidate = self._model.ties.get(candidate, candidate)
            if candidate in self._weights:
                return candidate
        return None

    def _parts(self, weight: str) -> list[_Place]:
        """The places of single experts in a weight, if it is one that holds experts."""
        experts, _, matrix = weight.rpartition(".")
        if not experts.endswith(".experts"):
            return []
        halves: tuple[int | None, ...] = (0, 1) if matrix == "gate_up_proj" else (None,)
        return [_Place(weight, index, half) for index in range(len(self._weights[weight])) for half in halves]

    def _shape(self, place: _Place) -> tuple[int, ...]:
        """Of the whole tensor that belongs there."""
        shape = tuple(self._weights[place.weight].shape)
        if place.index is None:
            return shape
        return shape[1:] if place.half is None else (shape[1] // 2, *shape[2:])

    def _fill(self, name: str, place: _Place, tensor: Tensor | GroupedWeight) -> None:
        if place.index is None:
            if place.weight in self._begun:
                raise CheckpointError(f"The checkpoint holds {name!r} and also parts of it under other names.")
        else:
            num_experts = len(self._weights[place.weight])
            if place.index >= num_experts or _Place(place.weight) in self._filled:
                raise CheckpointError(f"The checkpoint holds {name!r}, but the model has {num_experts} experts.")
        if isinstance(tensor, Tensor) and tensor.ndim == 2 and self._model.is_stored_transposed(place.weight):
            tensor = tensor.t()
        self._begun.add(place.weight)
        self._model.fill(place.weight, tensor, index=place.index, half=place.half)

    def _check_tied(self, name: str, place: _Place, tensor: Tensor | GroupedWeight) -> None:
        """Some checkpoints hold a tied weight under both of its names."""
        is_tied = name in self._model.ties or self._filled[place] in self._model.ties
        if not is_tied:
            raise CheckpointError(
                f"The checkpoint holds {name!r} and {self._filled[place]!r}, which are the same weight."
            )
        if not self._model.holds(place.weight, tensor):
            raise CheckpointError(
                f"{name!r} and {self._filled[place]!r} are tied by config.json but differ; set tie_word_embeddings to "
                "false if the model was trained so."
            )
