from __future__ import annotations

from pathlib import Path

import pytest

from model_worker import model_source
from model_worker.__main__ import main
from model_worker.model_source import find_model
from model_worker.worker import bind
from registry.errors import CheckpointError, InvalidRequestError


def one_line_error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["--no-controller", "--port", "0", *flags], {"HOME": "/nowhere"}) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_model_that_is_not_there_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert "registry list" in one_line_error(capsys, "--model-path", "no-such-model")


def test_a_directory_that_is_no_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert str(tmp_path) in one_line_error(capsys, "--model-path", str(tmp_path))


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert port in one_line_error(capsys, "--model-path", str(tmp_path), "--port", port)


def test_a_token_that_no_header_can_hold_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", "m"], {"ROOTGRAFT_WORKER_TOKEN": "a\nb"}) == 1
    assert capsys.readouterr().err.count("\n") == 1


def find(model: str, name: str | None = None, *, has_deltas: bool = False) -> tuple[Path, str]:
    source = find_model(model, name=name, cache_dir=Path("/nowhere"), report=print, has_deltas=has_deltas)
    return source.path, source.name


def test_the_name_is_that_of_the_directory_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "Tiny-1.5"
    directory.mkdir()
    gguf = tmp_path / "tiny-q4.gguf"
    gguf.touch()
    assert find(str(directory)) == (directory, "Tiny-1.5")
    assert find(str(gguf)) == (gguf, "tiny-q4")
    assert find(str(gguf), "org/other") == (gguf, "org/other")
    monkeypatch.chdir(directory)
    assert find(".") == (Path("."), "Tiny-1.5")


def test_names_that_do_not_fit_the_grammar_are_refused(tmp_path: Path) -> None:
    odd = tmp_path / "a b"
    odd.mkdir()
    with pytest.raises(InvalidRequestError, match="--model-name"):
        find(str(odd))
    for name in ("x y", "x@v1", "x@prod", ""):
        with pytest.raises(InvalidRequestError):
            find(str(odd), name)


def test_a_known_model_is_fetched_and_for_deltas_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = "smollm2-135m-instruct"
    converted: list[Path] = []

    def fetch(name: str, cache_dir: Path, *, report: object) -> Path:
        assert (name, cache_dir) == (known, Path("/nowhere"))
        tmp_path.joinpath("weights.gguf").touch()
        return tmp_path / "weights.gguf"

    def convert(source: Path, target: Path, *, report: object) -> None:
        converted.append(source)
        target.mkdir()

    monkeypatch.setattr(model_source, "fetch_model", fetch)
    monkeypatch.setattr(model_source, "convert_checkpoint", convert)
    assert find(known) == (tmp_path / "weights.gguf", known)
    assert converted == []
    expected = (tmp_path / f"{known}-safetensors", known)
    assert find(known, has_deltas=True) == expected
    assert find(known, has_deltas=True) == expected
    assert converted == [tmp_path / "weights.gguf"]


def test_two_workers_that_convert_at_once_both_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path, *, report: object) -> None:
        if not tmp_path.joinpath("never").exists():
            target.mkdir()
        raise CheckpointError("exists already")

    tmp_path.joinpath("weights.gguf").touch()
    monkeypatch.setattr(model_source, "fetch_model", lambda name, cache_dir, *, report: tmp_path / "weights.gguf")
    monkeypatch.setattr(model_source, "convert_checkpoint", convert)
    path, _ = find("smollm2-135m-instruct", has_deltas=True)
    assert path.is_dir()
    path.rmdir()
    tmp_path.joinpath("never").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        find("smollm2-135m-instruct", has_deltas=True)


def test_neither_a_path_nor_a_known_model() -> None:
    with pytest.raises(CheckpointError, match="no-such"):
        find("no-such")
