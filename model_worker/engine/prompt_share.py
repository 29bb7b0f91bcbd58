"""How the tokens for prompts in one step are divided among them. Pure Python; no torch."""

from __future__ import annotations

from model_worker.engine.sequence import Sequence


class PromptShare:
    """What is left of one step for prompts; the scheduler gives it out (see there).

    Attributes:
        budget: tokens that nobody has yet.
        chunks: the prompts that got some, in the order in which they did, and how many.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[Sequence, int] = {}

    def num_left(self, prompt: Sequence) -> int:
        """Tokens of it that this step does not compute yet."""
        return prompt.num_tokens - prompt.num_computed_tokens - self.chunks.get(prompt, 0)

    def urgency(self, prompt: Sequence) -> tuple[int, int]:
        return prompt.priority, self.num_left(prompt)

    def give(self, prompt: Sequence, most: int) -> None:
        num_tokens = min(self.num_left(prompt), most)
        self.chunks[prompt] = self.chunks.get(prompt, 0) + num_tokens
        self.budget -= num_tokens
