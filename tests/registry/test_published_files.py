from __future__ import annotations

import pytest

from registry.errors import InvalidRequestError
from registry.published_files import PublishedFiles

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def test_a_delta_is_its_description() -> None:
    files = PublishedFiles({"delta_config.json": A, "delta.safetensors": B})
    assert (files.kind, files.artifact_digest) == ("delta", A)
    assert files.manifest_digest != PublishedFiles({"delta_config.json": A, "delta.sig": B}).manifest_digest


def test_an_adapter_is_all_of_its_files_in_any_order() -> None:
    files = PublishedFiles({"adapter_config.json": A, "adapter_model.safetensors": B})
    again = PublishedFiles({"adapter_model.safetensors": B, "adapter_config.json": A})
    assert (files.kind, files.artifact_digest) == ("lora", again.manifest_digest)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a//b", ".hidden", "a/.b", "", "a/", "a\\b", "a/b/c/d/e", "a\0", "x" * 201, "ä"]
)
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be a published file"):
        PublishedFiles({"adapter_config.json": A, name: B})


def test_what_is_no_fine_tune_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no fine-tune"):
        PublishedFiles({"model.safetensors": A})
    with pytest.raises(InvalidRequestError, match="no digest"):
        PublishedFiles({"adapter_config.json": "sha256:1"})
    with pytest.raises(InvalidRequestError, match="at most 256 files"):
        PublishedFiles({f"f{i}": A for i in range(257)})
