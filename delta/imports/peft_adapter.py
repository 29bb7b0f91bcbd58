"""A LoRA adapter merged into its base: as a delta, or as a model of its own. Layout: docs/formats/peft.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compression.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.codecs.codec import Term
from delta.codecs.lowrank import low_rank_term
from delta.merge_terms import merge_embedding, merge_experts, merge_linear
from delta.output_path import check_apart
from delta.parameter_places import Place, find_place
from delta.peft.base_model import ModelShapes, model_shapes
from delta.peft.reader import read_peft_adapter
from delta.variant_terms import LinearTerms, VariantTerms
from registry.companion_files import companion_files
from registry.digest import Progress
from registry.errors import CheckpointError, UnsupportedModelError
from registry.staged_directory import staged_directory


class CheckpointBase:
    """A `delta.peft.base_model.BaseModel` whose weights are read from a checkpoint."""

    digest: str | None = None

    def __init__(self, tensors: CheckpointTensors) -> None:
        """Raises UnsupportedModelError: transformers does not know the model."""
        self._tensors = tensors
        self.shapes: ModelShapes = _shapes(tensors.checkpoint.path)
        self._names: dict[tuple[str, str], str] = {}
        for name in tensors.names():
            if (place := find_place(name, self.shapes)) is not None:
                self._names[place.kind, place.name] = name

    def weight(self, module: str) -> Tensor:
        parameter, _, index = module.rpartition(".")
        if (experts := self.shapes.experts.get(parameter)) is not None:
            weight = self._read("experts", parameter)[int(index)]
            return weight.T if experts.transposed else weight
        kind = "linear" if module in self.shapes.linears else "embedding"
        tied = self.shapes.tied.get(module)
        if (kind, module) not in self._names and tied is not None:
            return self.weight(tied)
        weight = self._read(kind, module)
        return weight.T if kind == "linear" and self.shapes.linears[module].transposed else weight

    def bias(self, module: str) -> Tensor:
        return self._read("bias", module)

    def _read(self, kind: str, name: str) -> Tensor:
        if (kind, name) not in self._names:
            raise CheckpointError(f"{self._tensors.checkpoint.path} has no {kind} of {name!r}")
        return self._tensors.read(self._names[kind, name]).float()


class AdapterChanges:
    """`Changes` of an adapter's terms."""

    source = "LoRA adapter"

    def __init__(self, terms: VariantTerms, shapes: ModelShapes) -> None:
        """Raises UnsupportedModelError: the adapter has tokens that the base has not, or the head and the embedding are
        one tensor of which it changes one."""
        if terms.num_extra_tokens:
            raise UnsupportedModelError(
                f"the adapter has {terms.num_extra_tokens} tokens that this base does not have, so that merged it is a "
                "model of another size. Serve it as an adapter, or merge it with PEFT"
            )
        self._terms = terms
        self._shapes = shapes
        self._used: set[tuple[str, str]] = set()
        for head, embedding in shapes.tied.items():
            if head in terms.linears or embedding in terms.embeddings:
                raise UnsupportedModelError(
                    f"the adapter changes {embedding} or {head}, which are one tensor in this base: merged, it would "
                    "change both. Serve it as an adapter"
                )

    def change(self, name: str, before: Tensor) -> tuple[Term, ...] | Tensor | None:
        """Products of low rank as they are, in bfloat16; of all other changes the merged tensor."""
        place = find_place(name, self._shapes)
        product = None if place is None else self._product(place)
        if place is None or product is None:
            merged = self.merged(name, before)
            return None if merged is None else merged.to(before.dtype)
        self._used.add(_changed_by(place))
        a, b = product
        return (low_rank_term(a.float(), b.float()),)

    def merged(self, name: str, before: Tensor) -> Tensor | None:
        """The tensor with the adapter in it, float32; None: the adapter does not change it."""
        place = find_place(name, self._shapes)
        if place is None or _changed_by(place) not in self._changed():
            return None
        self._used.add(_changed_by(place))
        weight = before.float()
        if place.kind == "expert":
            of_expert = self._of_expert(place)
            return None if of_expert is None else merge_linear(weight, None, of_expert)[0]
        if place.kind == "vector":
            return self._terms.vectors[place.name].float()
        if place.kind == "embedding":
            return merge_embedding(weight, self._terms.embeddings[place.name])
        if place.kind == "bias":
            _, bias = merge_linear(torch.zeros(len(weight), 1), weight, LinearTerms(bias=self._bias(place.name)))
            return bias
        straight = weight.mT if place.transposed else weight
        if place.kind == "experts":
            merged = merge_experts(straight, self._terms.experts[place.name])
        else:
            merged, _ = merge_linear(straight, None, self._terms.linears[place.name])
        return merged.mT.contiguous() if place.transposed else merged

    def check_all_used(self) -> None:
        if missing := sorted(self._changed() - self._used):
            shown = ", ".join(f"the {kind} {name}" for kind, name in missing[:3])
            raise UnsupportedModelError(
                f"the adapter changes what this checkpoint has no tensor for: {shown}. Serve it as an adapter"
            )

    def _changed(self) -> set[tuple[str, str]]:
        """Kind and name of the places that the adapter changes."""
        linears = self._terms.linears.items()
        return {
            *(("linear", name) for name, terms in linears if _changes_weight(terms)),
            *(("bias", name) for name, terms in linears if terms.bias is not None),
            *(("embedding", name) for name in self._terms.embeddings),
            *(("experts", name) for name in self._terms.experts),
            *(("vector", name) for name in self._terms.vectors),
        }

    def _of_expert(self, place: Place) -> LinearTerms | None:
        """The product for the rows of a tensor that is one expert's, or its gate or up projection; None: there is none.

        The other projection may have components of its own, which are 0 in these rows.
        """
        assert place.expert is not None
        terms = self._terms.experts.get(place.name, {}).get(place.expert)
        if terms is None or terms.a is None or terms.b is None:
            return None
        b = terms.b[place.first_row : place.first_row + place.shape[0]]
        used = b.any(0)
        return LinearTerms(a=terms.a[used], b=b[:, used]) if bool(used.any()) else None

    def _bias(self, module: str) -> Tensor | None:
        return self._terms.linears[module].bias

    def _product(self, place: Place) -> tuple[Tensor, Tensor] | None:
        """A [r, K] and B [N, r] of the tensor as it is stored, if they are all that changes."""
        if place.kind == "linear" and (linear := self._terms.linears.get(place.name)) is not None:
            others = (linear.output_scale, linear.input_scale, linear.dense, linear.sparse)
            if linear.a is None or linear.b is None or linear.signs or any(term is not None for term in others):
                return None
            return (linear.b.T, linear.a.T) if place.transposed else (linear.a, linear.b)
        if place.kind == "expert" and (of_expert := self._of_expert(place)) is not None:
            return None if of_expert.a is None or of_expert.b is None else (of_expert.a, of_expert.b)
        if place.kind == "embedding" and (table := self._terms.embeddings.get(place.name)) is not None:
            if table.a is None or table.b is None or table.rows is not None or table.signs:
                return None
            return table.b.T, table.a.T
        return None


