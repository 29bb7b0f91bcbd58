"""The requests that have not ended, and what each of them gains from the result of a step: tokens, text, or its end."""

from __future__ import annotations

from collections.abc import KeysView, Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import islice, zip_longest

from adapters.tokenizer import Tokenizer
from model_worker.engine.detokenizer import IncrementalDetokenizer
from model_worker.engine.outputs import FinishReason, RequestOutput, SampledToken, SequenceDelta, TokenLogprobs
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.sequence import Sequence, SequenceGroup
from model_worker.engine.step import SchedulerOutput, StepResult
from registry.errors import InternalError, RootgraftError


@dataclass(slots=True, eq=False)
class _OpenRequest:
    """What is kept of a request beside its sequences."""

    group: SequenceGroup
    detokenizers: list[IncrementalDetokenizer]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs_due: bool = False


class OpenRequests:
    """Requests from their acceptance to their end, of which there is exactly one for each.

    Args:
        scheduler: has the same requests; is told here which of their sequences end.
        stop_token_ids: the model's end-of-sequence ids.
        max_model_len: most tokens of prompt and output.

    Attributes:
        num_generation_tokens: sampled so far.
        num_finished, num_cancelled, num_failed: requests that have ended so.
    """

    def __init__(self, scheduler: Scheduler, *, stop_token_ids: SequenceOf[int], max_model_len: int) -> None:
        self._scheduler = scheduler
        self._stop_token_ids = frozenset(stop_token_ids)
        self._max_model_len = max_model_len
        self._requests: dict[str, _OpenRequest] = {}
        self.num_generation_tokens = 0
        self.num_finished = 0
        self.num_cancelled = 0
        self.num_failed = 0

    @property
    def ids(self) -> KeysView[str]:
        return self._requests.keys()

    def add(self, group: SequenceGroup, tokenizer: Tokenizer) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it could never run.
            RateLimitError: too many requests are waiting.
        """
        self._scheduler.add(group)
        self._requests[group.request_id] = _OpenRequest(
            group,
            [_detokenizer(sequence, tokenizer) for sequence in group.sequences],
            prompt_logprobs_due=group.sampling.prompt_logprobs is not None,
        )

    def cancel(self, request_id: str) -> bool:
        """Release what a request holds; False when it has ended already."""
        if self._requests.pop(request_id, None) is None:
            return False
        self._scheduler.abort(request_id)
        self.num_cancelled += 1
        return True

    def take(self, output: SchedulerOutput, result: StepResult) -> list[RequestOutput]:
        """Add what a step has sampled. Whose request has ended since it was scheduled is passed over."""
        samples = iter(result.samples)
        errors: dict[str, RootgraftError] = {}
        deltas: dict[str, list[SequenceDelta]] = {}
        for item in output.scheduled:
            group = item.sequence.group
            assert group is not None
            request_id = group.request_id
            request = None if item.sequence.finished else self._requests[request_id]
            if request is not None and request.prompt_logprobs_due:
                # After a preemption the first chunks come again: positions known already are passed over.
                known = len(request.prompt_logprobs)
                request.prompt_logprobs += result.prompt_logprobs.get(item.sequence.seq_id, [])[known - item.start :]
            for sequence in item.sampled:
                drawn = list(islice(samples, 1 + len(item.drafts)))
                if request is None or sequence.finished:
                    continue
                if not item.drafts and isinstance(drawn[0], SampledToken) and request_id not in errors:  # mostly
                    deltas.setdefault(request_id, []).append(self._append(request, sequence, (drawn[0],)))
                    continue
                failures = [sample for sample in drawn if isinstance(sample, RootgraftError)]
                if failures and not item.drafts:
                    errors[request_id] = failures[0]
                if request_id in errors:
                    continue
                standing = _standing(drawn, item.drafts)
                if standing:
                    deltas.setdefault(request_id, []).append(self._append(request, sequence, standing))
                if failures and not sequence.finished:
                    self._scheduler.redo_without_drafts(sequence)
        outputs = [
            self._output(request_id, tuple(news)) for request_id, news in deltas.items() if request_id not in errors
        ]
        return outputs + [self.fail(request_id, error) for request_id, error in errors.items()]

    def fail(self, request_id: str, error: RootgraftError) -> RequestOutput:
        """End an open request, whose keys and values cannot be trusted."""
        group = self._requests.pop(request_id).group
        self._scheduler.abort_broken(request_id)
        self.num_failed += 1
        return RequestOutput(
            request_id=request_id,
            num_prompt_tokens=group.num_prompt_tokens,
            num_cached_tokens=group.sequences[0].num_cached_tokens,
            finished=True,
            error=error,
        )

    def fail_step(self, output: SchedulerOutput, cause: Exception) -> list[RequestOutput]:
        """A step was not computed: end the open requests of it."""
        error = cause if isinstance(cause, RootgraftError) else _step_failed(cause)
        groups = dict.fromkeys(item.sequence.group for item in output.scheduled)
        outputs = [self.fail(group.request_id, error) for group in groups if group is not None and not group.finished]
        self._scheduler.redo_swapped(output)
        return outputs

    # ------------------------------------------------------------------------------------------ internal

    def _append(self, request: _OpenRequest, sequence: Sequence, samples: SequenceOf[SampledToken]) -> SequenceDelta:
        """Add sampled tokens to a sequence up to one that ends it, and say what text that yields."""
        detokenizer = request.detokenizers[sequence.index]
        text = ""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        num_appended = 0
        for sample in samples:
            new_text, reason, stop_reason = self._append_token(detokenizer, sequence, sample.token_id)
            text += new_text
            num_appended += 1
            if reason is not None:
                break
        if num_appended > 1:
            self._scheduler.accept(sequence, num_appended - 1)
        if reason is not None:
            if not isinstance(stop_reason, str):
                text += detokenizer.flush()
            self._scheduler.finish(sequence, reason, stop_reason)
        appended = samples[:num_appended]
        logprobs = tuple([sample.logprobs for sample in appended if sample.logprobs is not None])
        return SequenceDelta(
            index=sequence.index,
            text=text,
            token_ids=tuple([sample.token_id for sample in appended]),
            logprobs=logprobs or None,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _append_token(
        self, detokenizer: IncrementalDetokenizer, sequence: Sequence, token_id: int
    ) -> tuple[str, FinishReason | None, str | int | None]:
        """Add one token. Returns its text, and why and at what it ends the sequence, if it does."""
        sampling = sequence.sampling
        sequence.append(token_id)
        self.num_generation_tokens += 1
        if sequence.variant is not None:
            sequence.variant.num_generation_tokens += 1
        if token_id in self._stop_token_ids and not sampling.ignore_eos:
            return "", FinishReason.STOP, None
        if token_id in sampling.stop_token_ids:
            return "", FinishReason.STOP, token_id
        new = detokenizer.append((token_id,))
        if new.stop_string is not None:
            return new.text, FinishReason.STOP, new.stop_string
        if sequence.num_output_tokens == sampling.max_tokens or sequence.num_tokens == self._max_model_len:
            return new.text, FinishReason.LENGTH, None
        return new.text, None, None

    def _output(self, request_id: str, deltas: tuple[SequenceDelta, ...]) -> RequestOutput:
        request = self._requests[request_id]
        prompt_logprobs = (None, *request.prompt_logprobs) if request.prompt_logprobs_due else None
        request.prompt_logprobs_due = False
        finished = request.group.finished
        if finished:
            del self._requests[request_id]
            self.num_finished += 1
        return RequestOutput(
            request_id=request_id,
            num_prompt_tokens=request.group.num_prompt_tokens,
            num_cached_tokens=request.group.sequences[0].num_cached_tokens,
            deltas=deltas,
            prompt_logprobs=prompt_logprobs,
            finished=finished,
        )


def _standing(samples: list[SampledToken | RootgraftError], drafts: SequenceOf[int]) -> list[SampledToken]:
    """The samples that were drawn after right tokens, up to an error.

    tokens      last known   draft 0   draft 1   draft 2       a row each
    samples     s0           s1        s2        s3            s0 = draft 0, s1 = draft 1, s2 differs from draft 2:
    standing    s0           s1        s2                      s2 is right all the same, s3 was drawn in vain
    """
    standing: list[SampledToken] = []
    for sample, draft in zip_longest(samples, drafts):
        if isinstance(sample, RootgraftError):
            break
        standing.append(sample)
        if sample.token_id != draft:
            break
    return standing


def _detokenizer(sequence: Sequence, tokenizer: Tokenizer) -> IncrementalDetokenizer:
    sampling = sequence.sampling
    return IncrementalDetokenizer(
        tokenizer,
        sequence.token_ids,
        skip_special_tokens=sampling.skip_special_tokens,
        stop=sampling.stop,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        min_tokens=sampling.min_tokens,
    )


def _step_failed(cause: Exception) -> InternalError:
    return InternalError(f"The model failed while computing this request ({type(cause).__name__}); see the log.")
