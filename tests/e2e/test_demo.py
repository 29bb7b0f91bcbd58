"""scripts/demo as a new user runs it, in a checkout that is set up."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tests.e2e.processes import MODEL
from tests.fakes.ports import free_port

pytestmark = pytest.mark.e2e
DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo"


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(DEMO), *arguments]


def test_the_smoke_run_names_paris_and_leaves_nothing_behind() -> None:
    port, webui_port = free_port(), free_port()
    done = subprocess.run(
        command("--smoke", "--port", str(port), "--webui-port", str(webui_port)),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout
    for used in (port, webui_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", used)) != 0


def test_two_workers_arguments_passed_on_and_a_clean_end_on_ctrl_c() -> None:
    port = free_port()
    demo = subprocess.Popen(
        command(
            "--no-webui", "--workers", "2", "--port", str(port),
            "--worker-args", "--max-num-seqs 3 --num-threads 1", "--controller-args", "--routing round_robin",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts a background job
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "Ctrl-C" in line:
                break
        workers = requests.get(f"http://127.0.0.1:{port}/admin/workers", timeout=60).json()
        assert len(workers["workers"]) == 2
        refused = requests.post(
            f"http://127.0.0.1:{port}/v1/completions", json={"model": MODEL, "prompt": "x", "n": 4}, timeout=60
        )
        assert refused.status_code == 400
        assert "at most 3" in refused.json()["error"]["message"]
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    finally:
        demo.kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=5)


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("--smoke", "--no-webui", "--port", str(port)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"error: Port {port} is in use; stop what uses it, or choose another with --port P."
    ]


def test_a_worker_that_cannot_start_is_named() -> None:
    done = subprocess.run(
        command("--smoke", "--no-webui", "--port", str(free_port()), "--worker-args", "--no-such-flag"),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "worker-0 ended" in done.stderr
    assert "--no-such-flag" in done.stderr
    assert "Stopped." in done.stdout
