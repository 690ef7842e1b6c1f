from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.engine import client, protocol
from localmoe.engine.client import ProtocolError
from localmoe.engine.protocol import (
    Delta,
    Failed,
    Generate,
    Load,
    Placement,
    Request,
    Sampling,
    TextPiece,
    Timings,
    Tokenize,
    Usage,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))
ids = st.integers(0, 2**31)
tokens = st.lists(st.integers(0, 300_000), max_size=20).map(tuple)
messages = st.one_of(
    st.builds(Tokenize, ids, st.lists(st.builds(TextPiece, texts, st.booleans())).map(tuple)),
    st.builds(Failed, ids, texts, texts),
    st.builds(
        Generate,
        ids,
        st.builds(
            Request, tokens, st.builds(Sampling, grammar=texts | st.none()), stop=st.just(())
        ),
    ),
    st.builds(Delta, ids, texts, tokens, usage=st.builds(Usage, ids, ids, ids) | st.none()),
)


def read_back(raw: bytes) -> protocol.Message | None:
    return client.read(io.BytesIO(raw))


@given(messages)
def test_a_message_comes_back_as_it_was(message: protocol.Message) -> None:
    assert read_back(client.encode(message)) == message


@given(messages, st.data())
def test_a_frame_that_is_cut_is_refused(message: protocol.Message, data: st.DataObject) -> None:
    frame = client.encode(message)
    n = data.draw(st.integers(1, len(frame) - 1))
    with pytest.raises(ProtocolError):
        read_back(frame[:n])


@given(st.binary(min_size=4, max_size=200))
def test_garbage_is_refused_or_too_short(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_back(raw)


def test_the_end_of_a_stream_is_no_message() -> None:
    assert read_back(b"") is None


def test_a_huge_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        read_back(b"\xff\xff\xff\xff")


def test_messages_follow_each_other() -> None:
    first, second = Load(1, "a.gguf", Placement(n_threads=2)), Failed(2, "no")
    stream = io.BytesIO(client.encode(first) + client.encode(second))
    assert [client.read(stream), client.read(stream), client.read(stream)] == [
        first,
        second,
        None,
    ]


def test_a_placement_counts_its_cells() -> None:
    assert Placement(n_threads=1, n_ctx=4096, n_seq=3).n_ctx_total == 12288


@pytest.mark.parametrize(("n_gpu_layers", "first"), [(0, 33), (1, 32), (2, 31), (33, 0), (99, 0)])
def test_the_output_goes_to_a_gpu_before_the_layers(n_gpu_layers: int, first: int) -> None:
    assert protocol.first_gpu_layer(32, n_gpu_layers) == first


def test_a_delta_keeps_its_figures() -> None:
    delta = Delta(1, finish_reason="stop", usage=Usage(3, 2, 1), timings=Timings(0.1, 2.5, 3.5))
    assert read_back(client.encode(delta)) == delta
