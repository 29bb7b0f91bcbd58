"""Sampling on a GPU: everything is launched, in the order of `Sampler`, and what comes out is copied to the host.

    host      parameters ─►                                                              ─► event ... finish
    device    logits ──► raw logits kept, if asked for ──► processed ──► drawn ──► logprobs ──► copied

Nothing waits for the device before `finish`, and that waits for this alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_worker.engine.logits_processing import needs_processing, process_logits
from model_worker.engine.ops.low_rank import to_device
from model_worker.engine.ops.sampling.functional import NUM_ORDERED, Draws, draw_tokens
from model_worker.engine.outputs import SampledToken
from model_worker.engine.pending_samples import everything_forbidden, model_failed
from model_worker.engine.random_stream import uniform
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.token_draw import MIN_TEMPERATURE
from model_worker.engine.token_logprobs import LogprobTensors
from registry.errors import RootgraftError

_GREEDY = np.array([1.0, 0.0, 1.0, 1.0, 0.0])  # as parameters of ops/sampling


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSamples:
    """See `PendingSamples`.

    Attributes:
        tokens: on the device.
        copied: [2, R] int64 on the host, once `done` is: the tokens, and what is wrong with the logits: 0 nothing,
            1 nothing is left to draw after processing, 2 they were not finite before.
        num_top: of the rows that asked for logprobs.
        logprobs: of these rows, on the host, too.
        done: recorded after the copies; None: they are done.
    """

    tokens: Tensor
    copied: Tensor
    num_top: dict[int, int]
    logprobs: LogprobTensors | None
    done: torch.cuda.Event | None

    def finish(self) -> list[SampledToken | RootgraftError]:
        if self.done is not None:
            self.done.synchronize()
        token_ids, faults = self.copied.tolist()
        logprobs = {}
        if self.logprobs is not None:
            logprobs = dict(zip(self.num_top, self.logprobs.on_host(list(self.num_top.values())), strict=True))
        return [
            (everything_forbidden() if fault == 1 else model_failed())
            if fault
            else SampledToken(token_id, logprobs.get(row))
            for row, (token_id, fault) in enumerate(zip(token_ids, faults, strict=True))
        ]


def launch_on_device(
    logits: Tensor, sequences: SequenceOf[SampledRow], eos_token_ids: SequenceOf[int]
) -> DeviceSamples:
    """See `Sampler.launch`. logits [R, V], at least one row"""
    device = logits.device
    logits = logits.float().contiguous()
    asked = [sequence.sampling.logprobs for sequence in sequences]
    num_top = {row: num for row, num in enumerate(asked) if num is not None}
    processed = any(map(needs_processing, sequences))
    raw = None
    if num_top:
        share = len(num_top) == len(sequences) and not processed
        raw = logits if share else logits[_index(num_top, device)]
    given = logits.amax(dim=1).isfinite() if processed else None  # [R], before anything is forbidden
    if processed:
        process_logits(logits, sequences, eos_token_ids)
    draws = _draw(logits, sequences)
    faults = (~draws.finite).long()
    faults = faults * 2 if given is None else faults.where(given, 2)
    logprobs = None
    if raw is not None:
        own = draws.tokens[_index(num_top, device)]
        logprobs = LogprobTensors(*map(_to_host, LogprobTensors.of(raw, own, max(num_top.values()))))
    copied = _to_host(torch.stack((draws.tokens, faults)))
    done = None
    if device.type == "cuda":
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
    return DeviceSamples(draws.tokens, copied, num_top, logprobs, done)


def _draw(logits: Tensor, sequences: SequenceOf[SampledRow]) -> Draws:
    vocab_size = logits.shape[1]
    parameters = np.tile(_GREEDY, (len(sequences), 1))  # [R, 5]
    wide: list[int] = []
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.sampling.greedy]
    if drawn:
        chosen = [sequences[row] for row in drawn]
        random = uniform([sequence.seed for sequence in chosen], [sequence.num_tokens for sequence in chosen])
        for row, sequence, number in zip(drawn, chosen, random.tolist(), strict=True):
            sampling = sequence.sampling
            top_k = min(sampling.top_k or vocab_size, vocab_size)
            inverse = 1.0 / max(sampling.temperature, MIN_TEMPERATURE)
            parameters[row] = (inverse, sampling.min_p, top_k, sampling.top_p, number)
            if NUM_ORDERED < top_k < vocab_size:
                wide.append(row)
    on_device = to_device(torch.from_numpy(parameters), logits.device)
    return draw_tokens(logits, on_device, _index(wide, logits.device) if wide else None)


def _index(rows: Iterable[int], device: torch.device) -> Tensor:
    """-> [n] int64 on the device"""
    return to_device(torch.tensor(list(rows)), device)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that nothing waits for, and that is complete only when the stream has come to it."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
