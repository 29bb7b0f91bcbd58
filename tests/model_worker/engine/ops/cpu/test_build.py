"""Building the kernels: what is in the cache is right and whole, and every way to fail says what to do."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_worker.engine.ops.cpu import build
from model_worker.engine.ops.cpu.__main__ import main
from model_worker.engine.ops.cpu.build import build_library, cached_library, find_compiler, start_background_build
from model_worker.engine.ops.cpu.machine_level import PORTABLE, X86_LEVELS, machine_levels
from model_worker.engine.ops.cpu.program import KernelLibrary, Program, Step, Team
from registry.errors import InternalError


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler of our own in place of the system's: a shell script that says "compiled" at once.

    It notes its arguments in calls.txt.
    """
    script = tmp_path / "bin" / "c++"
    script.parent.mkdir()
    _write_compiler(script, 'while [ "$1" != -o ]; do shift; done; echo compiled > "$2"')
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script


def _write_compiler(script: Path, body: str) -> None:
    script.write_text(f'#!/bin/sh\necho "$@" >> {script.parent}/calls.txt\n{body}\n')
    script.chmod(0o755)


def _calls(compiler: Path) -> list[str]:
    calls = compiler.parent / "calls.txt"
    return calls.read_text().splitlines() if calls.exists() else []


def _files(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in (cache_dir / "kernels").iterdir())


