"""A running controller as the examples see it, and answers of several models side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import requests
from training import ExampleError

MAX_ANSWER_TOKENS = 60


class Server:
    """A controller's HTTP API. Every method raises ExampleError, with what the server said."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._session = requests.Session()
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def check_base(self, base: str) -> None:
        """Find out before the training whether there is a controller that serves the base model."""
        names = [model["id"] for model in self._call("GET", "/v1/models").json()["data"]]
        if base not in names:
            raise ExampleError(
                f"the controller at {self.url} does not serve {base} but {', '.join(names) or 'nothing yet'}; start a "
                "worker with it, or say --base"
            )

    def load_adapter(self, name: str, path: str, base: str) -> None:
        """Serve the adapter at `path`, relative to the workers' adapter root, under a name, or in place of its last."""
        body = {"lora_name": name, "lora_path": path, "base_model_name": base, "load_inplace": True}
        self._call("POST", "/v1/load_lora_adapter", body)

    def answer(self, model: str, question: str) -> str:
        """The most likely answer."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_ANSWER_TOKENS,
        }
        text: str = self._call("POST", "/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        return text.strip()

    def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> requests.Response:
        try:
            response = self._session.request(method, self.url + path, json=body, timeout=120)
        except requests.RequestException as error:
            raise ExampleError(
                f"no controller answers at {self.url} ({type(error).__name__}); start one, for instance with "
                "scripts/demo, or say --controller"
            ) from error
        if response.status_code >= 400:
            raise ExampleError(f"{path}: HTTP {response.status_code}: {_message(response)}")
        return response


def _message(response: requests.Response) -> str:
    """Of an OpenAI error object, or whatever else the answer is."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:300] or "(empty)"


def side_by_side(question: str, answers: Sequence[str], width: int = 116) -> str:
    """Answers in columns below their question.

    Args:
        width: of all columns, in characters.
    """
    column = (width - 3 * (len(answers) - 1)) // len(answers)
    columns = [textwrap.wrap(answer, column) for answer in answers]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join([question, *("  " + " | ".join(f"{cell:<{column}}" for cell in row).rstrip() for row in rows)])
