"""An output that is its own journal: what a crash, a power cut, a full disk or a second writer
leaves of it, and the manifest beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmoe.batch.journal import Journal, Record
from localmoe.batch.manifest import InputFile, Manifest, manifest_path, read_manifest
from localmoe.batch.pending import PendingRequest, PendingRequests
from localmoe.batch.responses import FileOutput, OutputLine
from localmoe.chat.chat import AnswerOptions
from localmoe.errors import LocalMoeError, UsageError

MANIFEST = Manifest(InputFile("in.jsonl", 10, "ab" * 32), {"model file": "m.gguf"}, {"seed": 1})
posix = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")


def reply(number: int, is_error: bool = False, text: str = "an answer") -> OutputLine:
    value = {
        "id": f"batch_req_{number:032x}",
        "custom_id": f"id-{number}",
        "line": number,
        "response": None if is_error else {"body": text},
        "error": {"code": "x", "message": text} if is_error else None,
    }
    return OutputLine(json.dumps(value, ensure_ascii=False).encode() + b"\n", is_error)


def recovered(path: Path) -> tuple[list[int], int]:
    """The lines that an output holds by its own account, and the bytes that were cut off."""
    records: list[Record] = []
    with Journal(path) as journal:
        n_cut = journal.recover(records.append)
    return [record.line for record in records], n_cut


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def output(path: Path) -> Iterator[FileOutput]:
    with FileOutput(path, MANIFEST) as output:
        output.recover(lambda record: None)
        yield output


# ---- tails ----


def test_what_was_written_is_there_byte_for_byte(path: Path) -> None:
    lines = [reply(n, text=text).raw for n, text in enumerate(["a", "é\u2028🙂", ""], 1)]
    for line in lines:
        with Journal(path) as journal:
            journal.recover(lambda record: None)
            journal.append([line])
    assert path.read_bytes() == b"".join(lines)
    assert recovered(path) == ([1, 2, 3], 0)


def test_every_prefix_after_the_last_fsync_is_recovered(path: Path) -> None:
    safe = reply(1).raw + reply(2).raw
    last = reply(3).raw + reply(4, text="é🙂").raw
    for n in range(len(last) + 1):
        path.write_bytes(safe + last[:n])
        n_whole = last[: n + 1].count(b"\n")  # one that only lacks its line end is kept
        lines, n_cut = recovered(path)
        assert lines == [1, 2, 3, 4][: 2 + n_whole]
        is_mended = last[n : n + 1] == b"\n"
        assert path.read_bytes() == (safe + last)[: len(safe) + n - n_cut + is_mended]


def test_every_zero_filled_tail_is_cut(path: Path) -> None:
    safe, last = reply(1).raw, reply(2).raw
    for n in range(len(last)):
        path.write_bytes(safe + last[:n] + b"\0" * (len(last) - n))
        assert recovered(path)[0] == [1]
        assert path.read_bytes() == safe
    path.write_bytes(safe + b"\0" * 100_000)
    assert recovered(path) == ([1], 100_000)


@pytest.mark.parametrize("after", [b"", reply(2).raw], ids=["at the end", "in the middle"])
@pytest.mark.parametrize(
    "damage",
    [b"\0" * 40, b'{"id": "batch_req_\0\0', b"not ours", b"", b"[" * 100_000, b'{"id": 1}'],
)
def test_a_whole_line_that_is_damaged_is_refused(path: Path, damage: bytes, after: bytes) -> None:
    raw = reply(1).raw + damage + b"\n" + after
    path.write_bytes(raw)
    with pytest.raises(LocalMoeError, match=r"Line 2 of .*out\.jsonl is damaged"):
        recovered(path)
    assert path.read_bytes() == raw


REWRITES: dict[str, Callable[[list[Any]], bytes]] = {
    "laid out": lambda values: "".join(json.dumps(v, indent=2) + "\n" for v in values).encode(),
    "a list": lambda values: json.dumps(values).encode(),
    "no line ends": lambda values: "".join(map(json.dumps, values)).encode(),
    "CR as line ends": lambda values: "\r".join(map(json.dumps, values)).encode(),
    "UTF-16": lambda values: "\n".join(map(json.dumps, values)).encode("utf-16"),
    "commas": lambda values: ",\n".join(map(json.dumps, values)).encode(),
    "another text": lambda values: b"my thesis",
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_what_another_program_made_of_an_output_is_refused_and_stays(
    path: Path, rewrite: Callable[[list[Any]], bytes]
) -> None:
    raw = rewrite([json.loads(reply(n).raw) for n in range(1, 4)])
    path.write_bytes(raw)
    with pytest.raises(LocalMoeError, match=r"Line \d of .*out\.jsonl is damaged"):
        recovered(path)
    assert path.read_bytes() == raw


# ---- rewriting ----


def test_records_can_be_taken_out_and_the_others_stay_as_they_were(
    output: FileOutput, path: Path
) -> None:
    output.write([reply(n, is_error=n % 2 == 0) for n in range(1, 6)])
    output.drop(lambda record: not record.is_error)
    assert path.read_bytes() == b"".join(reply(n).raw for n in (1, 3, 5))
    output.write([reply(6)])
    assert path.read_bytes().endswith(reply(6).raw)


def test_records_are_put_in_the_order_of_the_input(output: FileOutput, path: Path) -> None:
    output.write([reply(n) for n in (3, 1, 10, 2)])
    with PendingRequests() as backlog:
        output.put_in_order(backlog)
    assert path.read_bytes() == b"".join(reply(n).raw for n in (1, 2, 3, 10))
    inode = path.stat().st_ino
    with PendingRequests() as backlog:
        output.put_in_order(backlog)
    assert path.stat().st_ino == inode  # nothing to do, nothing done


def test_two_answers_to_what_once_was_the_same_line_are_both_kept(
    output: FileOutput, path: Path
) -> None:
    """The first belongs to a request that is not in the input any more."""
    first, second = reply(7), OutputLine(reply(8).raw.replace(b'"line": 8', b'"line": 7'), False)
    output.write([reply(9), first, second])
    with PendingRequests() as backlog:
        output.put_in_order(backlog)
    assert path.read_bytes() == first.raw + second.raw + reply(9).raw


def test_a_rewrite_that_a_crash_cut_short_left_nothing(path: Path) -> None:
    path.write_bytes(reply(1).raw)
    beside = path.with_name(".out.jsonl.0f12ab34.new")
    beside.write_bytes(b"half")
    others = [path.with_name(f".out.jsonl{end}.new") for end in ("", ".mine", ".0f12ab34.x")]
    for other in others:
        other.write_bytes(b"a person's")
    assert recovered(path) == ([1], 0)
    assert not beside.exists()
    assert all(other.exists() for other in others)


@posix
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_bytes(reply(1).raw + reply(2, is_error=True).raw)
    path.symlink_to(real)
    with Journal(path) as journal:
        journal.recover(lambda record: None)
        journal.rewrite([(0, len(reply(1).raw))])
    assert path.is_symlink()
    assert real.read_bytes() == reply(1).raw


# ---- errors apart ----


def test_errors_go_to_a_file_of_their_own(tmp_path: Path, path: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    with FileOutput(path, MANIFEST, errors=errors) as output:
        output.recover(lambda record: None)
        output.write([reply(1), reply(2, is_error=True), reply(3)])
    assert recovered(path)[0] == [1, 3]
    assert recovered(errors)[0] == [2]


@pytest.mark.parametrize("text", ["my thesis", "my thesis\n", "\0", '{"id', "before"])
def test_errors_never_go_to_a_file_that_the_batch_did_not_write(path: Path, text: str) -> None:
    FileOutput(path, MANIFEST).close()
    path.write_bytes(reply(1).raw)
    errors = path.with_name("thesis.txt")
    errors.write_text(text)
    now = replace(MANIFEST, settings={**MANIFEST.settings, "errors": "thesis.txt"})
    with pytest.raises(UsageError, match=r"thesis\.txt is there already, and this batch did not"):
        FileOutput(path, now, errors=errors, resume_anyway=True)
    assert errors.read_text() == text
    assert read_manifest(path) == MANIFEST


# ---- one writer, no room ----


def test_a_second_writer_is_refused(output: FileOutput, path: Path) -> None:
    program = (
        "import sys, pathlib; from localmoe.batch.journal import Journal\n"
        "Journal(pathlib.Path(sys.argv[1]))"
    )
    other = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "Another run is writing" in other.stderr
    output.write([reply(1)])


@posix
def test_a_second_writer_by_another_name_of_the_file_is_refused(
    output: FileOutput, path: Path
) -> None:
    other = path.with_name("other.jsonl")
    other.hardlink_to(path)
    program = (
        "import sys, pathlib; from localmoe.batch.journal import Journal\n"
        "Journal(pathlib.Path(sys.argv[1]))"
    )
    for name in (path, other):
        done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True)
        assert "Another run is writing" in done.stderr
    output.write([reply(1), reply(2, is_error=True)])
    output.drop(lambda record: not record.is_error)
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "Another run is writing" in done.stderr  # a rewrite passes the lock on


def test_a_refused_output_leaves_no_file(path: Path) -> None:
    manifest_path(path).write_text("[]")
    with pytest.raises(UsageError, match="not a manifest"):
        FileOutput(path, MANIFEST, errors=path.with_name("errors.jsonl"))
    assert list(path.parent.iterdir()) == [manifest_path(path)]


@posix
def test_a_writer_that_was_killed_leaves_no_lock(path: Path) -> None:
    program = (
        "import os, sys, pathlib; from localmoe.batch.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -signal.SIGKILL
    assert recovered(path) == ([], 0)


@posix
def test_a_full_disk_leaves_whole_lines_and_is_a_sentence(path: Path) -> None:
    """A limit on the size of files stands in for the disk: it too cuts a write short."""
    program = (
        "import resource, sys, pathlib\n"
        "from localmoe.errors import LocalMoeError\n"
        "from localmoe.batch.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "journal.recover(lambda record: None)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "lines = sys.stdin.buffer.readlines()\n"
        "try:\n"
        "    for line in lines: journal.append([line, line])\n"
        "except LocalMoeError as error: print(error)\n"
    )
    lines = [reply(n).raw for n in range(1, 30)]
    result = subprocess.run(
        [sys.executable, "-c", program, path], input=b"".join(lines), capture_output=True
    )
    assert b"All answers written so far are safe" in result.stdout
    raw = path.read_bytes()
    n = len(raw) // len(lines[0]) // 2
    assert n >= 2
    assert raw == b"".join(line + line for line in lines[:n])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_is_not_a_file_is_refused() -> None:
    for path in ("/dev/full", "/dev/null", "/tmp", "/nowhere/out.jsonl"):
        with pytest.raises(UsageError, match="is not a file|no folder"):
            Journal(Path(path))


# ---- calls that fail or never return ----

STRACE = shutil.which("strace")
WRITER = """
import json, os, pathlib, sys
from localmoe.batch.responses import FileOutput, OutputLine
from localmoe.batch.manifest import InputFile, Manifest
def reply(n, error):
    value = {"id": f"batch_req_{n:032x}", "custom_id": "x", "line": n, "response": None}
    return OutputLine(json.dumps({**value, "error": error}).encode() + b"\\n", error is not None)
