"""A staged directory is there completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from registry.companion_files import companion_files
from registry.errors import CheckpointError, InternalError
from registry.staged_directory import resumable_directory, staged_directory


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_directory(target) as staging:
        assert staging.parent == tmp_path
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "file").write_text("x")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(InternalError, match="no space left"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(CheckpointError, match="exists already"), staged_directory(tmp_path / name):
            pass
    with pytest.raises(CheckpointError, match="create it first"), staged_directory(tmp_path / "no" / "out"):
        pass


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists already"), staged_directory(target):
        target.mkdir()
    assert list(tmp_path.iterdir()) == [target]


def test_companion_files_are_neither_weights_nor_code(tmp_path: Path) -> None:
    for name in ("config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"):
        (tmp_path / name).write_text("")
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling.py", "README.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "onnx.json").mkdir()
    assert sorted(companion_files(tmp_path)) == ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.model"]


def test_a_directory_that_holds_such_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"), staged_directory(target, replaces=["new"]):
        pass
    with pytest.raises(KeyboardInterrupt), staged_directory(target, replaces=["old"]):
        raise KeyboardInterrupt
    assert [file.name for file in target.iterdir()] == ["old"]
    with staged_directory(target, replaces=["old"]) as staging:
        (staging / "new").write_text("y")
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_two_renames_where_the_system_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    test_a_directory_that_holds_such_a_file_is_replaced(tmp_path)


def test_scratch_is_kept_when_interrupted(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def start() -> None:
        with resumable_directory(target) as directory:
            (directory.scratch / "work").write_text("half")
            (directory.result / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start()
    assert not target.exists()
    with resumable_directory(target) as directory:
        assert (directory.scratch / "work").read_text() == "half"
        assert not list(directory.result.iterdir())
        (directory.result / "file").write_text("whole")
        with pytest.raises(CheckpointError, match="another program"), resumable_directory(target):
            pass
    assert (target / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_scratch_goes_when_the_work_fails(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with resumable_directory(tmp_path / "out") as directory:
            (directory.scratch / "work").write_text("half")
            raise error

    with pytest.raises(CheckpointError, match="damaged"):
        fail(CheckpointError("damaged"))
    with pytest.raises(InternalError, match="no space left"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    assert not list(tmp_path.iterdir())
