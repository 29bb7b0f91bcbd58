"""The semantics of the sampler for one row, as slow and readable as possible: sorts everything, loops over tokens."""

from __future__ import annotations

import torch

from model_worker.engine.sequence import Sequence


def reference_logits(raw: torch.Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> torch.Tensor:
    """Processed logits [V] float32 of raw logits [V]."""
    sampling = sequence.sampling
    logits = raw.float().clone()
    if sequence.num_output_tokens < sampling.min_tokens:
        for token_id in (*eos_token_ids, *sampling.stop_token_ids):
            logits[token_id] = -torch.inf
    for token_id, bias in sampling.logit_bias.items():
        logits[token_id] += bias
    for token_id in set(sequence.token_ids):
        value = logits[token_id]
        logits[token_id] = (
            value / sampling.repetition_penalty if value > 0 else value * torch.tensor(sampling.repetition_penalty)
        )
    for token_id in set(sequence.output_token_ids):
        count = sequence.output_token_ids.count(token_id)
        logits[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return logits


def reference_kept(logits: torch.Tensor, sequence: Sequence) -> tuple[list[int], list[float]]:
    """Ids that may be drawn, by descending logit then ascending id, and their weights; of processed logits [V]."""
    sampling = sequence.sampling
    inverse_temperature = torch.tensor(1.0 / max(sampling.temperature, 1e-5))
    weights = ((logits - logits.max()) * inverse_temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token_id: (-logits[token_id].item(), token_id))
    min_p = torch.tensor(sampling.min_p, dtype=torch.float32).item()
    kept = [token_id for token_id in order if weights[token_id] > 0 and weights[token_id] >= min_p]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1.0:
        mass = sum(weights[token_id] for token_id in kept)
        running = 0.0
        for count, token_id in enumerate(kept, start=1):
            running += weights[token_id]
            if running >= sampling.top_p * mass:
                kept = kept[:count]
                break
    return kept, [weights[token_id] for token_id in kept]


def reference_draw(kept: list[int], weights: list[float], uniform: float) -> int:
    """The first of `kept` at which the running weight exceeds uniform times all of it."""
    target = uniform * sum(weights)
    running = 0.0
    for token_id, weight in zip(kept, weights, strict=True):
        running += weight
        if running > target:
            return token_id
    return kept[-1]
