"""The parameters of a Llama-shaped model: the names that checkpoints give them, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator

from model_worker.engine.models.decoder_spec import DecoderSpec, LayerSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape by name, of everything that a complete checkpoint holds; a tied head is left out."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for index, layer in enumerate(spec.layers):
        for name, shape in _layer_parameters(spec, layer):
            shapes[f"model.layers.{index}.{name}"] = shape
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tied_head:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _layer_parameters(spec: DecoderSpec, layer: LayerSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, query = spec.hidden_size, spec.num_heads * spec.head_dim
    kv = spec.num_kv_heads * spec.head_dim
    qkv = {"qkv_proj": query + 2 * kv} if spec.fused_names else {"q_proj": query, "k_proj": kv, "v_proj": kv}
    for name, size in qkv.items():
        yield from _linear(f"self_attn.{name}", size, hidden, bias=spec.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, query, bias=spec.output_bias)
    if spec.qk_norm is not None:
        per_head = spec.qk_norm == "head"
        yield "self_attn.q_norm.weight", (spec.head_dim if per_head else query,)
        yield "self_attn.k_norm.weight", (spec.head_dim if per_head else kv,)
    if layer.mixture is None:
        inner = spec.intermediate_size
        gate_up = {"gate_up_proj": 2 * inner} if spec.fused_names else {"gate_proj": inner, "up_proj": inner}
        for name, size in gate_up.items():
            yield from _linear(f"mlp.{name}", size, hidden, bias=spec.mlp_bias)
        yield from _linear("mlp.down_proj", hidden, inner, bias=spec.mlp_bias)
    else:
        experts, inner = layer.mixture.num_experts, layer.mixture.intermediate_size
        yield "mlp.gate.weight", (experts, hidden)
        yield "mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
        yield "mlp.experts.down_proj", (experts, hidden, inner)
    for name in sorted({*(spec.input_norms or ()), *(spec.output_norms or ())}):
        yield f"{name}.weight", (hidden,)


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)
