"""transformers' own modeling code over our paged attention and our linear layers: the route for most families.

    build on meta ──► patch, replace linears ──► (loader fills the weights) ──► finish: buffers, dry run, methods

The dry run computes two tokens with a probe in place of the attention. It is what keeps a family that silently goes
its own way from being served: every layer must call our attention exactly once, must ask for nothing that we do not
do, and the logits must be what transformers' own head makes of the same hidden states. Three tokens more show which
modules compute each token by itself: those can have variants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.stretches import Stretches
from compression.grouped_weight import GroupedWeight
from delta.variant_terms import VariantTerms
from model_worker.engine.layers.attention import ForwardContext, PagedAttention
from model_worker.engine.layers.linear import Linear, choose_method
from model_worker.engine.layers.row_axes import RowAxisProbe
from model_worker.engine.lora.bound_variant import BoundVariant, VariantSegments
from model_worker.engine.models.attention_interface import ATTRIBUTE, PAGED_ATTENTION, AttentionProbe
from model_worker.engine.models.patches import PATCHES
from model_worker.engine.models.rope_limits import refuse_batch_dependent_rope
from model_worker.engine.models.transformers_trace import trace_modules
from model_worker.engine.models.transformers_variants import TransformersVariants
from model_worker.engine.parallel.divided_module import DividedModule
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.parallel.sharding import Division
from model_worker.engine.trace import TraceRow
from registry.errors import UnsupportedModelError

_LINEAR_CLASSES = frozenset({"Linear", "FalconLinear"})  # subclasses with a forward of their own stay as they are


class TransformersModel:
    """A causal language model of transformers that computes flat batches.

    Args:
        config: of the model, with `model_type`.
        dtype: of weights and activations.
        device: where it will run; until it is loaded the weights are on meta.
        max_model_len: most positions that will ever be used.
        group: the ranks that this model is divided among; this one keeps its share.

    Attributes:
        causal_lm: transformers' module.
        context: the step under way; set before each call.
        attentions: one for each layer, in order; known after `finish`.
        ties: parameter name to the name of the parameter that it is.

    Raises:
        UnsupportedModelError: the model cannot be computed exactly in a flat batch.
    """

    keeps_blocks = False
    fused: Mapping[str, str] = MappingProxyType({})  # transformers keeps weights as checkpoints do, but for experts

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        group: RankGroup | None = None,
    ) -> None:
        model_type = str(config["model_type"])
        hf_config = CONFIG_MAPPING[model_type].from_dict(dict(config))
        with torch.device("meta"):
            # "eager": some families choose classes by this name while they are built.
            build: Callable[..., Any] = AutoModelForCausalLM.from_config
            self.causal_lm = build(hf_config, dtype=dtype, attn_implementation="eager")
        self.causal_lm.requires_grad_(False).eval()
        self.config = hf_config
        self.dtype = dtype
        self.kv_dtypes: tuple[str, ...] = (str(dtype).removeprefix("torch."),)
        self.device = device
        self.context = ForwardContext()
        self.attentions: list[PagedAttention] = []
        self.ties: dict[str, str] = self.causal_lm.get_expanded_tied_weights_keys(all_submodels=True)
        for rope in self._ropes():
            refuse_batch_dependent_rope(rope, max_model_len)
        if model_type in PATCHES:
            PATCHES[model_type](self.causal_lm)
        self._divided: DividedModule | None = None
        self._replace_linears()
        self._keep_in_float32()
        self._vocab_size = self._head.out_features
        if group is not None and group.size > 1:
            self._divided = DividedModule(self.causal_lm, group)
        for module in self.causal_lm.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = PAGED_ATTENTION

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def decoder_prefix(self) -> str:
        """The first part of the names of the decoder's weights; checkpoints of a bare decoder leave it out."""
        ((name, _),) = self._decoders()
        return name

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden], after the final norm."""
        variants = self.context.variants
        with self._variants.in_decoder(variants, len(input_ids)) if variants else nullcontext():
            out = self._decoder(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, variants: VariantSegments = ()) -> Tensor:
        """hidden [R, hidden], whose rows use `variants` -> [R, vocab_size] in the model's dtype."""
        head = self._head
        with self._variants.in_head(head, variants, len(hidden)) if variants else nullcontext():
            logits: Tensor = head(hidden)
        return self._scaled(logits)

    def extra_logits(self, hidden: Tensor, variant: BoundVariant) -> Tensor:
        """See `VariantHost.extra_logits`."""
        return self._scaled(self._variants.extra_logits(hidden, variant))

    def _scaled(self, logits: Tensor) -> Tensor:
        """As the families do it."""
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # granite
            logits = logits / scaling
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # cohere
            logits = logits * scale
        if (softcap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # gemma
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    def trace(self) -> AbstractContextManager[list[TraceRow]]:
        """See `Traceable.trace`."""
        return trace_modules(self.causal_lm, self.context, self.device)

    # ------------------------------------------------------------------------------------------ variants

    def base_weight(self, module: str) -> Tensor:
        """See `VariantHost.base_weight`."""
        return self._variants.weight(module)

    def base_bias(self, module: str) -> Tensor:
        """The bias of a linear layer that has one. -> [N] float32

        Raises:
            KeyError: there is no such module, or it has no bias.
        """
        return self._variants.bias(module)

    @property
    def binds_in_host_memory(self) -> bool:
        """See `VariantHost.binds_in_host_memory`."""
        return self.device.type == "cpu"

    def bind(self, terms: VariantTerms) -> BoundVariant:
        """See `VariantHost.bind`."""
        return self._variants.bind(terms)

    # ------------------------------------------------------------------------------------------ weights

    @property
    def divisions(self) -> Mapping[str, Division]:
        """How weights are divided among ranks, by module, or by parameter where it is none of a linear layer."""
        return {} if self._divided is None else self._divided.divisions

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that a checkpoint holds; of tied parameters only the one that owns them.

        Where the model is divided they are on meta, and whole as in the checkpoint.
        """
        for name, tensor in self.causal_lm.state_dict(keep_vars=True).items():
            if name not in self.ties:
                yield name, tensor if self._divided is None else self._divided.whole(name, tensor)

    def linear_of(self, name: str) -> Linear | None:
        """The linear layer whose weight or bias has this name."""
        module = self.causal_lm.get_submodule(name.rpartition(".")[0])
        return module if isinstance(module, Linear) else None

    def is_stored_transposed(self, name: str) -> bool:
        linear = self.linear_of(name)
        return linear is not None and linear.stored_transposed

    def share_of(self, name: str, num_axes: int, *, half: int | None = None) -> Stretches | None:
        """See DividedModel."""
        return None if self._divided is None else self._divided.share_of(name, num_axes, half=half)

    def fill(
        self, name: str, tensor: Tensor | GroupedWeight, *, index: int | None = None, half: int | None = None
    ) -> None:
        """See CausalModel; the memory of a weight is taken when the first part of it comes."""
        assert isinstance(tensor, Tensor)
        tensor = tensor if self._divided is None else self._divided.own(name, tensor)
        weight = self._weight(name)
        if weight.device.type == "meta":
            weight = torch.empty_like(weight, device=self.device)
            self._set_weight(name, weight)
        if index is not None:
            weight = weight[index]
        if half is not None:
            weight = weight.chunk(2)[half]
        weight.copy_(tensor)

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        assert isinstance(tensor, Tensor)
        tensor = tensor if self._divided is None else self._divided.own(name, tensor)
        weight = self._weight(name)
        return torch.equal(tensor.to(weight.device, weight.dtype), weight)

    @torch.no_grad()
    def finish(self) -> None:
        """After all weights are set: compute buffers, find the attention layers, choose how linears are computed.

        Raises:
            UnsupportedModelError: the dry run found something that would give wrong tokens.
        """
        for target, source in self.ties.items():
            path, _, attribute = target.rpartition(".")
            self.causal_lm.get_submodule(path)._parameters[attribute] = self.causal_lm.get_parameter(source)
        self._compute_buffers()
        self._dry_run()
        shared = {id(self.causal_lm.get_parameter(source)) for source in self.ties.values()}
        for module in self.causal_lm.modules():
            if isinstance(module, Linear):
                module.method = choose_method(module, shared_weight=id(module.weight) in shared)
        if self.device.type == "cuda":
            self._variants.warm_up()

    # ------------------------------------------------------------------------------------------ internal

    def _decoders(self) -> list[tuple[str, nn.Module]]:
        return [(name, child) for name, child in self.causal_lm.named_children() if isinstance(child, PreTrainedModel)]

    @property
    def _decoder(self) -> nn.Module:
        ((_, decoder),) = self._decoders()
        return decoder

    @property
    def _head(self) -> Linear:
        head = self.causal_lm.get_output_embeddings()
        assert isinstance(head, Linear)
        return head

    def _ropes(self) -> Iterator[Mapping[str, Any]]:
        """The rotary settings of the model, or of each kind of layer."""
        for module in self.causal_lm.modules():
            if hasattr(module, "rope_type"):
                settings = module.config.rope_parameters
                yield from settings.values() if isinstance(module.rope_type, dict) else [settings]

    def _weight(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        weight = getattr(self.causal_lm.get_submodule(path), attribute)
        assert isinstance(weight, Tensor)
        return weight

    def _set_weight(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in the place of a parameter or persistent buffer."""
        path, _, attribute = name.rpartition(".")
        module = self.causal_lm.get_submodule(path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)

    def _replace_linears(self) -> None:
        for parent in list(self.causal_lm.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and type(child).__name__ in _LINEAR_CLASSES:
                    shape, transposed = child.weight.shape, False
                elif isinstance(child, Conv1D):
                    shape, transposed = child.weight.shape[::-1], True
                else:
                    continue
                replacement = Linear(
                    shape[1],
                    shape[0],
                    bias=child.bias is not None,
                    dtype=child.weight.dtype,
                    device=child.weight.device,
                    stored_transposed=transposed,
                )
                setattr(parent, name, replacement)

    def _keep_in_float32(self) -> None:
        """Some weights lose too much in half precision; the families name them."""
        names = set(self.causal_lm._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            names |= set(self.causal_lm._keep_in_fp32_modules or ())
        if self.dtype == torch.float32 or not names:
            return
        pattern = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in names))
        for name, tensor in list(self.weights()):
            if pattern.search(name):
                self._set_weight(name, torch.empty_like(tensor, dtype=torch.float32))

    def _compute_buffers(self) -> None:
        """Buffers that no checkpoint holds (rotary frequencies, embedding scales) are set by transformers' own code."""
        loaded = set()
        for name, tensor in self.causal_lm.state_dict(keep_vars=True).items():
            tensor._is_hf_initialized = True  # read by transformers
            loaded.add(name)
        for path, module in self.causal_lm.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if (f"{path}.{name}" if path else name) not in loaded:
                    setattr(module, name, torch.empty_like(buffer, device=self.device))
        self.causal_lm.initialize_weights()
        assert all(tensor.device.type != "meta" for tensor in self.causal_lm.state_dict().values())

    def _dry_run(self) -> None:
        probe = AttentionProbe(self.context)
        for module in self.causal_lm.modules():
            setattr(module, ATTRIBUTE, probe)
        tokens = torch.tensor([[0, 1]], device=self.device)
        expected = self.causal_lm(input_ids=tokens, position_ids=tokens, use_cache=False).logits[0]
        calls, probe.calls = probe.calls, []
        for module in self.causal_lm.modules():
            delattr(module, ATTRIBUTE)
        num_layers = self.config.num_hidden_layers
        if len(calls) != num_layers or len({id(module) for module, _ in calls}) != num_layers:
            raise UnsupportedModelError(
                f"Model type {self.config.model_type} has {num_layers} layers but called the attention interface "
                f"{len(calls)} times; its modeling code goes another way, and its tokens would be wrong."
            )
        for module, attention in calls:
            setattr(module, ATTRIBUTE, probe)
            self.attentions.append(attention)
        rows = RowAxisProbe()
        with rows.watching(self.causal_lm, 2):
            logits = self.logits(self(tokens[0], tokens[0]))
        if not torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-5):
            raise UnsupportedModelError(
                f"Model type {self.config.model_type} treats its logits in a way that the engine does not know."
            )
        longer = torch.arange(3, device=self.device)
        with rows.watching(self.causal_lm, 3):
            self.logits(self(longer, longer))
        self._variants = TransformersVariants(self.causal_lm, rows.axes(), self.device)
        for module, attention in calls:
            setattr(module, ATTRIBUTE, attention)
