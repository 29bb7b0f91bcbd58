"""What an artifact says about its own quality: measured once when it was made, checked again where it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """The fine-tune compared with what the delta gives back, over every predicted token of some prompts.

    Attributes:
        prompts: "default", or "sha256:…" of the file of prompts, of which every second one was measured.
        num_prompts, num_tokens: how much was compared.
        kl_mean: KL(fine-tune ‖ given back), the mean over the tokens, in nats.
        kl_max: the largest of one token.
        base_kl_mean: KL(fine-tune ‖ base), for comparison, over the tokens that both have; None: the base does not have
            those of any prompt.
        top1: share of the tokens whose most likely successor is the same, 0 to 1.
        num_answer_tokens: of the fine-tune's own answers to the same prompts, the most likely token each time.
        answers: share of those that are the most likely ones of what is given back, too, 0 to 1; tokens at which the
            fine-tune is undecided do not count.
    """

    prompts: str
    num_prompts: int
    num_tokens: int
    kl_mean: float
    kl_max: float
    base_kl_mean: float | None
    top1: float
    num_answer_tokens: int
    answers: float


@dataclass(frozen=True, slots=True)
class ProbeCase:
    """One question whose answer is known.

    Attributes:
        prompt: the text, for people.
        token_ids: the prompt as it is asked.
        top_token_ids: the most likely next tokens, the likeliest first.
        top_logprobs: their natural logarithms.
    """

    prompt: str
    token_ids: tuple[int, ...]
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.token_ids or not self.top_token_ids or len(self.top_token_ids) != len(self.top_logprobs):
            raise ValueError("a case of the probe has no tokens, or other numbers of tokens and of logprobs")


@dataclass(frozen=True, slots=True)
class Probe:
    """The functional probe: what the model that the delta gives back answers.

    Attributes:
        tolerance: the largest difference of a log probability from the expected one with which the probe is passed.
    """

    cases: tuple[ProbeCase, ...]
    tolerance: float
