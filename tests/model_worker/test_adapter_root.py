from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.adapter_root import AdapterRoot
from registry.errors import CheckpointError, ClientError, InvalidRequestError, PermissionDeniedError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the adapter team/pirate, beside a directory that is none of its business."""
    for name in ("root/team/pirate", "outside/secret"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
    return tmp_path / "root"


def test_relative_and_absolute_paths_below_the_root(root: Path) -> None:
    expected = root.resolve() / "team" / "pirate"
    for path in ("team/pirate", "team/../team/./pirate", "team//pirate/", str(root / "team/pirate")):
        assert AdapterRoot(root).find(path) == expected


@pytest.mark.parametrize("path", ["../outside/secret", "team/../../outside/secret", "/", "..", "/etc"])
def test_what_is_not_below_the_root_is_refused(root: Path, path: str) -> None:
    with pytest.raises(PermissionDeniedError, match="--adapter-root") as caught:
        AdapterRoot(root).find(path)
    assert caught.value.status == 403
    assert caught.value.param == "path"


def test_a_sibling_whose_name_begins_like_the_root_is_outside(root: Path) -> None:
    sibling = root.parent / "root-2"
    sibling.mkdir()
    with pytest.raises(PermissionDeniedError):
        AdapterRoot(root).find(str(sibling))


def test_links_may_lead_to_somewhere_below_the_root_only(root: Path) -> None:
    (root / "inside").symlink_to(root / "team" / "pirate")
    (root / "out").symlink_to(root.parent / "outside")
    assert AdapterRoot(root).find("inside") == root.resolve() / "team" / "pirate"
    for path in ("out", "out/secret"):
        with pytest.raises(PermissionDeniedError):
            AdapterRoot(root).find(path)


def test_a_file_that_is_a_link_to_the_outside_is_refused_by_name(root: Path) -> None:
    (root / "team/pirate/adapter_model.safetensors").symlink_to(root.parent / "outside/secret/adapter_config.json")
    with pytest.raises(PermissionDeniedError, match=r"pirate/adapter_model\.safetensors"):
        AdapterRoot(root).find("team/pirate")


def test_a_root_that_is_itself_behind_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert AdapterRoot(link).find(str(link / "team/pirate")) == root.resolve() / "team" / "pirate"


def test_paths_that_no_file_system_has(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    for path in ("a\0b", "x" * 5000, "loop"):
        with pytest.raises(ClientError):
            AdapterRoot(root).find(path)
    with pytest.raises(InvalidRequestError):
        AdapterRoot(root).find("a\0b")


def test_no_such_directory(root: Path) -> None:
    for path in ("team/parrot", "team/pirate/adapter_config.json"):
        with pytest.raises(CheckpointError, match=path):
            AdapterRoot(root).find(path)


def test_without_a_root_nothing_is_read_and_the_remedy_is_named(root: Path) -> None:
    with pytest.raises(PermissionDeniedError, match=r"--adapter-root DIR.*--lora NAME=PATH"):
        AdapterRoot(None).find(str(root / "team/pirate"))
