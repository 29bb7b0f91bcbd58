from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from hypothesis import example, given, strategies as st

from registry.errors import InvalidRequestError
from registry.names import MAX_NAME_LENGTH, ModelName, is_alias, is_name, parse_name

HEX = "0123456789abcdef" * 4
_segment = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
_name = st.lists(_segment, min_size=1, max_size=4).map("/".join)
_alias = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(
    lambda text: not re.fullmatch("v[0-9]+", text)
)
_digest = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
_model_names = st.one_of(
    st.builds(ModelName, _name),
    st.builds(ModelName, _name, alias=_alias),
    st.builds(ModelName, _name, version=st.integers(1, 10**9 - 1)),
    st.builds(ModelName, _name, digest=_digest),
)


@given(_model_names)
def test_a_model_name_survives_its_text(name: ModelName) -> None:
    assert parse_name(str(name)) == name


@given(st.one_of(st.text(max_size=40), st.text("av0/@.:-_ 1\n", max_size=12)))
@example("a/../b")
@example("a\n")
@example("v1@v1")
def test_any_text_is_refused_or_comes_back_unchanged_and_safe(text: str) -> None:
    try:
        parse_name(text)
    except InvalidRequestError as error:
        message = error.message
    else:
        message = None
    if message is not None:
        assert message.isascii()
        assert message.isprintable()
        return
    name = parse_name(text)
    assert str(name) == text
    assert all(part not in ("", ".", "..") for part in name.name.split("/"))
    assert not PurePosixPath(name.name).is_absolute()
    assert text.isascii()
    assert text.isprintable()
    assert " " not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2-135m-instruct", ModelName("smollm2-135m-instruct")),
        ("org/Name_1.5", ModelName("org/Name_1.5")),
        ("m@prod", ModelName("m", alias="prod")),
        ("m@v12", ModelName("m", version=12)),
        ("m@v1.5", ModelName("m", alias="v1.5")),
        (f"m@sha256:{HEX}", ModelName("m", digest=f"sha256:{HEX}")),
    ],
)
def test_examples(text: str, expected: ModelName) -> None:
    assert parse_name(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@prod", "m@", "m@@x", "m@a@b", "m@v0", "m@v01", "m@v1000000000", "a//b", "/a", "a/", ".", "..",
        "../a", "a/..", "a/.b", "-a", "a b", " a", "a\n", "a\0", "a\\b", "é", "１", "m@sha256:" + HEX[:-1],
        "m@sha256:" + HEX.upper(),
        "m@sha256:" + HEX + "0", "m@md5:00", "a" * (MAX_NAME_LENGTH + 1), "m@" + "a" * 65, "m@v1\n",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="invalid model name"):
        parse_name(text)


def test_longest_accepted() -> None:
    assert is_name("a" * MAX_NAME_LENGTH)
    assert is_alias("a" * 64)


def test_at_most_one_reference() -> None:
    with pytest.raises(InvalidRequestError):
        ModelName("m", alias="prod", version=1)


def test_error_message_is_bounded() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_name(" " * 100_000)
    assert len(caught.value.message) < 300
