"""What changes the logits before a token is drawn: the min_tokens mask, logit_bias and the penalties.

All of them touch few ids of few rows, so each is one gather and one scatter over the ids concerned in the whole batch;
rows and ids that are not concerned cost nothing. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.ops.low_rank import to_device
from model_worker.engine.sampled_row import SampledRow

_Ids = npt.NDArray[np.int64]
_Values = npt.NDArray[np.float32]
_FLOAT32 = torch.finfo(torch.float32)


def needs_processing(sequence: SampledRow) -> bool:
    """Whether `process_logits` changes the row of this sequence."""
    sampling = sequence.sampling
    return bool(
        sequence.num_output_tokens < sampling.min_tokens
        or sampling.logit_bias
        or sampling.repetition_penalty != 1.0
        or ((sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0) and sequence.output_counts)
    )


def process_logits(logits: Tensor, sequences: SequenceOf[SampledRow], eos_token_ids: SequenceOf[int]) -> None:
    """Apply, in this order, to row r of `sequences[r]`:

        min_tokens    l[i] = -inf                               stop ids, while num_output_tokens < min_tokens
        logit_bias    l[i] += bias[i]
        repetition    l[i] = l[i] / p if l[i] > 0 else l[i] * p ids of prompt and output
        presence      l[i] -= p                                 ids of the output
        frequency     l[i] -= p * count[i]                      ids of the output

    Args:
        logits: [R, V] float32, contiguous; changed in place.
        sequences: [R]; every id that they name is below V (LLMEngine refuses others when a request is added).
        eos_token_ids: the model's own end-of-sequence ids, masked by min_tokens beside the request's stop ids.
    """
    _mask_stop_ids(logits, sequences, eos_token_ids)
    _add_bias(logits, sequences)
    _penalize_repetition(logits, sequences)
    _penalize_output(logits, sequences)


def _mask_stop_ids(logits: Tensor, sequences: SequenceOf[SampledRow], eos_token_ids: SequenceOf[int]) -> None:
    rows: list[tuple[int, _Ids]] = []
    for row, sequence in enumerate(sequences):
        if sequence.num_output_tokens < sequence.sampling.min_tokens:
            rows.append((row, np.array((*eos_token_ids, *sequence.sampling.stop_token_ids), dtype=np.int64)))
    if rows:
        logits.view(-1).index_fill_(0, _flat_index(rows, logits), -torch.inf)


def _add_bias(logits: Tensor, sequences: SequenceOf[SampledRow]) -> None:
    rows: list[tuple[int, _Ids]] = []
    values: list[_Values] = []
    for row, sequence in enumerate(sequences):
        bias = sequence.sampling.logit_bias
        if bias:
            rows.append((row, _ids(bias.keys(), len(bias))))
            values.append(np.fromiter(bias.values(), np.float32, len(bias)))
    if rows:
        logits.view(-1)[_flat_index(rows, logits)] += _tensor(values, logits)


def _penalize_repetition(logits: Tensor, sequences: SequenceOf[SampledRow]) -> None:
    rows: list[tuple[int, _Ids]] = []
    values: list[_Values] = []
    for row, sequence in enumerate(sequences):
        penalty = sequence.sampling.repetition_penalty
        if penalty != 1.0:
            prompt = np.frombuffer(sequence.prompt_unique_ids, np.int64)
            output = _ids(sequence.output_counts.keys(), len(sequence.output_counts))
            rows += [(row, prompt), (row, output)]
            penalty = min(
                max(penalty, _FLOAT32.tiny), _FLOAT32.max
            )  # neither 0 nor inf as float32: both could make NaN
            values.append(np.full(len(prompt) + len(output), penalty, np.float32))
    if rows:
        # An id of both prompt and output is listed twice. Both entries are computed from the same gathered value and
        # store the same result, so it is penalized once.
        index = _flat_index(rows, logits)
        flat = logits.view(-1)
        old, penalties = flat[index], _tensor(values, logits)
        new = torch.where(old > 0, old / penalties, old * penalties)
        flat[index] = new.clamp_(max=_FLOAT32.max)  # an extreme penalty must not make +inf


def _penalize_output(logits: Tensor, sequences: SequenceOf[SampledRow]) -> None:
    rows: list[tuple[int, _Ids]] = []
    values: list[_Values] = []
    for row, sequence in enumerate(sequences):
        presence, frequency = sequence.sampling.presence_penalty, sequence.sampling.frequency_penalty
        counts = sequence.output_counts
        if counts and (presence != 0.0 or frequency != 0.0):
            rows.append((row, _ids(counts.keys(), len(counts))))
            values.append(presence + frequency * np.fromiter(counts.values(), np.float32, len(counts)))
    if rows:
        logits.view(-1)[_flat_index(rows, logits)] -= _tensor(values, logits)


def _ids(ids: Iterable[int], count: int) -> _Ids:
    return np.fromiter(ids, np.int64, count)


def _flat_index(rows: list[tuple[int, _Ids]], logits: Tensor) -> Tensor:
    """Where the ids of each row are in the flattened logits. -> [sum of len(ids)] int64"""
    vocab_size = logits.shape[1]
    places = np.concatenate([ids + row * vocab_size for row, ids in rows])
    return to_device(torch.from_numpy(places), logits.device)


def _tensor(values: list[_Values], logits: Tensor) -> Tensor:
    return to_device(torch.from_numpy(np.concatenate(values)), logits.device)
