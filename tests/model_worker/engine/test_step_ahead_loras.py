"""Steps that run ahead while adapters come and go."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.ahead_executor import AheadExecutor
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_adapters import FakeAdapters, ManualWork, make_manager, settle
from tests.fakes.fake_executor import next_token

VOCAB = 64
NAMES = ("a", "b", "c")
REQUEST = st.tuples(
    st.integers(1, 10),  # prompt length
    st.integers(1, 10),  # max_tokens
    st.sampled_from([None, *NAMES]),
    st.integers(0, 12),  # arrives at step
    st.one_of(st.none(), st.integers(0, 20)),  # is cancelled at step
    st.sampled_from([(), (1, 2, 3, 4, 5, 6, 7, 8)]),  # stop_token_ids
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=10),
    max_loras=st.integers(1, 2),
    loader_works=st.sets(st.integers(0, 40)),
    num_blocks=st.integers(8, 20),
)
def test_any_mix_of_adapters_gives_the_tokens_of_each(
    requests: list[tuple[int, int, str | None, int, int | None, tuple[int, ...]]],
    max_loras: int,
    loader_works: set[int],
    num_blocks: int,
) -> None:
    adapters, work = FakeAdapters(), ManualWork()
    loras = make_manager(adapters, work, max_loras=max_loras, patience_s=0.0)
    for name in NAMES:
        loras.add(name, adapters.write(name))
        settle(loras, work)
    config = EngineConfig(CacheConfig(), SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12))
    executor = AheadExecutor(num_blocks, block_size=3, vocab_size=VOCAB)
    engine = LLMEngine(config, executor, ByteTokenizer(), stop_token_ids=(), max_model_len=20, loras=loras)
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    for step in range(1_000):
        for number, (length, max_tokens, lora, arrival, cancel, stops) in enumerate(requests):
            if arrival == step:
                sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stops)
                engine.add_request(
                    str(number), [7] * length, sampling, loras=[] if lora is None else [LoraWeight(lora)]
                )
            if cancel == step and engine.abort_request(str(number)):
                ended.add(str(number))
        for output in engine.step():
            assert output.error is None
            assert output.request_id not in ended
            for delta in output.deltas:
                tokens.setdefault(output.request_id, []).extend(delta.token_ids)
            if output.finished:
                ended.add(output.request_id)
        engine.check_integrity()
        if step in loader_works or step > 40:
            work.work()
        if step > 20 and not engine.has_unfinished_requests:
            break
    assert len(ended) == len(requests)
    for number, (length, max_tokens, lora, _, cancel, stops) in enumerate(requests):
        context = [7] * length
        expected: list[int] = []
        while len(expected) < max_tokens and not (expected and expected[-1] in stops):
            variant = None if lora is None else f"sha256:{lora}"
            expected.append(next_token(context + expected, 0, VOCAB, variant=variant))
        found = tokens.get(str(number), [])
        assert found == expected[: len(found)]
        assert cancel is not None or found == expected
