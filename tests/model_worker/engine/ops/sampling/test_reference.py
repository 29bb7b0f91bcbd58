"""The definition of drawing on GPUs, by sorting, draws the tokens of the sampler for CPUs."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine.ops.sampling.functional import NUM_ORDERED, draw_tokens
from model_worker.engine.ops.sampling.reference import draw_reference
from model_worker.engine.token_draw import DrawInputs, draw_from_all, draw_from_top

torch.set_num_threads(1)


def _on_cpu(logits: torch.Tensor, parameters: torch.Tensor) -> list[int]:
    inverse_temperature, min_p, top_k, top_p, uniform = parameters.split(1, dim=1)
    tokens = []
    for row in range(len(logits)):
        inputs = DrawInputs(
            logits=logits,
            peak=logits.amax(dim=1, keepdim=True),
            inverse_temperature=inverse_temperature.float(),
            min_p=min_p.float(),
            top_k=top_k.squeeze(1).long(),
            top_p=top_p,
            uniform=uniform,
        ).rows(torch.tensor([row]))
        from_all = top_k[row].item() >= logits.shape[1] and top_p[row].item() >= 1
        first = 128 if top_k[row].item() >= logits.shape[1] else 4096  # as the sampler has it: more than top_k
        tokens.append(int((draw_from_all(inputs) if from_all else draw_from_top(inputs, first)).item()))
    return tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([3, 300, 3000]),
    scale=st.sampled_from([0.0, 0.05, 1.0, 6.0]),
    coarse=st.booleans(),
)
def test_both_draw_the_same_tokens(seed: int, vocab_size: int, scale: float, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab_size, generator=generator) * scale
    logits = logits.bfloat16().float() if coarse else logits
    parameters = torch.tensor(
        [
            (1.0, 0.0, vocab_size, 1.0),
            (0.5, 0.0, vocab_size, 0.9),
            (2.0, 0.01, vocab_size, 0.5),
            (1.0, 0.3, min(5, vocab_size), 1.0),
            (3.0, 0.0, min(2000, vocab_size), 0.97),
            (1.0, 0.0, 1, 1.0),
        ],
        dtype=torch.float64,
    )
    parameters = torch.cat((parameters, torch.rand(6, 1, generator=generator, dtype=torch.float64)), dim=1)
    tokens, finite = draw_reference(logits, parameters, NUM_ORDERED)
    assert finite.all()
    assert tokens.tolist() == _on_cpu(logits, parameters)
    assert torch.equal(draw_tokens(logits, parameters).tokens, tokens)
