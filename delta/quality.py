"""How close what a delta gives back is to its fine-tune, as the models' predictions show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from delta.greedy_answers import greedy_answers
from delta.input_samples import InputSamples, sample_inputs
from delta.next_logprobs import next_logprobs
from delta.quality_prompts import QualityPrompts, TokenizedPrompt, tokenize_prompts
from delta.quality_record import Probe, ProbeCase, Quality
from registry.errors import CheckpointError, UnsupportedModelError

_MAX_PROBE_CASES = 8
_NUM_PROBED_TOKENS = 5
_MIN_TOLERANCE = 0.1
_ROUNDING_ALLOWANCE = 4
_DTYPE = torch.float32  # below it the rounding is of the size of what is to be measured


class QualityMeter:
    """Compares models with one fine-tune over the same prompts.

    The models are computed with transformers in float32, one after the other, and the fine-tune only once. Memory: one
    model in float32 and, while `measure` builds it, its weights as they were given; and 4 bytes for each prompted token
    and token of the vocabulary, 250 MB for the default prompts and a vocabulary of 49 thousand; and for `inputs`, at
    1,024 tokens at most, 2 bytes for each number that a layer is given.

    Attributes:
        inputs: what the fine-tune's linear layers get as inputs when it reads `calibration`.

    Args:
        base, target: directories of the base and the fine-tune.
        prompts: what models are compared over, with answers where there are some, and followed by the fine-tune's own.
        calibration: for `inputs`; apart from `prompts`, or those would say too much good about what is made with them.

    Raises:
        CheckpointError: a model or tokenizer that cannot be read, no prompts of at least two tokens, or a fine-tune
            that computes numbers that are not finite.
        UnsupportedModelError: a model that transformers does not know.
    """

    def __init__(
        self,
        base: Path,
        target: Path,
        prompts: QualityPrompts,
        *,
        calibration: Sequence[QualityPrompts] = (),
    ) -> None:
        self._target = target
        self._prompts_name = prompts.name
        with _model_errors(target):
            tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
        self._prompts = list(tokenize_prompts(prompts, tokenizer))
        if not self._prompts:
            raise CheckpointError("none of the prompts has two tokens or more; there is nothing to compare")
        model = _load_model(target)
        texts = [prompt.whole for each in calibration for prompt in tokenize_prompts(each, tokenizer)]
        self.inputs: InputSamples = sample_inputs(model, texts)
        self._expected = self._logprobs(model)  # of each prompt [num_tokens, vocabulary]
        pieces = (piece for given in self.inputs.values() for piece in given)
        if any(bool(found.isnan().any()) for found in (*self._expected, *pieces)):
            raise CheckpointError(
                f"{target} computes numbers that are not finite: train it again, or keep it as it "
                "is with --codec lossless"
            )
        self._answers = greedy_answers(model, [prompt.question for prompt in self._prompts])
        self._empty = model.to("meta")  # its class and configuration
        self._base_kl_mean = self._compare_with_base(base)

    def measure(
        self, weights: Mapping[str, Tensor], *, check: Callable[[Quality], None] = lambda quality: None
    ) -> tuple[Quality, Probe]:
        """The model of these weights, by the names of the fine-tune's checkpoint, compared with the fine-tune.

        Args:
            check: called before the probe is computed; what it raises passes through.
        """
        model = _with_weights(self._empty, weights, self._target)
        divergences, agreements = [], []
        for expected, logprobs in zip(self._expected, self._logprobs(model), strict=True):
            divergences.append(_divergences(expected, logprobs))
            agreements.append(expected.argmax(-1) == logprobs.argmax(-1))
        divergence = torch.cat(divergences)
        same = torch.cat([answer.agreement(model) for answer in self._answers])
        quality = Quality(
            prompts=self._prompts_name,
            num_prompts=len(self._prompts),
            num_tokens=len(divergence),
            kl_mean=float(divergence.mean()),
            kl_max=float(divergence.max()),
            base_kl_mean=self._base_kl_mean,
            top1=float(torch.cat(agreements).double().mean()),
            num_answer_tokens=len(same),
            answers=float(same.double().mean()) if len(same) else 1.0,
        )
        check(quality)
        return quality, _probe(model, self._prompts[:_MAX_PROBE_CASES])

    def _compare_with_base(self, base: Path) -> float | None:
        """Over the tokens that both have."""
        model = _load_model(base)
        num_known = _vocabulary_size(model)
        known = [index for index, prompt in enumerate(self._prompts) if max(prompt.whole) < num_known]
        divergences = []
        for index in known:
            logprobs = next_logprobs(model, self._prompts[index].whole[:-1])
            common = min(logprobs.shape[1], self._expected[index].shape[1])
            expected = self._expected[index][:, :common].log_softmax(-1)
            divergences.append(_divergences(expected, logprobs[:, :common].log_softmax(-1)))
        return float(torch.cat(divergences).mean()) if divergences else None

    def _logprobs(self, model: nn.Module) -> list[Tensor]:
        return [next_logprobs(model, prompt.whole[:-1]) for prompt in self._prompts]


def _divergences(expected: Tensor, logprobs: Tensor) -> Tensor:
    """KL(expected ‖ other) at each token; the sum in float64, since most terms cancel. -> [num_tokens] float64"""
    return (expected.exp() * (expected - logprobs)).sum(-1, dtype=torch.float64).clamp_min(0)


def _probe(model: nn.Module, prompts: Sequence[TokenizedPrompt]) -> Probe:
    """The likeliest tokens, and a tolerance for models served in bfloat16: several times what its rounding changes."""
    answers = [next_logprobs(model, prompt.question)[-1] for prompt in prompts]
    cases = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs, token_ids = answer.topk(min(_NUM_PROBED_TOKENS, len(answer)))
        cases.append(ProbeCase(prompt.text, prompt.question, tuple(token_ids.tolist()), tuple(logprobs.tolist())))
    rounded = model.to(torch.bfloat16)
    largest = 0.0
    for case in cases:
        answer = next_logprobs(rounded, case.token_ids)[-1][list(case.top_token_ids)]
        largest = max(largest, float((answer - torch.tensor(case.top_logprobs)).abs().max()))
    return Probe(tuple(cases), max(_MIN_TOLERANCE, _ROUNDING_ALLOWANCE * largest))


def _load_model(directory: Path) -> Any:
    with _model_errors(directory):
        auto_model: Any = AutoModelForCausalLM  # its types do not know output_loading_info
        model, report = auto_model.from_pretrained(
            directory, dtype=_DTYPE, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    _check_complete(directory, report)
    return model.eval()


def _with_weights(like: Any, weights: Mapping[str, Tensor], directory: Path) -> Any:
    """A model of the class and configuration of another one."""
    with _model_errors(directory):
        model, report = type(like).from_pretrained(
            None, config=like.config, state_dict=dict(weights), dtype=_DTYPE, output_loading_info=True
        )
    _check_complete(directory, report)
    return model.eval()


def _check_complete(directory: Path, report: Mapping[str, Any]) -> None:
    # Transformers would go on with random numbers.
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{directory} lacks weights that its configuration asks for: {', '.join(missing[:3])}")


def _vocabulary_size(model: Any) -> int:
    size: int = model.get_input_embeddings().num_embeddings
    return size


@contextmanager
def _model_errors(directory: Path) -> Iterator[None]:
    """transformers' errors as ours, without its progress bars."""
    bars: Any = logging  # untyped
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read by transformers ({error})") from error
    except Exception as error:  # of any kind, where a configuration is wrong
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(f"transformers cannot compute {directory} ({reason[:500]})") from error
    finally:
        if had_bars:
            bars.enable_progress_bar()
