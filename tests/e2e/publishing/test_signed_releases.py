"""A worker that serves signed fine-tunes only, of a tiny base; and a full fine-tune published in one command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from tests.delta.tiny_llama import save_tiny_llama
from tests.e2e.processes import Process, wait_until
from tests.e2e.publishing.fleet import WAIT_S, Fleet
from tests.e2e.small_disk import SmallDisk
from tests.fakes.signing_keys import KeyPair, write_key_pair

pytestmark = pytest.mark.e2e

SIGNATURE_FILE = "model.sig"


@dataclass(frozen=True, slots=True)
class Tiny:
    """A base with its worker, a full fine-tune of it, and the key that the worker trusts."""

    fleet: Fleet
    base: Path
    fine_tune: Path
    keys: KeyPair
    logs: Path

    def publisher(self, name: str, *arguments: object) -> Process:
        return Process(
            self.logs / f"{name}.log", "delta", "publish", "--name", name, "--url", self.fleet.cluster.url,
            *map(str, arguments),
        )  # fmt: skip

    def version(self, name: str) -> dict[str, Any]:
        reply = requests.get(f"{self.fleet.cluster.url}/admin/releases/{name}", timeout=60)
        (version,) = reply.json()["versions"]
        return dict(version)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> Iterator[Tiny]:
    root = tmp_path_factory.mktemp("tiny")
    base = save_tiny_llama(root / "base", seed=0)
    fine_tune = Path(shutil.copytree(base, root / "fine-tune"))
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    changed = {name: weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim == 2
               else weight for name, weight in weights.items()}  # fmt: skip
    save_file(changed, fine_tune / "model.safetensors", metadata={"format": "pt"})
    keys = write_key_pair(root, "operator")
    flags = ("--signatures", "require", "--signature-key", str(keys.public))
    worker = fleet.cluster.start_worker(
        "--model-path", str(base), "--model-name", "tiny", *flags, wait=False, cache=root / "cache", number=2
    )
    fleet.cluster.wait_for_workers(3)
    try:
        yield Tiny(fleet, base, fine_tune, keys, root)
    finally:
        worker.kill()
        fleet.cluster.workers.remove(worker)
        wait_until(lambda: fleet.cluster.num_workers() == 2, WAIT_S, "the worker gone")


@pytest.fixture(scope="module")
def signed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The delta of the fine-tune, published under the name `signed` with one command; its disk was full at first."""
    with SmallDisk(tmp_path_factory.mktemp("out")) as disk:
        out = disk.path / "tiny.delta"
        command = (
            "signed", "--base", tiny.base, "--target", tiny.fine_tune, "--out", out, "--sign-key", tiny.keys.private,
        )  # fmt: skip
        if disk.is_mounted:
            disk.leave(16 << 10)
            status, text = tiny.publisher(*command).wait()
            assert status == 1, text
            assert f"no space left on the disk of {disk.path}" in text
            assert "free some and try again" in text
            assert not list(disk.path.iterdir())
            disk.grow()
        status, text = tiny.publisher(*command).wait()
        assert status == 0, text
        return Path(shutil.copytree(out, tmp_path_factory.mktemp("kept") / "tiny.delta"))


def test_what_is_signed_is_served(tiny: Tiny, signed: Path) -> None:
    assert (signed / SIGNATURE_FILE).is_file()
    assert tiny.version("signed")["state"] == "ready"
    body = {"model": "signed", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    reply = requests.post(f"{tiny.fleet.cluster.url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    digest = tiny.version("signed")["digest"].removeprefix("sha256:")
    assert reply.json()["system_fingerprint"] == f"fp_{digest[:12]}"


def test_what_is_not_signed_or_by_somebody_else_fails(tiny: Tiny, signed: Path, tmp_path: Path) -> None:
    unsigned = Path(shutil.copytree(signed, tmp_path / "unsigned"))
    (unsigned / SIGNATURE_FILE).unlink()
    status, text = tiny.publisher("unsigned", "--delta", unsigned).wait()
    assert status == 1
    assert "cannot be served" in text
    stranger = write_key_pair(tmp_path, "stranger")
    status, text = tiny.publisher("strange", "--delta", unsigned, "--sign-key", stranger.private).wait()
    assert status == 1
    for name in ("unsigned", "strange"):
        assert tiny.version(name)["state"] == "failed"
        assert "(signature_invalid)" in tiny.version(name)["error"]
