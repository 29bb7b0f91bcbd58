"""Who runs while adapters come and go."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st

from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.sequence import SequenceGroup
from tests.fakes.fake_adapters import FakeAdapters, ManualWork, make_manager, settle
from tests.fakes.fake_clock import FakeClock
from tests.fakes.scheduler_harness import SchedulerHarness, chunks_of, expected_output

STEP_S = 0.05


def make_harness(
    work: ManualWork, *names: str, max_loras: int = 2, patience_s: float = 1.0, **config: int
) -> SchedulerHarness:
    """All adapters are added."""
    clock = FakeClock()
    adapters = FakeAdapters(clock)
    loras = make_manager(adapters, work, max_loras=max_loras, patience_s=patience_s)
    for name in names:
        loras.add(name, adapters.write(name))
        settle(loras, work)
    return SchedulerHarness(loras=loras, clock=clock, **config)


def active(loras: LoraManager) -> set[str]:
    return {status.name for status in loras.statuses() if status.state == "active"}


def test_others_pass_a_sequence_whose_adapter_is_not_active_yet() -> None:
    work = ManualWork()
    harness = make_harness(work, "a")
    harness.add([1] * 4, name="adapted", lora="a")
    harness.add([2] * 4, name="base")
    assert set(chunks_of(harness.step())) == {"base"}
    work.work()
    assert set(chunks_of(harness.step())) == {"adapted", "base"}
    harness.run()


def test_a_step_is_empty_while_everybody_waits_for_adapters() -> None:
    work = ManualWork()
    harness = make_harness(work, "a")
    harness.add([1], lora="a")
    assert harness.step().scheduled == ()
    work.work()
    assert harness.step().scheduled
    harness.run()


def test_the_sequences_of_a_step_are_sorted_by_variant() -> None:
    harness = make_harness(ManualWork(at_once=True), "a", "b")
    for number, lora in enumerate(["b", None, "a", "b", None, "a"]):
        harness.add([number] * 2, name=f"{lora}{number}", lora=lora, max_tokens=20)
    for _ in range(5):
        output = harness.step()
    assert list(chunks_of(output)) == ["None1", "None4", "a2", "a5", "b0", "b3"]


def test_rows_of_a_variant_never_meet_the_blocks_of_another() -> None:
    harness = make_harness(ManualWork(at_once=True), "a", "b")
    prompt = [7] * 9
    groups = {lora: harness.add(prompt, lora=lora, n=2) for lora in (None, "a", "b")}
    harness.run()
    again = {lora: harness.add(prompt, lora=lora, n=2) for lora in (None, "a", "b")}
    harness.run()
    for lora, group in [*groups.items(), *again.items()]:
        digest = None if lora is None else f"sha256:{lora}"
        for sequence in group.sequences:
            assert sequence.output_token_ids == expected_output(prompt, sequence.index, 5, variant=digest)
    assert all(group.sequences[0].num_cached_tokens == 8 for group in again.values())


def test_one_that_has_waited_too_long_keeps_its_room() -> None:
    """While its adapter is loaded, others take no batch place that it needs."""
    work = ManualWork()
    harness = make_harness(work, "a", max_num_seqs=2)
    harness.add([1] * 2, name="running", max_tokens=50)
    harness.step()
    harness.add([2] * 2, name="adapted", lora="a")
    harness.step()
    harness.clock.advance(1.0)
    harness.add([3] * 2, name="late")
    assert set(chunks_of(harness.step())) == {"running"}
    work.work()
    assert set(chunks_of(harness.step())) == {"running", "adapted"}
    harness.run()


def test_who_has_waited_too_long_holds_nobody_up_where_nobody_runs() -> None:
    work = ManualWork()
    harness = make_harness(work, "a", max_num_seqs=1)
    harness.add([1] * 2, name="adapted", lora="a")
    harness.step()
    harness.clock.advance(5.0)
    harness.add([2] * 2, name="base")
    assert set(chunks_of(harness.step())) == {"base"}
    work.work()
    harness.run()


def test_a_hot_adapter_starves_no_other() -> None:
    """Bounded waiting: a place is emptied after the patience, although the hot ones never stop coming."""
    harness = make_harness(ManualWork(at_once=True), "hot", "warm", "rare", patience_s=1.0, max_num_seqs=4)
    rare: SequenceGroup | None = None
    for step in range(200):
        for lora in ("hot", "warm"):
            if sum(1 for s in harness.scheduler.waiting if s.variant is not None) < 8:
                harness.add([step % 5], max_tokens=6, lora=lora)
        if step == 20:
            rare = harness.add([9], max_tokens=2, lora="rare")
        harness.step()
        harness.clock.advance(STEP_S)
        if rare is not None and rare.finished:
            break
    assert rare is not None
    assert rare.finished
    assert step < 20 + 1.0 / STEP_S + 30  # the patience, then at most a few answers of six tokens
    harness.run()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_requests=st.integers(1, 60),
    load_every=st.integers(1, 4),
    patience_s=st.sampled_from([0.0, 0.2, 1.0]),
    num_blocks=st.integers(10, 40),
    num_host_blocks=st.integers(0, 20),
)
def test_fifty_adapters_in_four_places_and_everybody_finishes(
    seed: int, num_requests: int, load_every: int, patience_s: float, num_blocks: int, num_host_blocks: int
) -> None:
    chance = random.Random(seed)
    work = ManualWork()
    names = [f"v{i}" for i in range(50)]
    harness = make_harness(
        work,
        *names,
        max_loras=4,
        patience_s=patience_s,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        max_num_seqs=6,
    )
    assert harness.loras is not None
    requests: list[tuple[SequenceGroup, list[int], int, str | None]] = []
    cancelled: set[str] = set()
    for step in range(3_000):
        while len(requests) < num_requests and chance.random() < 0.4:
            prompt = [chance.randrange(2) for _ in range(chance.randint(1, 12))]
            lora = chance.choice([None, *names, *names[:3] * 5])
            max_tokens, priority = chance.randint(1, 8), chance.choice([0, 0, 0, 1])
            n = chance.choice([1, 1, 2])
            group = harness.add(prompt, n=n, max_tokens=max_tokens, lora=lora, priority=priority)
            requests.append((group, prompt, max_tokens, lora))
        if requests and chance.random() < 0.02:
            group = chance.choice(requests)[0]
            if not group.finished:
                harness.scheduler.abort(group.request_id)
                cancelled.add(group.request_id)
        harness.step()
        if step % load_every == 0 and work.queued:
            work.queued.pop(0)()
        harness.clock.advance(STEP_S)
        if len(requests) == num_requests and not harness.scheduler.has_unfinished:
            break
    assert not harness.scheduler.has_unfinished, "somebody starves"
    for group, prompt, max_tokens, lora in requests:
        digest = None if lora is None else f"sha256:{lora}"
        for sequence in group.sequences if group.request_id not in cancelled else ():
            expected = expected_output(prompt, sequence.index, max_tokens, variant=digest)
            assert sequence.output_token_ids == expected
    assert harness.manager.num_used_blocks == 0
    harness.loras.check_idle()
    assert len(active(harness.loras)) <= 4
