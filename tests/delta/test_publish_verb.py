"""`python -m delta publish`, up to where a controller is needed; the rest is in tests/controller/publishing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from delta.__main__ import main
from delta.progress_bar import progress_bar
from delta.publish import Publication, publish
from registry.errors import UpstreamError


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Publication]:
    found: list[Publication] = []

    def publish(what: Publication, url: str, **options: object) -> str:
        found.append(what)
        return f"{what.name}@v1"

    monkeypatch.setattr("delta.verbs.publish.publish", publish)
    return found


def test_a_delta_that_is_there_is_taken_only_if_it_is_this_fine_tunes(
    base: Path, target: Path, delta: Path, published: list[Publication], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", "--name", "bot", "--base", str(base), "--target", str(target), "--out", str(delta)]
    assert main(command) == 0
    assert [what.directory for what in published] == [delta]
    weights = load_file(target / "model.safetensors")  # it is trained again, into the same directory
    weights["up"][0, 0] += 1
    save_file(weights, target / "model.safetensors")
    assert main(command) == 1
    assert "was not made of" in capsys.readouterr().err
    assert len(published) == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--delta", "D", "--out", "O"], "--target"),
        (["--delta", "D", "--prompts", "P"], "--target"),
        (["--target", "T"], "--base"),
        (["--delta", "D", "--canary", "1.5"], "--canary"),
        (["--delta", "D", "--canary", "0.5", "--no-alias"], "--no-alias"),
        (["--delta", "D", "--url", "localhost:8000"], "--url"),
        (["--delta", "D", "--timeout", "nan"], "--timeout"),
        (["--delta", "D", "--alias", "v3"], "alias"),
        (["--delta", "D", "--key-file", "/there/is/none"], "/there/is/none"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(
    flags: list[str], error: str, published: list[Publication], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", "--name", "bot", *flags]) == 1
    assert error in capsys.readouterr().err
    assert not published


def test_a_controller_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        clock = iter(range(0, 1000, 10))
        with pytest.raises(UpstreamError, match=rf"^the controller at {url} cannot be reached: Connection refused;"):
            publish(
                Publication("bot", tmp_path),
                url,
                key=None,
                timeout_s=1,
                report=lambda line: None,
                progress_bar=progress_bar,
                sleep=lambda seconds: None,
                clock=lambda: float(next(clock)),
            )
