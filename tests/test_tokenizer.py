"""Streamed text is exact, never ends inside a character, and stops before a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.backend.tokenizer import REPLACEMENT, IncrementalDecoder, StopText, Tokenizer

TEXTS = st.text(st.sampled_from("ab \nxé日本😀🎉"), max_size=60)


def pieces(codec: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = IncrementalDecoder(codec, context or ())
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text(codec: Tokenizer, text: str) -> None:
    """The deltas of a valid text are that text, and none shows half a character."""
    got = pieces(codec, codec.encode(text))
    assert "".join(got) == text
    assert not any(REPLACEMENT in piece for piece in got)


@given(ids=st.lists(st.integers(1, 299), max_size=80), context=st.lists(st.integers(1, 299), max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_tokens_decode_like_the_whole(codec: Tokenizer, ids: list[int], context: list[int]) -> None:
    """Even bytes that are no UTF-8 come out as when all tokens are decoded at once."""
    whole, before = codec.decode([1, *ids]), codec.decode([1])
    assert "".join(pieces(codec, ids, [1])) == whole[len(before) :]
    pieces(codec, ids, context)


def test_a_long_text_in_odd_tokens_stays_exact(codec: Tokenizer) -> None:
    """Tokens that all end inside a character never lose or double one."""
    text = "😀😃🎉日本語" * 50
    assert "".join(pieces(codec, codec.encode(text))) == text


@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("ab \nxé"), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(codec: Tokenizer, text: str, stop: list[str]) -> None:
    """What is sent is the text up to the first stop string that is complete, token by token."""
    ids = codec.encode(text)
    stream = StopText(IncrementalDecoder(codec), stop)
    sent = "".join([*map(stream.push, ids), stream.flush()])
    assert text.startswith(sent)
    assert stream.stopped == any(item in text for item in stop)
    assert not any(item in sent for item in stop)
    if not stream.stopped:
        assert sent == text


def test_a_stop_string_may_span_tokens_and_waits_for_min_tokens(codec: Tokenizer) -> None:
    """The beginning of a stop string is held back; before `min_tokens` it is ordinary text."""
    ids = [codec.encode(letter)[0] for letter in "xabxab"]
    stream = StopText(IncrementalDecoder(codec), ["ab"], min_tokens=3)
    assert [stream.push(token_id) for token_id in ids] == ["x", "", "ab", "x", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_special_tokens_have_no_text(codec: Tokenizer) -> None:
    """A run of end tokens between texts neither shows nor disturbs."""
    ids = [*codec.encode("a b"), *[0] * 100, *codec.encode(" c")]
    assert "".join(pieces(codec, ids)) == "a b c"


def test_least_tokens_is_a_lower_bound(codec: Tokenizer) -> None:
    """A text never has fewer tokens than the free estimate."""
    for text in ("", "a", "def f(x):\n" * 50, "日本語" * 20):
        assert codec.least_tokens(text) <= len(codec.encode(text))