def test_the_real_compiler_makes_a_library_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the team alone, which takes a second."""
    if find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    shutil.copytree(build._OPS / "cpu", tmp_path / "ops" / "cpu")
    monkeypatch.setattr(build, "_OPS", tmp_path / "ops")
    path = build_library(PORTABLE, tmp_path)
    assert cached_library(PORTABLE, tmp_path) == path
    assert _files(tmp_path) == [path.name]
    Program(Team(KernelLibrary(path, PORTABLE), 2), []).run(Step.of_rows(0))


def test_a_library_is_built_once(compiler: Path, tmp_path: Path) -> None:
    assert cached_library(PORTABLE, tmp_path) is None
    path = build_library(PORTABLE, tmp_path)
    assert build_library(PORTABLE, tmp_path) == path == cached_library(PORTABLE, tmp_path)
    assert len(_calls(compiler)) == 1
    assert path.read_text() == "compiled\n"


def test_levels_do_not_share_a_library(compiler: Path, tmp_path: Path) -> None:
    paths = {build_library(level, tmp_path) for level in (*X86_LEVELS, PORTABLE)}
    assert len(paths) == len(X86_LEVELS) + 1
    for level, call in zip(X86_LEVELS, _calls(compiler), strict=False):
        assert set(level.compiler_flags) <= set(call.split())


def test_flags_leave_results_as_they_are(compiler: Path, tmp_path: Path) -> None:
    for level in (*X86_LEVELS, PORTABLE):
        build_library(level, tmp_path)
    assert not any("-march=native" in call or "fast-math" in call for call in _calls(compiler))


def test_changed_sources_are_built_anew(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_library(PORTABLE, tmp_path)
    ops = tmp_path / "ops"
    (ops / "cpu").mkdir(parents=True)
    (ops / "cpu" / "team.cpp").write_text("int x;")
    monkeypatch.setattr(build, "_OPS", ops)
    assert cached_library(PORTABLE, tmp_path) is None
    second = build_library(PORTABLE, tmp_path)
    (ops / "cpu" / "team.h").write_text("")
    third = build_library(PORTABLE, tmp_path)
    assert len({first, second, third}) == 3


def test_sources_that_change_during_the_build_are_an_error(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "ops" / "cpu" / "team.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int x;")
    monkeypatch.setattr(build, "_OPS", tmp_path / "ops")
    _write_compiler(compiler, f'while [ "$1" != -o ]; do shift; done; echo compiled > "$2"; echo >> {source}')
    with pytest.raises(InternalError, match="changed while they were compiled"):
        build_library(PORTABLE, tmp_path)
    assert _files(tmp_path) == []


def test_a_library_serves_where_there_is_no_compiler(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_library(PORTABLE, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    assert cached_library(PORTABLE, tmp_path) == build_library(PORTABLE, tmp_path) == path


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cached_library(PORTABLE, tmp_path) is None
    with pytest.raises(InternalError, match=r"no C\+\+ compiler.*install one, such as g\+\+"):
        build_library(PORTABLE, tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(compiler: Path, tmp_path: Path) -> None:
    _write_compiler(
        compiler,
        'while [ "$1" != -o ]; do shift; done; echo half > "$2"; printf "in x\\nx:7: error: bad\\n" >&2; exit 3',
    )
    with pytest.raises(InternalError) as caught:
        build_library(PORTABLE, tmp_path)
    why, command, *output = str(caught.value).splitlines()
    assert why == "Building the CPU kernels failed: x:7: error: bad"
    assert command.startswith(f"{compiler} ")
    assert "team.cpp" in command
    assert output == ["in x", "x:7: error: bad"]
    assert _files(tmp_path) == []
    assert cached_library(PORTABLE, tmp_path) is None


def test_a_cache_that_cannot_be_written(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(InternalError, match="XDG_CACHE_HOME"):
        build_library(PORTABLE, tmp_path / "cache")
    assert cached_library(PORTABLE, tmp_path / "cache") is None


@pytest.mark.parametrize("damaged", [b"", b"compi", b"compiled\n\0"])
def test_a_damaged_library_is_built_again(
    compiler: Path, tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = build_library(PORTABLE, tmp_path)
    path.write_bytes(damaged)
    assert cached_library(PORTABLE, tmp_path) is None
    assert "damaged" in caplog.text
    assert build_library(PORTABLE, tmp_path).read_text() == "compiled\n"


def test_a_library_that_vanishes_while_it_is_looked_at_is_built_again(compiler: Path, tmp_path: Path) -> None:
    """Another process removes what it takes for old."""
    path = build_library(PORTABLE, tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")  # listed, but not there to be read
    assert cached_library(PORTABLE, tmp_path) is None
    assert build_library(PORTABLE, tmp_path).read_text() == "compiled\n"


def test_builds_at_the_same_time_do_each_other_no_harm(compiler: Path, tmp_path: Path) -> None:
    _write_compiler(compiler, 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; sleep 0.2; echo compiled > "$2"')
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build_library(PORTABLE, tmp_path), range(4)))
    assert len(set(paths)) == 1
    assert _files(tmp_path) == [paths[0].name]
    assert paths[0].read_text() == "compiled\n"


def test_only_the_newest_libraries_of_a_level_are_kept(compiler: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    (kernels / ".building-abandoned").mkdir(parents=True)
    os.utime(kernels / ".building-abandoned", (0, 0))
    (kernels / ".building-under-way").mkdir()
    for age in range(1, 6):
        old = kernels / f"portable-{age:016d}-{age:016d}.so"
        old.write_text("old")
        os.utime(old, (time.time() - age, time.time() - age))
    other = build_library(X86_LEVELS[0], tmp_path)
    path = build_library(PORTABLE, tmp_path)
    kept = [f"portable-{age:016d}-{age:016d}.so" for age in (1, 2)]
    assert _files(tmp_path) == sorted([".building-under-way", other.name, path.name, *kept])


def test_a_build_in_the_background_says_how_it_ended(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start_background_build(PORTABLE, tmp_path).join()
    assert cached_library(PORTABLE, tmp_path) is not None
    assert "restart the worker to use them" in caplog.text


def test_a_build_that_fails_in_the_background_says_why(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_compiler(compiler, "exit 4")
    start_background_build(PORTABLE, tmp_path).join()
    assert "slower route" in caplog.text
    assert "ended with status 4" in caplog.text


def _run(argv: Sequence[str], cache_home: Path) -> int:
    return main(argv, {"XDG_CACHE_HOME": str(cache_home)})


def test_command_line(compiler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = machine_levels()[0]
    assert _run([], tmp_path) == 0
    path = cached_library(best, tmp_path / "rootgraft")
    what, where = capsys.readouterr().out.splitlines()
    assert what.startswith(f"{best.name}, ")
    assert where == str(path)
    assert _run(["--level", "portable"], tmp_path) == 0
    assert capsys.readouterr().out.startswith("portable, ")
    assert _run(["--list"], tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [best.name, str(path)]


def test_command_line_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _run([], tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: There is no C++ compiler")
