"""The command line of `inspect`, right and wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_worker.__main__ import main
from model_worker.inspection.command import build_parser

ENVIRONMENT = {"HOME": "/nowhere"}


def test_the_footprint_of_a_real_model(smollm2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--section", "footprint", "--format", "json", "--context", "4096,512", "--memory-gib", "8"]
    assert main(["inspect", "--model-path", str(smollm2_dir), *flags], ENVIRONMENT) == 0
    footprint = json.loads(capsys.readouterr().out)["footprint"]
    assert footprint["num_parameters"] == 134_515_008
    assert footprint["weights_bytes"]["bfloat16"] == 269_030_016
    assert footprint["kv_bytes_per_token"]["16 bits"] == 30 * 2 * 3 * 64 * 2
    assert footprint["free_bytes"] == 8 * 2**30
    assert sorted({batch["context"] for batch in footprint["batches"]}) == [512, 4096, 8192]


def test_weights_that_stay_in_the_blocks_of_their_file_are_said_to(
    smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--section", "footprint", "--format", "json", "--quantization", "int4"]
    assert main(["inspect", "--model-path", str(smollm2_gguf), *flags], ENVIRONMENT) == 0
    weights = json.loads(capsys.readouterr().out)["model"]["weights"]
    assert weights == "int4 (Q8_0 dequantized first); Q4_1 as the file has them"


def test_a_file_is_written_whole(smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "model.html"
    flags = ["--section", "footprint", "--format", "html", "--output", str(target)]
    assert main(["inspect", "--model-path", str(smollm2_dir), *flags], ENVIRONMENT) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == ""
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--model-path", "no-such-model"], "registry list"),
        (["--model-path", "no-such-model", "--num-threads", "500000"], "--num-threads"),
        (["--model-path", "{model}", "--section", "footprint", "--context", "9000"], "--context 9000"),
        (["--model-path", "{model}", "--section", "footprint", "--max-model-len", "100000"], "--max-model-len"),
        (["--model-path", "{model}", "--section", "footprint", "--output", "{model}/config.json/x"], "cannot write"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], word: str, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(flag.format(model=smollm2_dir) for flag in flags)], ENVIRONMENT) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model-path", "m", "--section", "everything"],
        ["--model-path", "m", "--format", "pdf"],
        ["--model-path", "m", "--rows", "1,0"],
        ["--model-path", "m", "--context", "many"],
        ["--model-path", "m", "--memory-gib", "-3"],
        ["--model-path", "m", "--memory-gib", "3", "--section", "trace"],
        ["--model-path", "m", "--output", "/"],
        ["--model-path", "m", "--port", "1"],
        ["--model-path", "m", "--profile", "p"],
    ],
)
def test_bad_flags_are_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *flags], ENVIRONMENT)
    assert caught.value.code == 2
    assert "usage: python -m model_worker inspect" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_noticed_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert (
        main(["inspect", "--model-path", "no-such-model", "--output", str(tmp_path / "file" / "x")], ENVIRONMENT) == 1
    )
    assert "cannot write" in capsys.readouterr().err


def test_rows_and_contexts_are_put_in_order() -> None:
    args = build_parser().parse_args(["--model-path", "m", "--rows", "8,1,8", "--context", "512"])
    assert (args.rows, args.context) == ((1, 8), (512,))


def test_a_misspelt_verb_is_a_usage_error_of_the_worker(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspcet", "--model-path", "m"], ENVIRONMENT)
    assert caught.value.code == 2
    assert "inspcet" in capsys.readouterr().err
