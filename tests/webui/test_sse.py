from __future__ import annotations

from hypothesis import given, strategies as st

from webui.sse import SseDecoder


def test_fields_other_than_data_and_comments_are_passed_over() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b": ping\n\nevent: x\nid: 1\ndata: a\n\nretry: 3\n\n") == ["a"]


def test_several_data_lines_are_one_event() -> None:
    assert SseDecoder().feed(b"data: a\ndata:b\n\n") == ["a\nb"]


def test_an_event_without_its_empty_line_is_not_complete() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == ["a"]


@given(
    st.lists(st.text(alphabet=st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)),
    st.sampled_from(["\n", "\r\n"]),
    st.data(),
)
def test_events_may_be_cut_anywhere(events: list[str], newline: str, data: st.DataObject) -> None:
    wire = "".join(f"data: {event}{newline}{newline}" for event in events).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    decoder = SseDecoder()
    pieces = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == events
