from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.__main__ import main
from registry.catalog import Catalog
from registry.names import ModelName

ROOT = Path(__file__).parents[2]


class CommandLine:
    """Runs `python -m registry` in process, with directories of its own."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = directory / "state"
        self._environment = {"XDG_STATE_HOME": str(self.state), "XDG_CACHE_HOME": str(directory / "cache")}
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert status == 0, err
        return out

    def refused(self, *arguments: str) -> str:
        """The one line on stderr of a command that must fail."""
        status, out, err = self.run(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        return err

    def run(self, *arguments: str) -> tuple[int, str, str]:
        status = main(arguments, self._environment)
        out, err = self._capsys.readouterr()
        return status, out, err


@pytest.fixture
def registry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"a": np.arange(4, dtype=np.float32)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


def test_list_before_there_is_a_catalog_creates_none(registry: CommandLine) -> None:
    out = registry("list")
    assert "Catalog: empty" in out
    assert "smollm2-135m-instruct" in out
    assert ["mamba", "refused"] in [line.split()[:2] for line in out.splitlines()]
    assert ["chatglm3-6b", "chatglm", "refused"] in [line.split()[:3] for line in out.splitlines()]
    assert not registry.state.exists()


def test_add_show_list_verify(registry: CommandLine, checkpoint: Path) -> None:
    added = registry("add", "org/tiny", str(checkpoint), "--chat-template", "chatml", "--max-model-len", "512")
    assert added.startswith("added org/tiny: llama, sha256:")
    listing = json.loads(registry("list", "--json"))
    (model,) = listing["models"]
    assert (model["name"], model["path"], model["max_model_len"]) == ("org/tiny", str(checkpoint), 512)
    assert {"known_models", "families", "aliases"} <= listing.keys()
    assert "org/tiny" in registry("list")
    shown = json.loads(registry("show", "org/tiny", "--json"))
    assert shown["model"]["chat_template"] == "chatml"
    assert shown["family"]["name"] == "llama"
    for target in ("org/tiny", str(checkpoint)):
        report = json.loads(registry("verify", target, "--full", "--json"))
        assert report["digest"] == report["expected_digest"] == model["digest"]
        assert (report["num_tensors"], report["format"]) == (1, "safetensors")
    with Catalog.open(f"sqlite:///{registry.state}/rootgraft/catalog.sqlite3") as catalog:
        assert catalog.audit_entries()[0].actor.startswith("cli:")


def test_aliases_are_shown_and_followed(registry: CommandLine, checkpoint: Path) -> None:
    registry("add", "tiny", str(checkpoint))
    with Catalog.open(f"sqlite:///{registry.state}/rootgraft/catalog.sqlite3") as catalog:
        catalog.set_alias("tiny", "prod", ModelName("tiny"), actor="test")
    assert "tiny@prod" in registry("list")
    assert "name: tiny" in registry("show", "tiny@prod")


def test_verify_full_notices_a_changed_value(registry: CommandLine, checkpoint: Path) -> None:
    registry("add", "tiny", str(checkpoint))
    save_file({"a": np.arange(1, 5, dtype=np.float32)}, checkpoint / "model.safetensors")
    registry("verify", "tiny")
    status, _, err = registry.run("verify", "tiny", "--full")
    assert status == 1
    assert "is recorded: it was changed or damaged" in err


def test_verify_says_what_it_found(registry: CommandLine, checkpoint: Path) -> None:
    assert "verdict: headers and sizes are right" in registry("verify", str(checkpoint))
    assert "no digest is recorded" in registry("verify", str(checkpoint), "--full")
    registry("add", "tiny", str(checkpoint))
    assert "verdict: every byte was read, and the digest is the recorded one" in registry("verify", "tiny", "--full")


def test_verify_a_model_that_only_a_worker_told_of(registry: CommandLine) -> None:
    registry.state.joinpath("rootgraft").mkdir(parents=True)
    with Catalog.open(f"sqlite:///{registry.state}/rootgraft/catalog.sqlite3") as catalog:
        for name in ("elsewhere", "smollm2-135m-instruct"):
            catalog.upsert_model(name, family="llama", digest="sha256:" + "0" * 64, path="", actor="test")
    assert "where its files are is not recorded here" in registry.refused("verify", "elsewhere")
    assert "run `python -m registry fetch" in registry.refused("verify", "smollm2-135m-instruct")


def test_verify_a_path_that_is_in_no_catalog(registry: CommandLine, checkpoint: Path) -> None:
    out = registry("verify", str(checkpoint))
    assert "family: llama" in out
    assert "expected_digest" not in out


def test_show_families_and_known_models(registry: CommandLine) -> None:
    assert "refused: it keeps a recurrent" in registry("show", "mamba")
    assert "chat_template: vicuna-v1.1" in registry("show", "vicuna-7b")


def test_each_failure_is_one_line(registry: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    assert "nothing is called 'nope'" in registry.refused("show", "nope")
    assert "is no path, and no model" in registry.refused("verify", "nope")
    assert "run `python -m registry fetch smollm2" in registry.refused("verify", "smollm2-135m-instruct")
    assert "'nope' is not a known model" in registry.refused("fetch", "nope")
    assert "cannot be fetched by name" in registry.refused("fetch", "vicuna-7b")
    assert "does not exist" in registry.refused("add", "x", str(tmp_path / "none"))
    assert "invalid model name" in registry.refused("add", "../x", str(checkpoint))
    assert "an alias or digest of it comes afterwards" in registry.refused("add", "x@prod", str(checkpoint))
    assert "cannot live in mysql" in registry.refused("list", "--database", "mysql://h/n")
    (checkpoint / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba models are not served" in registry.refused("add", "x", str(checkpoint))
    (checkpoint / "config.json").write_text('{"model_type": "brand_new"}')
    assert "'brand_new' is unknown" in registry.refused("verify", str(checkpoint))
    assert "Catalog: empty" in registry("list")


@pytest.mark.parametrize(
    "arguments", [[], ["frob"], ["show"], ["add", "x", "y", "--max-model-len", "0"], ["list", "-x"]]
)
def test_wrong_usage_exits_with_2(registry: CommandLine, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        registry.run(*arguments)
    assert caught.value.code == 2


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = f"{sys.executable} -m registry list --json --database sqlite:///{tmp_path}/none | head -c 10"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_package_loads_no_torch() -> None:
    modules = "registry.__main__, registry.checkpoint, registry.store, registry.fetch"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
