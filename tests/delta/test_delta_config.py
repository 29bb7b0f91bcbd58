"""delta_config.json is read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delta.artifact import open_delta
from delta.delta_config import delta_digest, read_delta_config
from registry.errors import CheckpointError

Document = dict[str, Any]
_NO_DIGEST = "0" * 64


def _edit(delta: Path, change: Callable[[Document], Any]) -> None:
    file = delta / "delta_config.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _term(document: Document, name: str = "up") -> Document:
    term: Document = document["tensors"][name]["terms"][0]
    return term


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format="other"), "not the description of a delta"),
        (lambda config: config.update(format_version=1), "version 1.*Make the delta again"),
        (lambda config: config.update(codec_of_the_future=1), "unknown fields"),
        (lambda config: config.pop("tied"), "lacks the fields"),
        (lambda config: _term(config).update(codec="zip"), "'zip' is unknown"),
        (lambda config: config["tensors"].update(nowhere=config["tensors"]["up"]), "result_digest"),
        (lambda config: config["tensors"]["up"].update(base="nowhere"), "does not belong to 'nowhere'"),
        (lambda config: config["tensors"]["up"].update(base="down"), "does not belong to 'down'"),
        (lambda config: config["tensors"]["up"].update(digest=_NO_DIGEST), "result_digest"),
        (lambda config: config["tensors"]["up"].update(error=float("nan")), "no finite number"),
        (lambda config: config["tensors"]["up"].update(error=True), "no float"),
        (lambda config: config["tensors"]["up"].update(shape=[-1, 8]), "no tensor of dtype"),
        (lambda config: config["tensors"]["up"].update(shape=["8"]), "no int"),
        (lambda config: config["tensors"]["up"]["terms"].append(_term(config)), "cannot follow"),
        (lambda config: config["tensors"]["up"].update(dtype="F7"), "no tensor of dtype"),
        (lambda config: config["tensors"].pop("up"), "result_digest"),
        (lambda config: config["base"]["tensors"].update(up=_NO_DIGEST), "base.digest"),
        (lambda config: config["files"].update({"../../evil.json": _NO_DIGEST}), "no name of"),
        (lambda config: config["files"].update({"model.safetensors": _NO_DIGEST}), "no name of"),
        (lambda config: config["files"].update({"model.safetensors.index.json": _NO_DIGEST}), "no name of"),
        (lambda config: config["files"].update({"a.json": "x" * 64}), "no SHA-256"),
        (lambda config: config["tied"].update(head="nowhere"), "no copy of"),
        (lambda config: config["tied"].update(up="embed"), "no copy of"),
        (lambda config: config["dropped"].update(embed="up"), "no copy of"),
        (lambda config: config.update(base={}), "lacks the fields"),
        (lambda config: config.update(tensors=[]), "no object"),
        (lambda config: config.update(lineage=None), "no object"),
    ],
)
def test_damaged_or_foreign_descriptions_are_refused(
    delta: Path, change: Callable[[Document], Any], message: str
) -> None:
    _edit(delta, change)
    with pytest.raises(CheckpointError, match=message):
        read_delta_config(delta)


@pytest.mark.parametrize("content", ["", "[]", "{", "\ud800", "[" * 100_000, '"rootgraft-delta"'])
def test_what_is_no_json_object(delta: Path, content: str) -> None:
    (delta / "delta_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        read_delta_config(delta)


def test_what_is_no_delta(tmp_path: Path, delta: Path) -> None:
    with pytest.raises(CheckpointError, match="is no delta"):
        read_delta_config(tmp_path)
    (delta / "delta.safetensors").unlink()
    with pytest.raises(CheckpointError), open_delta(delta):
        pass


def test_the_stored_tensors_must_be_those_described(delta: Path) -> None:
    def rename_part(config: Document) -> None:
        parts = _term(config)["parts"]
        parts["other"] = parts.pop("frame")

    _edit(delta, rename_part)
    with pytest.raises(CheckpointError, match="does not hold the tensors"), open_delta(delta):
        pass


def test_the_digest_is_that_of_the_description(delta: Path) -> None:
    before = delta_digest(delta)
    assert before.startswith("sha256:")
    _edit(delta, lambda config: config.update(license="mit"))
    assert delta_digest(delta) != before
