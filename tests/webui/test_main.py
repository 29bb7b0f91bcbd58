from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from webui.__main__ import main


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-m", "webui", "--port", "0", "--controller", "http://127.0.0.1:1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_serves_without_a_controller_and_ends_cleanly_on_sigterm(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    match = re.fullmatch(r"Web UI at (http://127\.0\.0\.1:\d+)\n", line)
    assert match, line
    with urllib.request.urlopen(match[1], timeout=30) as reply:
        assert b"rootgraft" in reply.read()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)], {}) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"127.0.0.1:{port}" in error


@pytest.mark.parametrize("flags", [["--controller", "localhost:8000"], ["--port", "x"], ["--port", "70000"]])
def test_bad_flags_are_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags, {})
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_analytics_are_off() -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
