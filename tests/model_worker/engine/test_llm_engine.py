from __future__ import annotations

import asyncio

import pytest

from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.outputs import FinishReason, RequestOutput
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.step import SchedulerOutput
from model_worker.engine.visibility import Visibility
from registry.errors import ContextLengthError, InternalError, InvalidRequestError, RateLimitError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.engine_news import collect, run, tokens_of
from tests.fakes.fake_executor import FakeExecutor, next_token
from tests.fakes.until import until


def make_engine(
    executor: FakeExecutor | None = None,
    *,
    stop_token_ids: tuple[int, ...] = (),
    max_model_len: int = 64,
    **scheduler: int,
) -> LLMEngine:
    executor = executor or FakeExecutor(vocab_size=128)
    config = EngineConfig(
        CacheConfig(), SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, **scheduler})
    )
    return LLMEngine(
        config, executor, ByteTokenizer(), stop_token_ids=stop_token_ids, max_model_len=max_model_len
    )  # fmt: skip


def text_of(news: list[RequestOutput], index: int = 0) -> str:
    return "".join(delta.text for output in news for delta in output.deltas if delta.index == index)


def continuation(prompt: list[int], count: int, index: int = 0, vocab_size: int = 128) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, index, vocab_size))
    return tokens[len(prompt) :]


def test_every_request_has_exactly_one_terminal_output_and_it_is_the_last() -> None:
    engine = make_engine()
    for i in range(6):
        engine.add_request(f"r{i}", [i, i], SamplingParams(max_tokens=3 + i, n=1 + i % 3))
    news = run(engine)
    assert len(news) == 6
    for outputs in news.values():
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for i in range(6):
        reasons = [d.finish_reason for o in news[f"r{i}"] for d in o.deltas if d.finish_reason]
        assert reasons == [FinishReason.LENGTH] * (1 + i % 3)
        for index in range(1 + i % 3):
            assert tokens_of(news[f"r{i}"], index) == continuation([i, i], 3 + i, index)
    assert engine.stats().finished_total == 6
    assert engine.stats().kv_blocks_used == 0


def test_end_of_sequence_ends_and_is_no_text() -> None:
    first, second = continuation([5], 2)
    engine = make_engine(stop_token_ids=(second,))
    engine.add_request("r", [5], SamplingParams(max_tokens=9))
    news = run(engine)["r"]
    assert tokens_of(news) == [first, second]
    assert text_of(news) == ByteTokenizer().decode([first])
    assert news[-1].deltas[-1].finish_reason is FinishReason.STOP
    assert news[-1].deltas[-1].stop_reason is None


