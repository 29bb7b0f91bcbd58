"""The command line, as processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from controller.__main__ import main
from controller.config import ControllerConfig, LimitsConfig, WorkerConfig
from registry.catalog import Catalog
from registry.errors import InvalidRequestError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'catalog.sqlite3'}"


def start(*args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "controller", *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listening_url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (\S+)", line):
            return found[1]
    raise AssertionError("the controller ended without listening")


def test_keys_are_made_listed_and_revoked(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--name", "ann", "--database", database]) == 0
    secret = capsys.readouterr().out.strip()
    assert main(["--database", database, "keys", "create", "--name", "op", "--admin"]) == 0
    capsys.readouterr()
    with Catalog.open(database) as catalog:
        key = catalog.find_api_key(secret)
        assert key is not None
        assert (key.name, key.role) == ("ann", "user")
        assert main(["keys", "revoke", key.id, "--database", database]) == 0
        assert catalog.find_api_key(secret) is None
    assert main(["keys", "list", "--database", database]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"user +revoked .* ann$", first)
    assert re.search(r"admin +active .* op$", second)
    assert secret not in first


def test_variants_are_added_listed_pinned_and_removed(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--database", database]
    with Catalog.open(database) as catalog:
        catalog.upsert_model("base", family="llama", digest=f"sha256:{'1' * 64}", path="/m", actor="test")
    add = ["variants", "add", "team/sql", "--parent", "base", "--path"]
    assert main([*add, "sql", "--pin", *where]) == 0
    assert main([*add, "sql-2", *where]) == 1
    assert "there is a variant team/sql already" in capsys.readouterr().err
    assert main([*add, "sql-2", "--replace", *where]) == 0
    assert main(["variants", "list", *where]) == 0
    assert capsys.readouterr().out.split() == ["team/sql", "base", "-", "not", "read", "yet", "sql-2"]
    for verb, pinned in (("pin", True), ("unpin", False)):
        assert main(["variants", verb, "team/sql", *where]) == 0
        with Catalog.open(database) as catalog:
            assert catalog.get_variant("team/sql").pinned is pinned
            assert catalog.audit_entries(limit=1)[0].actor.startswith("cli:")
    assert main(["variants", "remove", "team/sql", *where]) == 0
    with Catalog.open(database) as catalog:
        assert catalog.list_variants() == []


@pytest.mark.parametrize(
    "args",
    [
        ["keys", "revoke", "key_nope"],
        ["variants", "add", "a", "--parent", "none", "--path", "a"],
        ["variants", "pin", "none"],
        ["variants", "remove", "none"],
        ["keys", "create", "--name", ""],
        ["--trusted-workers", "nonsense", "--port", "0"],
        ["--missed-heartbeats", "0"],
        ["--host", "192.0.2.1", "--port", "0"],
        ["--port", "70000"],
        ["--canary-error-margin", "7"],
        ["--worker-timeout", "inf"],
        ["--store", "/dev/null/store"],
        ["releases", "history", "nothing"],
    ],
)
def test_mistakes_get_one_line(args: list[str], database: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--database", database, *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("controller: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [["--help"], ["keys", "--help"], ["keys", "create", "--help"], ["variants", "add", "--help"]]
)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    if argv == ["--help"]:
        for name in ("--routing", "--auth", "--worker-token", "--trusted-workers", "--worker-timeout", "keys"):
            assert name in text


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--work", "x"])
    assert caught.value.code == 2


@pytest.mark.parametrize("part", [WorkerConfig(max_attempts=0), LimitsConfig(max_body_bytes=-1)])
def test_numbers_that_make_no_sense(part: object) -> None:
    with pytest.raises(InvalidRequestError, match="must be positive"):
        ControllerConfig(**{"workers" if isinstance(part, WorkerConfig) else "limits": part})  # type: ignore[arg-type]


def test_a_port_in_use_is_one_line(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process = start("--port", port, "--database", database)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.strip().count("\n") == 0
    assert port in error
    assert "in use" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_then_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    process = start("--port", "0", XDG_STATE_HOME=str(tmp_path), ROOTGRAFT_WORKER_TOKEN="t")
    try:
        url = listening_url(process)
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            assert response.status == 200
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert "Traceback" not in error
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "rootgraft" / "catalog.sqlite3").exists()


def test_kill_9_loses_nothing_of_the_catalog(database: str) -> None:
    process = start("--port", "0", "--database", database)
    try:
        listening_url(process)
        with Catalog.open(database) as catalog:
            _, secret = catalog.create_api_key("ann", role="user", actor="cli:me")
    finally:
        process.kill()
        process.communicate()
    with Catalog.open(database) as catalog:
        assert catalog.find_api_key(secret) is not None
