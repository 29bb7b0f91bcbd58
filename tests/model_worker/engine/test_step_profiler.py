"""The trace of the engine's steps: valid, bounded, nested, and absent when nobody asked for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.engine.async_llm_engine import AsyncLLMEngine
from model_worker.engine.config import CacheConfig, EngineConfig, ProfileConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.step_profiler import Profiler, make_profiler
from registry.errors import InvalidRequestError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_executor import FakeExecutor
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


def _engine(profiler: Profiler, executor: FakeExecutor | ModelRunner | None = None) -> LLMEngine:
    executor = executor or FakeExecutor(vocab_size=128)
    return LLMEngine(
        EngineConfig(), executor, ByteTokenizer(), stop_token_ids=(), max_model_len=64, profiler=profiler
    )  # fmt: skip


def _run(engine: LLMEngine, num_tokens: int) -> None:
    engine.add_request(f"r{num_tokens}", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=num_tokens))
    while engine.has_unfinished_requests:
        engine.step()


def _events(path: Path, phase: str = "X") -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == phase]


def _spans_in(events: list[dict[str, Any]], outer: dict[str, Any]) -> list[str]:
    end = outer["ts"] + outer["dur"]
    inside = [e for e in events if e is not outer and outer["ts"] <= e["ts"] and e["ts"] + e["dur"] <= end]
    return [event["name"] for event in inside]


def test_every_part_of_a_step_lies_within_it(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(tmp_path)
    config = ProfileConfig(str(tmp_path / "trace.json"), profile_steps=3)
    profiler = make_profiler(config, title="worker tiny")
    engine_config = EngineConfig(CacheConfig(num_blocks=8), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16))
    runner = ModelRunner(make_tiny_plan(tmp_path), engine_config, profiler=profiler)
    _run(_engine(profiler, runner), 5)
    events = _events(tmp_path / "trace.json")
    steps = [event for event in events if event["name"] == "step"]
    assert [step["args"]["step"] for step in steps] == [0, 1, 2]
    parts = ["schedule", "execute", "prepare", "forward", "logits", "sample", "detokenize"]
    assert [_spans_in(events, step) for step in steps] == [parts] * 3
    assert [e["args"] for e in events if e["name"] == "execute"][:2] == [
        {"tokens": 3, "sequences": 1},
        {"tokens": 1, "sequences": 1},
    ]
    names = [event["args"]["name"] for event in _events(tmp_path / "trace.json", "M")]
    assert names == ["worker tiny", "MainThread"]
    assert [event["args"]["tokens"] for event in _events(tmp_path / "trace.json", "C")][:2] == [3, 0]


def test_operations_lie_within_their_forward_pass(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(tmp_path)
    config = ProfileConfig(str(tmp_path / "trace.json"), profile_steps=2, profile_detail="operations")
    profiler = make_profiler(config, title="t")
    engine_config = EngineConfig(CacheConfig(num_blocks=8), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16))
    runner = ModelRunner(make_tiny_plan(tmp_path), engine_config, profiler=profiler)
    _run(_engine(profiler, runner), 5)
    events = _events(tmp_path / "trace.json")
    forwards = [event for event in events if event["name"] == "forward"]
    assert len(forwards) == 2
    for forward in forwards:
        inside = _spans_in(events, forward)
        assert inside[:2] == ["model.embed_tokens", "model.rotary_emb"]
        assert {"0.self_attn.q_proj", "1.self_attn.paged_attention", "1.mlp.down_proj"} <= set(inside)
    (logits, _) = [event for event in events if event["name"] == "logits"]
    assert _spans_in(events, logits) == ["lm_head"]
    assert not any(module._forward_hooks for module in runner.model.causal_lm.modules())


def test_a_full_trace_is_written_while_the_engine_goes_on_and_never_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    profiler = make_profiler(ProfileConfig(str(path), profile_steps=2), title="t")
    engine = _engine(profiler)
    _run(engine, 2)
    content = path.read_bytes()
    _run(engine, 3)
    profiler.close()
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_drain_writes_what_there_is_and_names_the_engines_thread(tmp_path: Path) -> None:
    asyncio.run(_serve_one_request(make_profiler(ProfileConfig(str(tmp_path)), title="t")))
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("profile-")
    names = [event["name"] for event in _events(path)]
    assert names.count("step") == names.count("deliver") == 4
    assert "engine" in [event["args"]["name"] for event in _events(path, "M")]


async def _serve_one_request(profiler: Profiler) -> None:
    engine = AsyncLLMEngine(_engine(profiler))
    await engine.start()
    async for _ in engine.generate("r", [1, 2], SamplingParams(max_tokens=4)):
        pass
    await engine.stop()


def test_the_detail_of_torch_shows_its_operators_and_our_spans(tmp_path: Path) -> None:
    profiler = make_profiler(ProfileConfig(str(tmp_path / "t.json"), 2, "torch"), title="t")
    _run(_engine(profiler, FakeExecutor(vocab_size=128, before_step=lambda output: torch.ones(3).add_(1))), 2)
    names = {event.get("name") for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert {"step", "schedule", "execute", "aten::add_"} <= names


def test_nothing_is_written_without_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_profiler(ProfileConfig(str(tmp_path / "t.json")), title="t").close()
    assert list(tmp_path.iterdir()) == []
    assert "No step" in caplog.text


def test_a_disk_that_fails_does_not_end_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    profiler = make_profiler(ProfileConfig(str(folder / "t.json"), profile_steps=1), title="t")
    folder.rmdir()
    folder.write_text("a file where the directory was")
    _run(_engine(profiler), 3)
    assert "not written" in caplog.text


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="--profile"):
        make_profiler(ProfileConfig(str(tmp_path / "file" / "t.json")), title="t")


def test_without_the_flag_nothing_is_recorded() -> None:
    assert type(make_profiler(ProfileConfig(), title="t")) is Profiler
    with pytest.raises(InvalidRequestError, match="--profile-steps"):
        ProfileConfig(profile_steps=0)


@pytest.mark.parametrize("given", [{"profile_steps": 5}, {"profile_detail": "operations"}])
def test_flags_that_would_have_no_effect_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="without --profile"):
        ProfileConfig(**given)
