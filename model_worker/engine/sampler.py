"""From the logits of a step to one token for each sequence: one vectorised pass over rows that differ in everything.

raw logits ──► logprobs (where asked for)
    │
    └─► min_tokens mask, logit_bias, penalties ──► greedy rows        largest logit
              (logits_processing)                  no top_k, top_p    draw from all        (token_draw)
                                                   the others         draw from the top    (token_draw)

On a GPU the last step is one operation for all rows (device_sampler, ops/sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as SequenceOf

import torch
from torch import Tensor

from model_worker.engine.device_sampler import launch_on_device
from model_worker.engine.logits_processing import needs_processing, process_logits
from model_worker.engine.outputs import SampledToken, TokenLogprobs
from model_worker.engine.pending_samples import FinishedSamples, PendingSamples, everything_forbidden, model_failed
from model_worker.engine.random_stream import uniform
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.token_draw import MIN_TEMPERATURE, DrawInputs, draw_from_all, draw_from_top
from model_worker.engine.token_logprobs import LogprobTensors
from registry.errors import RootgraftError

_NUM_CANDIDATES = 128  # enough for most rows of a language model at usual settings; the others are tried again

_LOGPROB_ROWS = 64  # prompt rows whose float32 log-softmax is held at once


class Sampler:
    """Draws tokens. Holds no state of any sequence: the same logits and sequences give the same tokens.

    Args:
        vocab_size: of the model. Rows of a variant that has more tokens are sampled apart from others.
        eos_token_ids: the model's own end-of-sequence ids, which min_tokens masks beside a request's stop ids. Those
            outside the vocabulary cannot be sampled and need no mask.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)

    def sample(self, logits: Tensor, sequences: SequenceOf[SampledRow]) -> list[SampledToken | RootgraftError]:
        """The next token of each sequence: `launch` and `finish`.

        Returns:
            [R] A sampled token, or an InternalError where the model gave NaN or +inf or nothing finite, or an
            InvalidRequestError where the sampling parameters forbid every token.
        """
        return self.launch(logits, sequences).finish()

    def launch(self, logits: Tensor, sequences: SequenceOf[SampledRow]) -> PendingSamples:
        """Begin to draw the next token of each sequence. On a CPU they are drawn at once.

        On a GPU nothing waits for the device: what comes out is on its way to the host when this returns.

        Args:
            logits: [R, V] of any floating dtype, one row for each sequence; V is at least the model's vocabulary.
                Consumed: a float32 tensor may be changed.
            sequences: [R]; all ids named by their sampling parameters are below V. Not looked at after the return.
        """
        assert len(logits) == len(sequences)
        assert logits.shape[1] >= self.vocab_size
        if not sequences:
            return FinishedSamples(torch.empty(0, dtype=torch.int64, device=logits.device), [])
        if logits.device.type != "cpu":
            return launch_on_device(logits, sequences, self.eos_token_ids)
        return self._sample_on_host(logits, sequences)

    def _sample_on_host(self, logits: Tensor, sequences: SequenceOf[SampledRow]) -> FinishedSamples:
        logits = logits.float().contiguous()
        errors: dict[int, RootgraftError] = {}
        processed = any(map(needs_processing, sequences))
        logprobs = _SampledLogprobs(logits, [sequence.sampling.logprobs for sequence in sequences], copy=processed)
        if processed:
            errors |= {row: model_failed() for row in _not_finite(logits.amax(dim=1))}
            process_logits(logits, sequences, self.eos_token_ids)
            no_finite_logit: Callable[[], RootgraftError] = everything_forbidden
        else:
            no_finite_logit = model_failed
        if all(sequence.sampling.greedy for sequence in sequences):
            peak, tokens = logits.max(dim=1)
        else:
            peak, tokens = logits.amax(dim=1), torch.zeros(len(sequences), dtype=torch.int64, device=logits.device)
        errors = {row: no_finite_logit() for row in _not_finite(peak)} | errors
        self._draw(logits, peak, sequences, skip=errors.keys(), tokens=tokens)
        token_ids = tokens.tolist()
        token_logprobs = logprobs.of(tokens, skip=errors.keys())
        samples: list[SampledToken | RootgraftError] = [
            errors[row] if row in errors else SampledToken(token_id, token_logprobs.get(row))
            for row, token_id in enumerate(token_ids)
        ]
        return FinishedSamples(tokens, samples)

    def prompt_logprobs(self, logits: Tensor, token_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Logprobs of given tokens, and of the `num_top` most probable ones beside each.

        Args:
            logits: [R, V] of any floating dtype; row r predicts `token_ids[r]`. Not changed.
            token_ids: [R]
        """
        result: list[TokenLogprobs] = []
        for start in range(0, len(token_ids), _LOGPROB_ROWS):
            wanted = token_ids[start : start + _LOGPROB_ROWS]
            rows = logits[start : start + _LOGPROB_ROWS].float()
            tokens = torch.tensor(wanted, device=logits.device)
            result += LogprobTensors.of(rows, tokens, num_top).on_host([num_top] * len(wanted))
        return result

    def _draw(
        self, logits: Tensor, peak: Tensor, sequences: SequenceOf[SampledRow], *, skip: Iterable[int], tokens: Tensor
    ) -> None:
        """Fill `tokens` [R] for the rows not in `skip`; those of an all-greedy batch are there already."""
        if all(sequence.sampling.greedy for sequence in sequences):
            return
        skipped, vocab_size = frozenset(skip), logits.shape[1]
        greedy: list[int] = []
        from_all: list[int] = []
        from_top: dict[int, list[int]] = {}  # by the number of candidates to begin with
        for row, sequence in enumerate(sequences):
            sampling = sequence.sampling
            if row in skipped:
                continue
            if sampling.greedy:
                greedy.append(row)
            elif sampling.top_p < 1.0 or 0 < sampling.top_k < vocab_size:
                from_top.setdefault(_first_num_candidates(sampling, vocab_size), []).append(row)
            else:
                from_all.append(row)
        if greedy:
            index = torch.tensor(greedy, device=logits.device)
            tokens[index] = logits[index].max(dim=1).indices
        if from_all:
            index, inputs = self._inputs(from_all, logits, peak, sequences)
            tokens[index] = draw_from_all(inputs)
        for num_candidates, rows in from_top.items():
            index, inputs = self._inputs(rows, logits, peak, sequences)
            tokens[index] = draw_from_top(inputs, num_candidates)

    def _inputs(
        self, rows: list[int], logits: Tensor, peak: Tensor, sequences: SequenceOf[SampledRow]
    ) -> tuple[Tensor, DrawInputs]:
        """The rows as an index [N] int64, and what is drawn from."""
        index, vocab_size = torch.tensor(rows, device=logits.device), logits.shape[1]
        chosen = [sequences[row] for row in rows]
        sampling = [sequence.sampling for sequence in chosen]
        numbers = torch.tensor(
            [(1.0 / max(params.temperature, MIN_TEMPERATURE), params.min_p, params.top_p) for params in sampling],
            dtype=torch.float64,
            device=logits.device,
        )  # [N, 3]
        random = uniform([sequence.seed for sequence in chosen], [sequence.num_tokens for sequence in chosen])
        whole_batch = len(rows) == len(sequences)
        return index, DrawInputs(
            logits=logits if whole_batch else logits[index],
            peak=(peak if whole_batch else peak[index]).unsqueeze(1),
            inverse_temperature=numbers[:, 0:1].float(),
            min_p=numbers[:, 1:2].float(),
            top_k=torch.tensor(
                [min(params.top_k or vocab_size, vocab_size) for params in sampling], device=logits.device
            ),
            top_p=numbers[:, 2:3].contiguous(),
            uniform=torch.from_numpy(random).to(logits.device).unsqueeze(1),
        )


class _SampledLogprobs:
    """Keeps the raw logits of the rows that ask for logprobs until their tokens are drawn."""

    def __init__(self, logits: Tensor, num_top: list[int | None], *, copy: bool) -> None:
        self._num_top = {row: num for row, num in enumerate(num_top) if num is not None}
        share = len(self._num_top) == len(num_top) and not copy
        self._logits = logits if share else logits[list(self._num_top)]

    def of(self, tokens: Tensor, *, skip: Iterable[int]) -> dict[int, TokenLogprobs]:
        """Row to logprobs, for the rows that asked for them and are not in `skip`."""
        skipped = frozenset(skip)
        places = [place for place, row in enumerate(self._num_top) if row not in skipped]
        rows = [row for row in self._num_top if row not in skipped]
        if not rows:
            return {}
        logits = self._logits if len(rows) == len(self._num_top) else self._logits[places]
        num_top = [self._num_top[row] for row in rows]
        found = LogprobTensors.of(logits, tokens[rows], max(num_top)).on_host(num_top)
        return dict(zip(rows, found, strict=True))


def _first_num_candidates(sampling: SamplingParams, vocab_size: int) -> int:
    """A power of two, so that rows share a pass, above top_k, so that ties at its end can be seen."""
    if 0 < sampling.top_k < vocab_size:
        return max(64, 1 << sampling.top_k.bit_length())
    return _NUM_CANDIDATES


def _not_finite(peak: Tensor) -> list[int]:
    """Rows whose largest logit [R] is NaN, +inf or -inf. A NaN anywhere in a row makes its maximum NaN."""
    rows: list[int] = (~peak.isfinite()).nonzero().squeeze(1).tolist()
    return rows
