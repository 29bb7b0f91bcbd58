import random

import pytest
import tokenizers
from hypothesis import example, given, settings, strategies as st
from tokenizers import decoders, models

from adapters.tokenizer import Tokenizer, load_tokenizer
from model_worker.engine.detokenizer import IncrementalDetokenizer
from tests.fakes.byte_tokenizer import EOS_TOKEN_ID, ByteTokenizer

BYTES = ByteTokenizer()
WINDOWED = ByteTokenizer()  # as if its text were more than its bytes
WINDOWED.text_is_bytes = False
PIECES = ["▁", "▁hello", "▁world", "lo", "!", "▁▁", "é", "▁日本", "語"]
FIRST_PIECE = 3 + 256
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def sentencepiece_tokenizer(decoder: decoders.Decoder) -> Tokenizer:
    """Ids 0 to 2 are special, then come the 256 bytes, then PIECES."""
    spelled = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocab = {piece: index for index, piece in enumerate(spelled)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoder
    return Tokenizer(backend, bos_token_id=1, eos_token_id=2, pad_token_id=None)


SENTENCEPIECE = [
    sentencepiece_tokenizer(LLAMA_DECODER),
    sentencepiece_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
]


def make(tokenizer=BYTES, prompt=(), *, stop=(), skip=True, include=False, min_tokens=0) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(
        tokenizer,
        prompt,
        skip_special_tokens=skip,
        stop=tuple(stop),
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )


def run(detokenizer: IncrementalDetokenizer, token_ids) -> tuple[list[str], str | None]:
    """The deltas, with what flush gives at the end, and the stop string."""
    deltas = []
    for token_id in token_ids:
        new = detokenizer.append((token_id,))
        deltas.append(new.text)
        if new.stop_string is not None:
            assert detokenizer.flush() == ""
            return deltas, new.stop_string
    return [*deltas, detokenizer.flush()], None


def cut(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Reference: read character by character; the first stop string (or the longest of several) that is complete."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end if include else end - len(string)], string
    return text, None


# Streams of bytes with whole characters of one to four bytes, and with stray bytes between them.
characters = st.sampled_from(["a", "b", " ", "é", "日", "😀", "👨‍👩‍👧", "\ufffd"]).map(str.encode)
stray = st.sampled_from(
    [b"\xff", b"\x80", b"\xe2", b"\xf0\x9f", b"\xed\xa0\x80", b"\xe0\x80", b"\xf4\x90", b"\xc0\xaf"]
)
byte_streams = st.lists(st.one_of(characters, characters, stray), max_size=20).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(
    tokenizer=st.sampled_from([BYTES, WINDOWED]),
    stream=byte_streams,
    prompt=st.sampled_from(["", "a", "prompt 😀", "日"]),
    stop=st.lists(st.sampled_from(["ab", "aba", "b", "a😀", "😀 a", "日", "aab", " a b "]), max_size=3, unique=True),
    include=st.booleans(),
    specials=st.lists(st.integers(0, 60), max_size=3),
    skip=st.booleans(),
)
@example(tokenizer=WINDOWED, stream=b"\xff" * 40, prompt="", stop=[], include=False, specials=[], skip=True)
@example(tokenizer=WINDOWED, stream=b"\xf0" * 40, prompt="a", stop=["b"], include=False, specials=[], skip=True)
def test_byte_level_deltas_are_the_decoded_text_cut_at_the_stop_string(
    tokenizer, stream, prompt, stop, include, specials, skip
):
    token_ids = list(stream)
    for place in specials:
        token_ids.insert(place, EOS_TOKEN_ID)
    prompt_ids = BYTES.encode(prompt)
    deltas, stopped = run(make(tokenizer, prompt_ids, stop=stop, skip=skip, include=include), token_ids)
    whole = BYTES.decode(prompt_ids + token_ids, skip_special_tokens=skip)[len(prompt) :]
    expected, expected_stop = cut(whole, tuple(stop), include)
    assert "".join(deltas) == expected
    assert stopped == expected_stop
    assert not any("\ud800" <= character <= "\udfff" for character in "".join(deltas))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab "), max_size=12),
    stop=st.lists(st.text(st.sampled_from("ab "), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_exactly_what_can_still_become_a_stop_string_is_held_back(text, stop):
    detokenizer = make(stop=stop)
    shown = ""
    for end, character in enumerate(text, start=1):
        new = detokenizer.append(character.encode())
        shown += new.text
        if new.stop_string is not None:
            break
        beginnings = {string[:length] for string in stop for length in range(len(string))}
        held = max((beginning for beginning in beginnings if text[:end].endswith(beginning)), key=len)
        assert shown + held == text[:end]
    assert (shown + detokenizer.flush(), new.stop_string if text else None) == cut(text, tuple(stop), False)


@settings(max_examples=200, deadline=None)
@given(tokenizer=st.sampled_from([BYTES, WINDOWED]), text=st.text(st.sampled_from("ab日😀é"), max_size=15))
def test_no_delta_splits_a_character_and_each_comes_with_its_last_byte(tokenizer, text):
    detokenizer = make(tokenizer)
    for character in text:
        *first, last = character.encode()
        assert detokenizer.append(first).text == ""
        assert detokenizer.append((last,)).text == character
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("tokenizer", [BYTES, WINDOWED])
def test_an_invalid_byte_comes_out_at_once_and_an_incomplete_character_on_flush(tokenizer):
    detokenizer = make(tokenizer)
    assert detokenizer.append((0xFF,)).text == "\ufffd"
    assert [detokenizer.append((byte,)).text for byte in b"\xf0\x9f\x98"] == ["", "", ""]
    assert detokenizer.append((ord("x"),)).text == "\ufffdx"
    assert detokenizer.append((0xE2,)).text == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("tokenizer", [BYTES, WINDOWED])
def test_a_character_that_the_prompt_began_is_released_when_it_is_complete(tokenizer):
    prompt = [*b"hi ", 0xF0, 0x9F]
    assert "".join(run(make(tokenizer, prompt=prompt), [0x98, 0x80, ord("!")])[0]) == "😀!"


@settings(max_examples=400, deadline=None)
@given(
    tokenizer=st.sampled_from(SENTENCEPIECE),
    prompt=st.lists(st.sampled_from([1, *range(FIRST_PIECE, FIRST_PIECE + len(PIECES))]), max_size=4),
    output=st.lists(
        st.one_of(
            st.integers(FIRST_PIECE, FIRST_PIECE + len(PIECES) - 1).map(lambda piece: [piece]),
            st.sampled_from("é日😀").map(lambda character: [3 + byte for byte in character.encode()]),
            st.just([2]),
            st.just([5000]),  # a padding row of the embedding
        ),
        max_size=12,
    ).map(lambda groups: [token_id for group in groups for token_id in group]),
    skip=st.booleans(),
)
def test_sentencepiece_spaces_and_byte_pieces(tokenizer, prompt, output, skip):
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert before + "".join(run(make(tokenizer, prompt, skip=skip), output)[0]) == whole


def test_sentencepiece_space_survives_after_special_tokens():
    for tokenizer in SENTENCEPIECE:
        hello, world = FIRST_PIECE + 1, FIRST_PIECE + 2
        deltas, _ = run(make(tokenizer, [1, hello, *[2] * 20]), [2] * 10 + [world])
        assert "".join(deltas) == " world"


def test_a_run_of_byte_pieces_with_an_invalid_one_is_not_held():
    for tokenizer in SENTENCEPIECE:
        detokenizer = make(tokenizer, [FIRST_PIECE])
        texts = [detokenizer.append((3 + byte,)).text for byte in b"\xc3\xa9\xff\xff\xff\xff\xff\xff\xff\xff"]
        assert texts[1] == "é"
        assert all(texts[2:])


def test_a_window_stays_short():
    lengths = []

    class Counting(ByteTokenizer):
        def decode(self, ids, *, skip_special_tokens=True):
            lengths.append(len(ids))
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    for stream in (b"a" * 300, b"\xff" * 300, b"\xf0" * 300, b"\x80" * 300, "😀".encode() * 75, [EOS_TOKEN_ID] * 300):
        tokenizer = Counting()
        tokenizer.text_is_bytes = False
        run(make(tokenizer, [ord("p")] * 1000), stream)
    assert max(lengths) <= 12  # the end of the prompt and one character


def test_a_stop_string_over_several_tokens_is_cut_exactly_and_never_shown():
    deltas, stopped = run(make(stop=["STOP"]), b"go STO STOP more")
    assert deltas == ["g", "o", " ", "", "", "", "STO ", "", "", "", ""]
    assert stopped == "STOP"


def test_what_only_began_like_a_stop_string_is_released_when_it_differs_or_ends():
    detokenizer = make(stop=["###", "##!"])
    assert detokenizer.append(b"a##").text == "a"
    assert detokenizer.append(b"x").text == "##x"
    assert detokenizer.append(b"#").text == ""
    assert detokenizer.flush() == "#"
    assert detokenizer.flush() == ""


def test_overlapping_beginnings_keep_the_longest():
    assert run(make(stop=["aab"]), b"aaab")[0][:3] == ["", "", "a"]


@pytest.mark.parametrize(
    ("stop", "include", "expected", "stopped"),
    [
        (["two", "one"], False, "zero ", "one"),
        (["two", "one"], True, "zero one", "one"),
        (["one two", "one"], False, "zero ", "one"),
        (["e two", "one two"], False, "zero ", "one two"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_the_stop_string_that_is_complete_first_wins(stop, include, expected, stopped, at_once):
    content = b"zero one two"
    detokenizer = make(stop=stop, include=include)
    if at_once:
        new = detokenizer.append(content)
        assert (new.text, new.stop_string) == (expected, stopped)
    else:
        deltas, found = run(detokenizer, content)
        assert ("".join(deltas), found) == (expected, stopped)


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens():
    deltas, stopped = run(make(stop=["ab"], min_tokens=3), b"abab-ab")
    assert deltas[:3] == ["a", "b", "a"]
    assert "".join(deltas) == "abab-"
    assert stopped == "ab"


@pytest.mark.parametrize("tokenizer", [BYTES, WINDOWED])
def test_special_tokens_are_left_out_or_shown(tokenizer):
    assert "".join(run(make(tokenizer, skip=True), [65, EOS_TOKEN_ID, 66])[0]) == "AB"
    assert "".join(run(make(tokenizer, skip=False), [65, EOS_TOKEN_ID, 66])[0]) == "A</s>B"


def test_tokens_after_a_stop_string_are_a_mistake_of_the_caller():
    detokenizer = make(stop=["a"])
    detokenizer.append(b"a")
    with pytest.raises(AssertionError):
        detokenizer.append(b"b")


def test_the_small_real_model_gives_the_text_of_its_vectors(smollm2_gguf, smollm2_token_vectors):
    tokenizer = load_tokenizer(smollm2_gguf)
    assert tokenizer.text_is_bytes
    for text, token_ids in smollm2_token_vectors:
        deltas, _ = run(make(tokenizer, [1], skip=False), token_ids)
        assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=False), text
    generator = random.Random(0)
    for _ in range(50):
        token_ids = [generator.randrange(tokenizer.vocab_size) for _ in range(60)]
        deltas, _ = run(make(tokenizer, token_ids[:5]), token_ids[5:])
        whole = tokenizer.decode(token_ids)
        assert whole.endswith("".join(deltas))
        assert len(whole) - len("".join(deltas)) <= len(tokenizer.decode(token_ids[:5]))
