"""A scheduler with a fake executor, and the part of the engine between them."""

from __future__ import annotations

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import FinishReason, SampledToken
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.sequence import Sequence, SequenceGroup
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.visibility import Visibility
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_executor import EVERYTHING, FakeExecutor, next_token

VOCAB = 256


class SchedulerHarness:
    """A scheduler and a fake executor, with the part of the engine between them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        caching: bool = True,
        num_host_blocks: int = 0,
        groups: tuple[Visibility, ...] = EVERYTHING,
        loras: LoraManager | None = None,
        clock: FakeClock | None = None,
        **config: int,
    ) -> None:
        settings_ = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_num_waiting": 100, **config}
        self.groups = groups
        self.manager = BlockManager(
            num_blocks,
            block_size,
            enable_prefix_caching=caching,
            num_host_blocks=num_host_blocks,
            groups=groups,
            max_step_tokens=settings_["max_num_batched_tokens"],
        )
        self.clock = clock or FakeClock()
        self.loras = loras
        self.scheduler = Scheduler(SchedulerConfig(**settings_), self.manager, clock=self.clock, gate=loras)
        self.executor = FakeExecutor(num_blocks, block_size, VOCAB, num_host_blocks=num_host_blocks, groups=groups)
        self.next_id = 0

    def add(
        self,
        prompt: list[int],
        *,
        n: int = 1,
        max_tokens: int = 5,
        name: str | None = None,
        priority: int = 0,
        lora: str | None = None,
    ) -> SequenceGroup:
        sampling = SamplingParams(n=n, max_tokens=max_tokens, priority=priority)
        variant = None if self.loras is None or lora is None else self.loras.resolve([LoraWeight(lora)])
        sequences = [Sequence(self.next_id + i, i, prompt, sampling, seed=i, variant=variant) for i in range(n)]
        group = SequenceGroup(name or f"r{self.next_id}", sequences, sampling, 0.0)
        self.next_id += n
        self.scheduler.add(group)
        if self.loras is not None and variant is not None:
            self.loras.count_request(variant)
        return group

    def step(self) -> SchedulerOutput:
        if self.loras is not None:
            assert not self.loras.advance()
        output = self.scheduler.schedule()
        if output.scheduled:
            samples = iter(self.executor.execute(output).samples)
            self.scheduler.observe(output, seconds=0.01 * output.num_tokens, swap_s=self.swap_s(output))
            self.scheduler.complete(output)
            for item in output.scheduled:
                for sequence in item.sampled:
                    sample = next(samples)
                    assert isinstance(sample, SampledToken)
                    sequence.append(sample.token_id)
                    if sequence.num_output_tokens == sequence.sampling.max_tokens:
                        self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.scheduler.check_integrity()
        return output

    def swap_s(self, output: SchedulerOutput) -> float:
        return 1e-6 * (len(output.swap_out) + len(output.swap_in))

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


def expected_output(
    prompt: list[int],
    index: int,
    max_tokens: int,
    groups: tuple[Visibility, ...] = EVERYTHING,
    variant: str | None = None,
) -> list[int]:
    """`variant` is a digest."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, index, VOCAB, groups, variant))
    return tokens[len(prompt) :]


def chunks_of(output: SchedulerOutput) -> dict[str, int]:
    """Request id to the tokens that a step computes of it."""
    assert all(item.sequence.group is not None for item in output.scheduled)
    return {item.sequence.group.request_id: item.num_tokens for item in output.scheduled if item.sequence.group}
