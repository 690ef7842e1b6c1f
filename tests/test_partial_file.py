"""What is left of a download, and what may be trusted of it; hashes and shares of a file."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.hub.partial_file import HEAD_BYTES, RECORD, Partial, leftovers, remove_leftover
from localmoe.hub.transfer import Segments
from localmoe.hub.types import RemoteFile
from localmoe.hub.verify import (
    PIECE_BYTES,
    as_ranges,
    damaged_pieces,
    hash_file,
    pieces_path,
    read_pieces,
    write_pieces,
)

CONTENT = random.Random(4).randbytes(5 * PIECE_BYTES + 1234)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = RemoteFile("org/name", "c" * 40, "model.gguf", len(CONTENT), SHA256)


def piece(i: int) -> memoryview:
    return memoryview(CONTENT)[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]


def begin(blob: Path, *numbers: int, sync: bool = True) -> Path:
    """A partial with these pieces, closed again; gives its journal."""
    partial = Partial(blob, FILE)
    assert partial.agree('"one"')
    for i in numbers:
        partial.write(i, piece(i))
    if sync:
        partial.sync()
    partial.close()
    return blob.with_name(blob.name + ".localmoe-journal")


def pieces_here(blob: Path, file: RemoteFile = FILE) -> list[int]:
    partial = Partial(blob, file)
    here = [i for i in range(6) if partial.has(i)]
    buffer = memoryview(bytearray(PIECE_BYTES))
    assert all(buffer[: partial.read(i, buffer)] == piece(i) for i in here)
    partial.close()
    return here


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    return tmp_path / "blobs" / SHA256


def test_a_partial_knows_its_pieces_again(blob: Path) -> None:
    begin(blob, 0, 3, 5, sync=False)
    partial = Partial(blob, FILE)
    assert partial.etag == '"one"'
    assert partial.n_bytes_here == 2 * PIECE_BYTES + 1234
    missing = ((PIECE_BYTES, 3 * PIECE_BYTES), (4 * PIECE_BYTES, 5 * PIECE_BYTES))
    assert partial.ranges(present=False) == missing
    partial.close()
    assert pieces_here(blob) == [0, 3, 5]


def test_after_another_boot_only_what_was_synced_counts(blob: Path) -> None:
    begin(blob, 0, 1)
    journal = begin(blob, 4, sync=False)
    content = journal.read_bytes()
    head = json.loads(content[:HEAD_BYTES]) | {"boot": "another"}
    journal.write_bytes(json.dumps(head).encode().ljust(HEAD_BYTES) + content[HEAD_BYTES:])
    assert pieces_here(blob) == [0, 1]
    assert pieces_here(blob) == [0, 1]  # and what was not trusted once never is


@pytest.mark.parametrize(
    "other",
    [
        RemoteFile("org/name", "c" * 40, "model.gguf", len(CONTENT), "0" * 64),
        RemoteFile("org/name", "c" * 40, "model.gguf", len(CONTENT) - 1, SHA256),
    ],
)
def test_a_journal_of_other_content_counts_for_nothing(blob: Path, other: RemoteFile) -> None:
    begin(blob, 0, 1)
    assert pieces_here(blob, other) == []
    assert pieces_here(blob) == []


def test_a_journal_without_its_bytes_counts_for_nothing(blob: Path) -> None:
    begin(blob, 0, 1)
    blob.with_name(blob.name + ".localmoe-partial").unlink()
    assert pieces_here(blob) == []


def test_every_torn_or_zeroed_journal_is_right_or_nothing(blob: Path) -> None:
    journal = begin(blob, 0, 2, 5)
    content = journal.read_bytes()
    cuts = [0, 1, 100, HEAD_BYTES - 1, *range(HEAD_BYTES, len(content) + 1, 5)]
    for cut in cuts:
        n_whole = max(0, cut - HEAD_BYTES) // RECORD.size
        begin(blob, 0, 2, 5)
        journal.write_bytes(content[:cut])
        here = pieces_here(blob)
        assert here in ([], [i for i in (0, 2, 5) if i < n_whole]), cut
        begin(blob, 0, 2, 5)
        journal.write_bytes(content[:cut] + bytes(len(content) - cut))
        assert set(pieces_here(blob)) <= {0, 2, 5}, cut


def test_a_second_etag_is_not_of_the_same_content(blob: Path) -> None:
    begin(blob, 0)
    partial = Partial(blob, FILE)
    assert partial.agree('"one"')
    assert partial.agree(None)
    assert not partial.agree('"two"')
    partial.start_over()
    assert partial.agree('"two"')
    partial.close()
    assert pieces_here(blob) == []


@pytest.mark.parametrize("odd", [None, "x" * 501, "\r\nHost: elsewhere", "é"])
def test_an_odd_etag_is_none(blob: Path, odd: str | None) -> None:
    partial = Partial(blob, FILE)
    assert partial.agree(odd)
    assert partial.etag is None
    partial.close()


def test_damage_on_the_disk_is_found(blob: Path) -> None:
    begin(blob, 0, 1, 2)
    path = blob.with_name(blob.name + ".localmoe-partial")
    with path.open("r+b") as file:
        file.seek(PIECE_BYTES + 77)
        file.write(b"?")
    partial = Partial(blob, FILE)
    assert partial.drop_damaged() == 1
    partial.close()
    assert pieces_here(blob) == [0, 2]


def test_a_finished_partial_is_the_blob_and_nothing_else(blob: Path) -> None:
    begin(blob, 0, 1, 2)
    partial = Partial(blob, FILE)
    for i in (3, 4, 5):
        partial.write(i, piece(i))
    partial.finish()
    assert blob.read_bytes() == CONTENT
    assert list(blob.parent.iterdir()) == [blob]


def test_pieces_come_over_from_a_file_that_has_them(blob: Path, tmp_path: Path) -> None:
    source = tmp_path / "damaged"
    source.write_bytes(CONTENT[: 3 * PIECE_BYTES] + bytes(len(CONTENT) - 3 * PIECE_BYTES))
    partial = Partial(blob, FILE)
    partial.copy_pieces(source, [0, 2], [zlib.crc32(piece(i)) for i in range(6)])
    assert partial.drop_damaged() == 0
    partial.close()
    assert pieces_here(blob) == [0, 2]


def test_what_was_broken_off_can_be_listed_and_removed(blob: Path) -> None:
    begin(blob, 0, 5)
    other = blob.with_name("1" * 64)
    other.with_name(other.name + ".localmoe-partial").write_bytes(b"x")
    torn, left = (
        leftovers(blob.parent) if blob.name > other.name else [*leftovers(blob.parent)][::-1]
    )
    assert (left.name, left.blob, left.n_bytes) == ("model.gguf", blob, len(CONTENT))
    assert (torn.name, torn.n_bytes_here) == ("", 0)
    remove_leftover(left.blob)
    remove_leftover(torn.blob)
    assert list(blob.parent.iterdir()) == []


# --- hashes


@pytest.mark.parametrize("n_bytes", [0, 1, PIECE_BYTES, 8 * PIECE_BYTES, 17 * PIECE_BYTES + 5])
def test_a_file_is_hashed_whole_and_by_pieces(tmp_path: Path, n_bytes: int) -> None:
    content = random.Random(n_bytes).randbytes(n_bytes)
    path = tmp_path / "file"
    path.write_bytes(content)
    seen: list[int] = []
    hashes = hash_file(path, seen.append)
    assert hashes.n_bytes == n_bytes
    assert hashes.sha256 == hashlib.sha256(content).hexdigest()
    expected = [zlib.crc32(content[at : at + PIECE_BYTES]) for at in range(0, n_bytes, PIECE_BYTES)]
    assert list(hashes.pieces) == expected
    assert seen == sorted(seen)
    assert seen[-1:] == ([n_bytes] if n_bytes else [])


def test_damage_is_located_to_the_mebibyte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    write_pieces(tmp_path / "stamps", hash_file(path))
    damaged = bytearray(CONTENT)
    damaged[PIECE_BYTES] ^= 1
    damaged[2 * PIECE_BYTES + 9] ^= 128
    path.write_bytes(damaged[:-1])
    known = read_pieces(tmp_path / "stamps", SHA256, len(CONTENT))
    assert known
    numbers = damaged_pieces(hash_file(path), known)
    assert numbers == (1, 2, 5)
    last = (5 * PIECE_BYTES, len(CONTENT))
    assert as_ranges(numbers, len(CONTENT)) == ((PIECE_BYTES, 3 * PIECE_BYTES), last)
    path.write_bytes(CONTENT[:PIECE_BYTES])
    assert damaged_pieces(hash_file(path), known) == (1, 2, 3, 4, 5)


def test_damaged_checksums_are_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    write_pieces(tmp_path, hash_file(path))
    assert read_pieces(tmp_path, SHA256, len(CONTENT) + 1) is None
    assert read_pieces(tmp_path, "0" * 64, len(CONTENT)) is None
    kept = pieces_path(tmp_path, SHA256)
    content = kept.read_bytes()
    for wrong in (b"", b"{}\n", content[:-1], content[:-1] + b"?", b"[]" + content):
        kept.write_bytes(wrong)
        assert read_pieces(tmp_path, SHA256, len(CONTENT)) is None


# --- shares


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 90)), max_size=4),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_every_missing_piece_is_fetched_once(
    spans: list[tuple[int, int]], connections: int, chance: random.Random
) -> None:
    """Connections of any speed take turns, give up now and then, and help each other."""
    missing, at = [], 0
    for gap, n in spans:
        start = at + gap * PIECE_BYTES
        at = start + n * PIECE_BYTES
        missing.append((start, at))
    segments = Segments(missing, connections)
    fetched: list[int] = []
    working = [segments.take() for _ in range(connections)]
    while any(working):
        i = chance.randrange(connections)
        segment = working[i]
        if segment is None or segment.at == segment.end or chance.random() < 0.02:
            if segment:
                segments.done(segment)
            working[i] = segments.take()
        else:
            fetched.append(segment.at)
            segment.at += PIECE_BYTES
    expected = [at for start, end in missing for at in range(start, end, PIECE_BYTES)]
    assert sorted(fetched) == expected


def test_a_free_connection_takes_over_from_the_slowest() -> None:
    segments = Segments([(0, 64 * PIECE_BYTES)], 1)
    slow = segments.take()
    assert slow
    rest = [segments.take() for _ in range(3)]
    assert all(rest)
    while segments.take():
        pass
    assert slow.end - slow.at < 4 * PIECE_BYTES


def test_one_stream_is_one_connections() -> None:
    segments = Segments([(0, 300 * PIECE_BYTES)], 2)
    first, second = segments.take(), segments.take()
    assert first
    assert second
    assert segments.in_one_stream(second, 300 * PIECE_BYTES)
    assert not segments.in_one_stream(first, 300 * PIECE_BYTES)
    assert first.at == first.end
    assert (second.at, second.end) == (0, 300 * PIECE_BYTES)
    second.at = 7 * PIECE_BYTES
    assert segments.in_one_stream(second, 300 * PIECE_BYTES)
    assert second.at == 0  # after a drop it comes from its beginning again
    assert segments.take() is None