def _changed_by(place: Place) -> tuple[str, str]:
    """As `_changed` has it: experts that are stored one by one are of one parameter."""
    return ("experts" if place.kind == "expert" else place.kind), place.name


def _changes_weight(terms: LinearTerms) -> bool:
    others = (terms.a, terms.output_scale, terms.input_scale, terms.dense, terms.sparse)
    return bool(terms.signs) or any(term is not None for term in others)


def read_adapter(adapter: Path, base: CheckpointTensors) -> AdapterChanges:
    """Raises what `read_peft_adapter` does, and UnsupportedModelError: it cannot be merged."""
    model = CheckpointBase(base)
    return AdapterChanges(read_peft_adapter(adapter, model), model.shapes)


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model that an adapter makes of its base to the directory `out`; holds one tensor, and the adapter.

    Args:
        dtype: of all floating-point weights that are written; None: the base's own.
        force: replace a model's directory that is there; it stays until the new one is complete.

    Raises:
        CheckpointError: an adapter of another base, a file that cannot be read, or `out` exists.
        UnsupportedModelError: an adapter or base that cannot be merged.
        InternalError: the disk is full.
    """
    check_apart(out, base, adapter)
    with (
        open_checkpoint(base) as tensors,
        staged_directory(out, replaces=("config.json",) if force else ()) as staging,
    ):
        changes = read_adapter(adapter, tensors)
        names, done = tensors.names(), 0
        with SafetensorsWriter(staging, names, max_shard_bytes=MAX_SHARD_BYTES) as writer:
            for name in names:
                before = tensors.read(name)
                merged = changes.merged(name, before)
                kept = dtype if dtype is not None and before.is_floating_point() else before.dtype
                writer.add(name, (before if merged is None else merged).to(kept))
                done += before.nbytes
                if progress is not None:
                    progress(done, tensors.num_bytes)
        changes.check_all_used()
        for name, file in (companion_files(base) | _tokenizer_files(adapter)).items():
            shutil.copyfile(file, staging / name)


def _tokenizer_files(adapter: Path) -> dict[str, Path]:
    """The adapter's own tokenizer and chat template; its configuration is none of a model."""
    found = companion_files(adapter)
    return {name: file for name, file in found.items() if name.startswith(("tokenizer", "special_", "chat_template"))}


def _shapes(directory: Path) -> ModelShapes:
    auto_model: Any = AutoModelForCausalLM  # untyped
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return model_shapes(auto_model.from_config(config, trust_remote_code=False))
    except (KeyError, ValueError, ImportError) as error:
        raise UnsupportedModelError(f"transformers does not know the model of {directory} ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{directory} has no configuration that can be read ({error})") from error