def test_ignore_eos_goes_on_and_a_stop_token_id_is_named() -> None:
    tokens = continuation([5], 4)
    engine = make_engine(stop_token_ids=(tokens[1],))
    engine.add_request("on", [5], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.add_request("stop", [5], SamplingParams(max_tokens=4, ignore_eos=True, stop_token_ids=(tokens[2],)))
    news = run(engine)
    assert tokens_of(news["on"]) == tokens
    assert tokens_of(news["stop"]) == tokens[:3]
    assert news["stop"][-1].deltas[-1].stop_reason == tokens[2]


def test_a_stop_string_ends_in_the_step_that_completes_it() -> None:
    text = ByteTokenizer().decode(continuation([5], 8))
    stop = text[3:5]
    assert stop not in text[:4]
    engine = make_engine()
    engine.add_request("r", [5], SamplingParams(max_tokens=8, stop=(stop,)))
    news = run(engine)["r"]
    assert text_of(news) == text[:3]
    assert news[-1].deltas[-1].stop_reason == stop
    assert len(tokens_of(news)) == 5


def test_prompt_logprobs_come_once_and_whole_through_chunks_and_cache() -> None:
    engine = make_engine()
    prompt = list(range(40))
    engine.add_request("warm", prompt, SamplingParams(max_tokens=1))
    run(engine)
    engine.add_request("r", prompt, SamplingParams(max_tokens=3, prompt_logprobs=0))
    news = run(engine)["r"]
    given = [output.prompt_logprobs for output in news if output.prompt_logprobs is not None]
    assert len(given) == 1
    assert given[0][0] is None
    assert [entry.logprob for entry in given[0][1:] if entry] == [-float(i) for i in range(1, 40)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "param"),
    [
        ([], {}, InvalidRequestError, "prompt"),
        ([128], {}, InvalidRequestError, "prompt"),
        ([-1], {}, InvalidRequestError, "prompt"),
        ([1] * 64, {}, ContextLengthError, "prompt"),
        ([1] * 60, {"max_tokens": 5}, ContextLengthError, "max_tokens"),
        ([1], {"logit_bias": {128: 1.0}}, InvalidRequestError, "logit_bias"),
        ([1], {"stop_token_ids": (128,)}, InvalidRequestError, "stop_token_ids"),
        ([1], {"n": 5}, InvalidRequestError, "n"),
        ([1] * 60, {"min_tokens": 5}, ContextLengthError, "min_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    prompt: list[int], sampling: dict[str, object], error: type[InvalidRequestError], param: str
) -> None:
    engine = make_engine()
    with pytest.raises(error) as caught:
        engine.add_request("r", prompt, SamplingParams(**sampling))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not engine.has_unfinished_requests
    engine.check_integrity()


def test_context_ends_a_request_without_max_tokens() -> None:
    engine = make_engine(max_model_len=20)
    engine.add_request("r", [1] * 8, SamplingParams())
    assert len(tokens_of(run(engine)["r"])) == 12


def test_context_is_lowered_to_what_the_cache_holds() -> None:
    engine = make_engine(FakeExecutor(num_blocks=3, block_size=4, vocab_size=128))
    assert engine.max_model_len == 12
    engine.add_request("r", [1] * 8, SamplingParams())
    assert len(tokens_of(run(engine)["r"])) == 4


def test_a_step_that_throws_ends_its_requests_and_nothing_else() -> None:
    def explode(output: SchedulerOutput) -> None:
        if any(666 in item.sequence.token_ids for item in output.scheduled):
            raise RuntimeError("out of memory")

    engine = make_engine(FakeExecutor(vocab_size=1000, before_step=explode), max_num_seqs=1)
    engine.add_request("bad", [666], SamplingParams(max_tokens=4))
    engine.add_request("good", [1], SamplingParams(max_tokens=4))
    news = run(engine)
    assert isinstance(news["bad"][-1].error, InternalError)
    assert tokens_of(news["good"]) == continuation([1], 4, vocab_size=1000)
    assert engine.stats().failed_total == 1


def test_logits_that_are_not_finite_end_one_request_only() -> None:
    broken = InternalError("not finite")
    executor = FakeExecutor(
        vocab_size=128, fail_sample=lambda s: broken if s.group and s.group.request_id == "bad" else None
    )
    engine = make_engine(executor)
    engine.add_request("good", [1], SamplingParams(max_tokens=4))
    engine.add_request("bad", [2], SamplingParams(max_tokens=4, n=2))
    news = run(engine)
    assert [output.error for output in news["bad"]] == [broken]
    assert tokens_of(news["good"]) == continuation([1], 4)


def test_what_a_failed_request_computed_is_not_shared() -> None:
    broken = InternalError("not finite")
    executor = FakeExecutor(
        vocab_size=128, fail_sample=lambda s: broken if s.group and s.group.request_id == "bad" else None
    )
    engine = make_engine(executor)
    for request_id in ("bad", "good", "again"):
        engine.add_request(request_id, [7] * 12, SamplingParams(max_tokens=2))
        news = run(engine)[request_id]
        assert news[-1].num_cached_tokens == (8 if request_id == "again" else 0)


async def test_async_requests_run_together_and_get_their_own_news() -> None:
    engine = AsyncLLMEngine(make_engine())
    await engine.start()
    streams = [engine.generate(f"r{i}", [i], SamplingParams(max_tokens=5)) for i in range(8)]
    results = await asyncio.gather(*(collect(stream) for stream in streams))
    for i, outputs in enumerate(results):
        assert tokens_of(outputs) == continuation([i], 5)
    await engine.stop()


async def test_closing_a_stream_cancels_its_request() -> None:
    engine = AsyncLLMEngine(make_engine(FakeExecutor(num_blocks=4000, vocab_size=128), max_model_len=8000))
    await engine.start()
    stream = engine.generate("r", [1], SamplingParams(max_tokens=7000))
    await anext(stream)
    await stream.aclose()
    await until(lambda: engine.stats().cancelled_total == 1)
    assert engine.stats().kv_blocks_used == 0
    await engine.stop()


async def test_refusals_are_raised_to_their_own_request() -> None:
    engine = AsyncLLMEngine(make_engine(max_num_waiting=1))
    taken = asyncio.create_task(collect(engine.generate("taken", [1], SamplingParams(max_tokens=3))))
    refused = asyncio.create_task(collect(engine.generate("refused", [1], SamplingParams())))
    await asyncio.sleep(0)  # both are queued before the first step
    await engine.start()
    with pytest.raises(RateLimitError):
        await refused
    with pytest.raises(InvalidRequestError):
        await collect(engine.generate("empty", [], SamplingParams()))
    assert tokens_of(await taken) == continuation([1], 3)
    await engine.stop()


async def test_stopping_ends_open_streams_with_an_error() -> None:
    engine = AsyncLLMEngine(make_engine(FakeExecutor(num_blocks=4000, vocab_size=128), max_model_len=8000))
    await engine.start()
    stream = engine.generate("r", [1], SamplingParams(max_tokens=7000))
    await anext(stream)
    await engine.stop()
    with pytest.raises(InternalError):
        await collect(stream)


async def test_a_stopped_engine_refuses_instead_of_waiting() -> None:
    engine = AsyncLLMEngine(make_engine())
    await engine.start()
    await engine.stop()
    async with asyncio.timeout(60):
        with pytest.raises(InternalError, match="shutting down"):
            await collect(engine.generate("r", [1], SamplingParams(max_tokens=2)))


async def test_a_dead_engine_thread_fails_everything_and_says_so() -> None:
    died = asyncio.Event()
    inner = make_engine()
    engine = AsyncLLMEngine(inner, on_failure=died.set)
    await engine.start()

    def break_down() -> None:
        raise AssertionError("accounting is wrong")

    inner.check_idle = break_down  # type: ignore[method-assign]
    outputs = await collect(engine.generate("r", [1], SamplingParams(max_tokens=2)))
    assert outputs[-1].finished
    async with asyncio.timeout(60):
        await died.wait()
    assert isinstance(engine.failed, AssertionError)
    with pytest.raises(InternalError):
        await collect(engine.generate("s", [1], SamplingParams(max_tokens=2)))


async def test_nothing_follows_the_last_output_even_if_the_engine_dies_right_after_it() -> None:
    engine = AsyncLLMEngine(make_engine())  # not started: the test is its thread
    reader = asyncio.create_task(collect(engine.generate("r", [1], SamplingParams(max_tokens=2))))
    await asyncio.sleep(0)
    last = RequestOutput("r", num_prompt_tokens=1, num_cached_tokens=0, finished=True)
    engine._tracker.deliver([("r", last)])
    engine._tracker.fail_all(InternalError("dead"))
    assert await reader == [last]


@pytest.mark.parametrize("direction", ["swap_out", "swap_in"])
def test_what_a_failed_step_swapped_is_computed_again(direction: str) -> None:
    """The copies may or may not have been made: nobody reads them."""
    failed: list[SchedulerOutput] = []

    def fail_once(output: SchedulerOutput) -> None:
        if getattr(output, direction) and not failed:
            failed.append(output)
            raise RuntimeError("out of memory")

    executor = FakeExecutor(num_blocks=10, block_size=4, vocab_size=128, num_host_blocks=20, before_step=fail_once)
    engine = make_engine(executor)
    for i in range(4):
        engine.add_request(f"r{i}", [i] * 6, SamplingParams(max_tokens=20))
    news = run(engine)
    lost = {item.sequence.group.request_id for item in failed[0].scheduled if item.sequence.group}
    assert {name for name, outputs in news.items() if outputs[-1].error} == lost
    kept = set(news) - lost
    assert kept
    for name in kept:
        assert tokens_of(news[name]) == continuation([int(name[1])] * 6, 20)
    stats = engine.stats()
    assert stats.preemptions_by_swap_total > 0
    assert stats.kv_host_blocks_used == 0


def test_the_summary_of_the_cache_counts_what_windowed_layers_let_go() -> None:
    def summary(*groups: Visibility, num_host_blocks: int = 0) -> str:
        executor = FakeExecutor(
            num_blocks=64, block_size=4, vocab_size=128, groups=groups, num_host_blocks=num_host_blocks
        )
        return make_engine(executor, max_model_len=128, max_num_batched_tokens=8).cache_summary()

    full, windowed = Visibility(), Visibility(sliding_window=10)
    assert summary(full).startswith("64 KV blocks of 4 tokens, enough for 2.0 requests of 128 tokens")
    assert "enough for 9.1 requests" in summary(windowed)  # 7 blocks each
    assert "enough for 1.6 requests" in summary(full, windowed)
    assert summary(full, num_host_blocks=5).endswith("5 blocks of host memory to swap to")
