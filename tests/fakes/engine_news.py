"""What requests of an engine gain, from the first step to the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.outputs import RequestOutput

_MOST_STEPS = 1_000


def run(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    """Until no request is left; by request."""
    news: dict[str, list[RequestOutput]] = {}
    for _ in range(_MOST_STEPS):
        if not engine.has_unfinished_requests:
            break
        for output in engine.step():
            news.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert not engine.has_unfinished_requests
    return news


async def collect(stream: AsyncGenerator[RequestOutput]) -> list[RequestOutput]:
    """Of one request."""
    return [output async for output in stream]


def tokens_of(news: list[RequestOutput], index: int = 0) -> list[int]:
    """Of one choice."""
    return [token for output in news for delta in output.deltas if delta.index == index for token in delta.token_ids]