there = []
with FileOutput(pathlib.Path(sys.argv[1]), Manifest(InputFile("", 0, ""), {})) as output:
    output.recover(lambda record: there.append(record.line))
    if 99 not in there:
        output.write([reply(99, "failed")])
        os.write(1, b"safe 99\\n")
    for n in range(1, 7):
        if n not in there:
            output.write([reply(n, None)])
            os.write(1, b"safe %d\\n" % n)
    output.drop(lambda record: not record.is_error)
os.write(1, b"done\\n")
"""
# of all that there are, some of each kind of moment: manifest, first line, a later one, rewrite
CALLS = [
    ("write", 1, "error=ENOSPC"),
    ("write", 2, "signal=KILL"),
    ("write", 5, "error=ENOSPC"),
    ("write", 9, "error=ENOSPC"),
    ("fsync", 1, "signal=KILL"),
    ("fsync", 3, "error=EIO"),
    ("fsync", 6, "signal=KILL"),
    ("fsync", 12, "error=EIO"),
    ("rename", 1, "signal=KILL"),
    ("rename", 2, "error=EIO"),
    ("rename", 2, "signal=KILL"),
]


@pytest.mark.skipif(STRACE is None, reason="there is no strace")
@pytest.mark.parametrize(("call", "when", "fault"), CALLS)
def test_each_call_may_fail_or_be_the_last(path: Path, call: str, when: int, fault: str) -> None:
    """The k-th write, fsync or rename on the output and what belongs to it."""
    tracing = [str(STRACE), "-e", f"inject={call}:{fault}:when={when}", "-o", "/dev/null"]
    command = [sys.executable, "-c", WRITER, str(path)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    failed = subprocess.run([*tracing, *command], capture_output=True, text=True, env=env)
    if "ptrace" in failed.stderr:
        pytest.skip("this system lets nobody trace")
    safe = [int(number) for number in re.findall(r"safe (\d+)", failed.stdout)]
    raw = path.read_bytes() if path.exists() else b""
    lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
    numbers = [json.loads(line)["line"] for line in lines]
    assert set(safe) - {99} <= set(numbers)
    if "done" not in failed.stdout and numbers != [1, 2, 3, 4, 5, 6]:
        assert set(safe) <= set(numbers)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout.endswith("done\n"), again.stderr
    kept = [line for line in lines if b'"line": 99' not in line]
    after = path.read_bytes().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    assert [json.loads(line)["line"] for line in after] == [1, 2, 3, 4, 5, 6]


# ---- the manifest ----


def test_a_file_that_no_batch_wrote_is_never_touched(path: Path) -> None:
    path.write_text("my thesis")
    with pytest.raises(UsageError, match="no batch wrote it"):
        FileOutput(path, MANIFEST)
    assert path.read_text() == "my thesis"
    assert not manifest_path(path).exists()


def test_an_empty_file_may_be_an_output(path: Path) -> None:
    path.touch()
    FileOutput(path, MANIFEST).close()
    assert read_manifest(path) == MANIFEST


def test_the_same_run_goes_on(output: FileOutput, path: Path) -> None:
    output.write([reply(1)])
    output.close()
    moved = replace(MANIFEST, input=replace(MANIFEST.input, path="elsewhere/in.jsonl"))
    with FileOutput(path, moved) as again:
        assert again.changes == []


CHANGED = replace(
    MANIFEST,
    input=InputFile("in.jsonl", 11, "cd" * 32),
    model={"model file": "other.gguf"},
    settings={"seed": 2, "system": "Be brief."},
)


def test_what_changed_is_told_field_by_field(output: FileOutput, path: Path) -> None:
    output.write([reply(1)])
    output.close()
    with pytest.raises(UsageError) as raised:
        FileOutput(path, CHANGED)
    for change in (
        "in.jsonl (10 bytes, sha256 abababababab) -> (11 bytes, sha256 cdcdcdcdcdcd)",
        'model file "m.gguf" -> "other.gguf"',
        "seed 1 -> 2",
        'system not set -> "Be brief."',
        "--resume-anyway",
    ):
        assert change in str(raised.value)
    assert read_manifest(path) == MANIFEST
    with FileOutput(path, CHANGED, resume_anyway=True) as anyway:
        assert len(anyway.changes) == 4
    assert read_manifest(path) == CHANGED


def test_where_nothing_was_answered_nothing_can_have_changed(path: Path) -> None:
    FileOutput(path, MANIFEST).close()
    with FileOutput(path, CHANGED) as output:
        assert output.changes == []


def test_a_strange_manifest_is_refused(path: Path) -> None:
    manifest_path(path).write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match="not a manifest"):
        FileOutput(path, MANIFEST)


# ---- the backlog ----


def test_a_backlog_gives_back_what_was_put_in() -> None:
    asks = [
        PendingRequest(
            n, f"id-{n}", bytes([n % 256]) * 16, n % 2 == 0, (n, 2**31 - 1), AnswerOptions(), n
        )
        for n in range(1, 200)
    ]
    with PendingRequests() as backlog:
        for ask in reversed(asks):
            backlog.add(ask)
        assert backlog.n_asks == 199
        assert list(backlog.asks()) == asks


def test_a_name_belongs_to_the_first_line_that_takes_it() -> None:
    with PendingRequests() as backlog:
        assert [backlog.take_name(name, n) for n, name in enumerate("abcab")] == [0, 1, 2, 0, 1]
        assert (backlog.is_named("a"), backlog.is_named("z")) == (True, False)
