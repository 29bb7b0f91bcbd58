"""Clients that ask the same again and again, in streams, and note what came of each request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import requests

from tests.e2e.processes import wait_until

NO_CONTROLLER = "no controller"
"""The connection was refused, or broke off before the end of the answer: clients can tell that it is not whole."""


class SteadyClients:
    """Ask `model` until they are stopped.

    Args:
        answers: the exact texts that may come, with a name for each.
    """

    def __init__(self, url: str, model: str, prompt: str, num_tokens: int, answers: Mapping[str, str]) -> None:
        self._url = url
        self._body = {
            "model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        self._names = {text: name for name, text in answers.items()}
        assert len(self._names) == len(answers), "two of the answers are alike"
        self._outcomes: list[tuple[float, str]] = []  # when the request began, and what came of it
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def running(self, count: int) -> Iterator[SteadyClients]:
        self._threads = [threading.Thread(target=self._run, args=(f"user-{number}",)) for number in range(count)]
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def outcomes(self, since: float = 0.0) -> list[str]:
        """Of requests that began after `since` (time.monotonic)."""
        return [outcome for began, outcome in list(self._outcomes) if began >= since]

    def wait_for(self, *names: str, timeout_s: float = 600.0) -> None:
        """Until each has come of a request that begins from now on."""
        now = time.monotonic()
        wait_until(lambda: set(names) <= set(self.outcomes(now)), timeout_s, f"{names} of {set(self.outcomes(now))}")

    def _run(self, user: str) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                began = time.monotonic()
                outcome = self._ask(session, user)
                self._outcomes.append((began, outcome))
                if outcome not in self._names.values():
                    self._stop.wait(0.1)

    def _ask(self, session: requests.Session, user: str) -> str:
        texts: list[str] = []
        try:
            with session.post(
                f"{self._url}/v1/completions", json={**self._body, "user": user}, stream=True, timeout=300
            ) as reply:
                if reply.status_code != 200:
                    retry = " to be tried again" if "retry-after" in reply.headers else ""
                    return f"{reply.status_code} {reply.json()['error']['code']}{retry}"
                for line in reply.iter_lines():
                    if line == b"data: [DONE]":
                        text = "".join(texts)
                        return self._names.get(text, f"wrong: {text!r}")
                    if line:
                        chunk = json.loads(line.removeprefix(b"data: "))
                        if "error" in chunk:
                            return f"stream ended: {chunk['error']['code']}"
                        texts += [choice["text"] for choice in chunk["choices"]]
        except requests.RequestException:
            pass
        return NO_CONTROLLER
