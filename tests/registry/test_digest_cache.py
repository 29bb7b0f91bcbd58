from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from registry import digest_cache
from registry.checkpoint import read_checkpoint
from registry.digest import base_digest
from registry.digest_cache import cached_base_digest


def test_a_digest_is_computed_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    save_file({"w": torch.zeros(4)}, model / "model.safetensors")
    first = cached_base_digest(read_checkpoint(model), cache)
    assert first == base_digest(read_checkpoint(model))

    with monkeypatch.context() as patched:
        patched.setattr(digest_cache, "base_digest", lambda checkpoint: pytest.fail("read again"))
        assert cached_base_digest(read_checkpoint(model), cache) == first

    save_file({"w": torch.ones(4)}, model / "model.safetensors")
    stat = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cached_base_digest(read_checkpoint(model), cache) == base_digest(read_checkpoint(model)) != first
