from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localmoe.engine.worker.sampling import TextStream

cuts = st.lists(st.integers(0, 60), max_size=8)


def streamed(raw: bytes, at: list[int], stream: TextStream) -> str:
    """The text of bytes that come in pieces cut at these places, up to a stop string."""
    text = ""
    edges = [0, *sorted(min(n, len(raw)) for n in at), len(raw)]
    for start, end in zip(edges, edges[1:], strict=False):
        text += stream.feed(raw[start:end])
        if stream.stopped_by is not None:
            return text
    return text + stream.finish()


@given(st.text(max_size=30), cuts)
def test_text_is_the_same_wherever_it_is_cut(text: str, at: list[int]) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    assert streamed(raw, at, TextStream()) == raw.decode("utf-8", "replace")


@given(st.text("abc", max_size=30), cuts, st.lists(st.text("abc", min_size=1, max_size=4)))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(
    text: str, at: list[int], stop: list[str]
) -> None:
    # the earliest to be complete ends the text: what is found depends on nothing but the text
    ends = [text.find(s) for s in stop if s in text]
    stream = TextStream(stop)
    seen = streamed(text.encode(), at, stream)
    if ends:
        assert stream.stopped_by in stop
        assert stream.stopped_by not in seen or len(at) > 0
        assert text.startswith(seen)
        assert not any(s in seen for s in stop)
    else:
        assert seen == text


def test_what_may_become_a_stop_string_waits() -> None:
    stream = TextStream(["</end>"])
    assert stream.feed(b"Hello </e") == "Hello "
    assert stream.feed(b"m>") == "</em>"
    assert stream.feed(b" you </end> more") == " you "
    assert stream.stopped_by == "</end>"
    assert stream.feed(b"more") == ""


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream()
    assert [stream.feed(bytes([b])) for b in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_half_a_character_at_the_end_is_shown_as_lost() -> None:
    stream = TextStream()
    assert stream.feed("🙂".encode()[:2]) + stream.finish() == "�"


def test_the_space_before_the_first_word_is_left_out_once() -> None:
    stream = TextStream(skip_space=True)
    assert stream.feed(b"") + stream.feed(b" It") + stream.feed(b" was") == "It was"
