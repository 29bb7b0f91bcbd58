"""Server-sent events, as far as the OpenAI API uses them."""

from __future__ import annotations


class SseDecoder:
    """Takes bytes as they arrive and gives the `data` of each event.

    Source: WHATWG HTML, section 9.2.6; `event`, `id` and `retry` fields are passed over, as OpenAI clients do.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes; lines and characters may be cut anywhere between chunks."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events: list[str] = []
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", errors="replace")
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events
