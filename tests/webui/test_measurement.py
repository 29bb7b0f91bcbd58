from __future__ import annotations

from tests.fakes.fake_clock import FakeClock
from webui.client import Chunk, Usage
from webui.measurement import Measurement


def measure(*chunks: tuple[float, Chunk]) -> Measurement:
    """Each chunk comes so many seconds after the one before it."""
    clock = FakeClock()
    measurement = Measurement(clock)
    for delay_s, chunk in chunks:
        clock.advance(delay_s)
        measurement.add(chunk)
    return measurement


def test_while_it_runs_chunks_are_counted() -> None:
    running = measure((2.0, Chunk("a")), (0.5, Chunk("b")), (0.5, Chunk("c")))
    assert running.summary() == "**~3 tokens** · **2.0 tokens/s** · first token after 2.00 s"


def test_at_the_end_the_servers_count_is_taken() -> None:
    done = measure(
        (1.0, Chunk("a")), (1.0, Chunk("b")), (5.0, Chunk(finish_reason="stop")), (0.0, Chunk(usage=Usage(7, 11)))
    )
    assert done.summary() == "**11 tokens** · **10.0 tokens/s** · first token after 1.00 s · prompt 7 tokens"


def test_why_it_ended_is_said() -> None:
    assert measure((1.0, Chunk("a")), (0.0, Chunk(finish_reason="length"))).summary().endswith("cut at the token limit")
    stopped = measure((1.0, Chunk("a")))
    stopped.end("stopped")
    assert stopped.summary() == "**~1 tokens** · first token after 1.00 s · stopped"


def test_nothing_yet() -> None:
    waiting = measure()
    assert waiting.tokens_per_second is None
    assert waiting.summary().startswith("Waiting")
    assert measure((1.0, Chunk(usage=Usage(7, 0)))).summary() == "**0 tokens** · prompt 7 tokens"


def test_an_end_before_the_first_token_says_nothing_of_speed() -> None:
    for ending in ("failed", "stopped"):
        nothing = measure()
        nothing.end(ending)
        assert nothing.summary() == ""
