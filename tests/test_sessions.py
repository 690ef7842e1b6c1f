"""Chats on disk: what is written comes back, whatever a crash left of it, and nobody else's."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.chat.session import Session, Sessions
from localmoe.chat.transcript import read_transcript
from localmoe.cli import run_command
from localmoe.config.environment import sessions_folder
from localmoe.errors import LocalMoeError, UsageError
from localmoe.files import make_private_folder
from localmoe.prompt.messages import Message

SYSTEM = Message("system", "Be brief.")
TURN = [Message("user", "How are you?"), Message("assistant", "Fine.\n", (7, 8, 9))]
NEXT = [Message("user", "Why – 為什麼?"), Message("assistant", "So.", (4,), "Well, well")]


@pytest.fixture
def store(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "sessions")


def written(store: Sessions, *conversations: list[Message], name: str = "one") -> Path:
    """A session that went through these conversations."""
    with store.open_or_new(name, "demo") as session:
        session.use("demo", "file-a")
        for messages in conversations:
            session.sync(messages)
    return store.path(name)


# ---- what comes back ----


def test_a_chat_comes_back_as_it_was(store: Sessions) -> None:
    written(store, [SYSTEM, *TURN], [SYSTEM, *TURN, *NEXT])
    with store.open("one") as session:
        assert session.messages == [SYSTEM, *TURN, *NEXT]
        assert (session.model, session.file, session.unanswered) == ("demo", "file-a", "")


CHANGES: dict[str, list[list[Message]]] = {
    "undo": [[*TURN, *NEXT], TURN],
    "regenerate": [TURN, [TURN[0], Message("assistant", "Well.", (1,))]],
    "edit the question": [[*TURN, *NEXT], [*TURN, Message("user", "Really?"), NEXT[1]]],
    "clear": [[SYSTEM, *TURN], [SYSTEM]],
    "another system message": [[SYSTEM, *TURN], [Message("system", "Sing."), *TURN]],
    "no system message any more": [[SYSTEM, *TURN], TURN],
    "cleared and begun anew": [[*TURN, *NEXT], [], NEXT],
}


@pytest.mark.parametrize("steps", CHANGES.values(), ids=CHANGES.keys())
def test_what_was_taken_back_stays_gone(store: Sessions, steps: list[list[Message]]) -> None:
    written(store, *steps)
    with store.open("one") as session:
        assert session.messages == steps[-1]


@given(
    st.lists(
        st.lists(
            st.builds(
                Message,
                st.sampled_from(["system", "user", "assistant"]),
                st.text(st.characters(), max_size=8),
                st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
                st.text(max_size=4),
            ),
            max_size=5,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_conversation_comes_back(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[Message]]
) -> None:
    store = Sessions(tmp_path_factory.mktemp("any"))
    path = written(store, [Message("user", "first")], *steps)
    assert read_transcript(path).messages == steps[-1]
    raw = path.read_bytes()
    assert not any(c in raw.decode() for c in "\x1b\x7f\x9b\u202e\u2066")


def test_half_a_surrogate_pair_is_no_reason_to_lose_a_chat(store: Sessions) -> None:
    messages = [Message("user", "\ud83d \u2028\r\n\0\x1b[31m \x9b"), *TURN[1:]]
    path = written(store, messages)
    assert store.read("one").messages == messages
    assert len(path.read_bytes().splitlines()) == 3


def test_nothing_is_written_before_something_is_asked(store: Sessions) -> None:
    with store.new(None, "demo") as session:
        session.sync([SYSTEM])
    assert list(store.folder.iterdir()) == []


def test_how_much_was_dropped_is_kept(store: Sessions) -> None:
    with store.new("one", "demo") as session:
        session.sync([*TURN, *NEXT], 2)
    with store.open("one") as session:
        assert session.n_dropped == 2
        session.sync([*TURN, *NEXT], 0)
    assert store.read("one").n_dropped == 0


def test_an_unchanged_chat_is_not_written_again(store: Sessions) -> None:
    path = written(store, TURN)
    before = path.read_bytes()
    written(store, TURN, TURN)
    assert path.read_bytes() == before


def test_a_question_without_answer_is_kept_apart(store: Sessions) -> None:
    written(store, TURN, [*TURN, NEXT[0]])
    with store.open("one") as session:
        assert session.messages == TURN
        assert session.unanswered == NEXT[0].content
        session.sync([*TURN, *NEXT])
    assert store.read("one").messages == [*TURN, *NEXT]


def test_a_question_without_answer_stays_until_another_is_asked(store: Sessions) -> None:
    path = written(store, [*TURN, NEXT[0]])
    before = path.read_bytes()
    with store.open("one") as session:
        session.sync(session.messages)
        assert path.read_bytes() == before
        session.sync([SYSTEM, *session.messages])
        assert session.messages == [SYSTEM, *TURN]
    assert store.read("one").messages == [SYSTEM, *TURN, NEXT[0]]
    with store.open("one") as session:
        session.sync([SYSTEM])  # taken back
    assert store.read("one").messages == [SYSTEM]


def test_a_renamed_session_goes_on_and_leaves_nothing_behind(store: Sessions) -> None:
    written(store, TURN, name="two")
    with store.new(None, "demo") as session:
        assert not session.is_named
        session.sync(TURN)
        session.state_path.write_bytes(b"x")
        for name, why in (("two", "already"), ("../x", "can't be the name")):
            with pytest.raises(UsageError, match=why):
                session.rename(name)
        session.rename("one")
        assert session.is_named
        session.sync([*TURN, *NEXT])
        with pytest.raises(LocalMoeError, match="open in another chat"):
            store.remove("one")
        assert {path.name for path in store.folder.iterdir()} >= {"one.jsonl", "one.state"}
    assert store.read("one").messages == [*TURN, *NEXT]
    assert store.names() == ["one", "two"]
    assert {path.name for path in store.folder.iterdir()} <= {
        "one.jsonl", "one.state", ".one.lock", "two.jsonl", ".two.lock",
    }  # fmt: skip


def test_tokens_are_those_of_one_file(store: Sessions) -> None:
    written(store, TURN)
    with store.open("one") as session:
        session.use("demo:copy", "file-a")  # another name, the same file
        assert session.messages == TURN
        session.use("mixtral", "file-b")
        assert [m.tokens for m in session.messages] == [None, None]
    assert store.read("one").messages == TURN  # to look at it with another model changes nothing
    with store.open("one") as session:
        session.use("mixtral", "file-b")
        session.sync([*session.messages, *NEXT])
    with store.open("one") as session:
        assert (session.model, session.file) == ("mixtral", "file-b")
        assert [m.tokens for m in session.messages] == [None, None, None, (4,)]
        assert [m.content for m in session.messages] == [m.content for m in [*TURN, *NEXT]]


def test_a_person_can_read_the_file(store: Sessions) -> None:
    text = written(store, [*TURN, *NEXT]).read_text("utf-8")
    assert "Why – 為什麼?" in text
    assert len(text.splitlines()) == 5


# ---- crashes ----


def test_every_beginning_of_a_file_is_a_chat(store: Sessions) -> None:
    steps = [TURN, [*TURN, *NEXT], TURN, [*TURN, Message("user", "So?")]]
    whole = written(store, *steps).read_bytes()
    # what each line makes of the conversation: head, turn, next turn, cut, question
    after = [[], [], TURN[:1], TURN, [*TURN, NEXT[0]], [*TURN, *NEXT], TURN, steps[-1]]
    path = store.path("cut")
    for n_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:n_bytes])
        found = read_transcript(path)
        # a record that only lacks its line end is one all the same
        assert found.messages == after[whole[: n_bytes + 1].count(b"\n")]
        assert not found.damaged
        path.write_bytes(whole[:n_bytes] + b"\0" * 300)
        zeroed = read_transcript(path)
        assert zeroed.messages == after[whole[:n_bytes].count(b"\n")]
        assert not zeroed.damaged


def test_a_torn_tail_is_cut_when_the_chat_goes_on(store: Sessions) -> None:
    path = written(store, TURN)
    whole = path.read_bytes()
    for n_bytes in range(0, len(whole), 17):
        path.write_bytes(whole[:n_bytes])
        with store.open("one") as session:
            session.use("demo", "file-a")
            session.sync([*TURN, *NEXT])
        found = store.read("one")
        assert (found.messages, found.damaged) == ([*TURN, *NEXT], [])
        assert found.model == "demo"


def test_a_last_line_without_its_end_still_counts(store: Sessions) -> None:
    path = written(store, TURN)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    with store.open("one") as session:
        assert session.messages == TURN
        session.use("demo", "file-a")
        session.sync([*TURN, *NEXT])
    assert store.read("one").messages == [*TURN, *NEXT]


REWRITES: dict[str, Callable[[str], bytes]] = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: text.encode("utf-16-be"),
    "CR as line ends": lambda text: text.replace("\n", "\r").encode(),
    "no line ends": lambda text: text.replace("\n", "").encode(),
    "a comma behind each line": lambda text: text.replace("}\n", "},\n").encode(),
    "laid out": lambda text: "".join(
        json.dumps(json.loads(line), indent=2) + "\n" for line in text.splitlines()
    ).encode(),
    "a list": lambda text: json.dumps([json.loads(line) for line in text.splitlines()]).encode(),
    "a typo in the last line": lambda text: text.replace('"Fine.\\n"', 'Fine."').encode(),
    "another text": lambda text: b"My diary.\nNothing yet.\n",
    "another text without a line end": lambda text: b"My diary",
    "compressed": lambda text: gzip.compress(text.encode()),
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_what_another_program_made_of_a_session_is_refused_and_stays(
    store: Sessions, rewrite: Callable[[str], bytes]
) -> None:
    path = written(store, TURN)
    raw = rewrite(path.read_text("utf-8"))
    path.write_bytes(raw)
    with pytest.raises(LocalMoeError, match=r"Line \d of .*one\.jsonl is damaged"):
        store.open("one")
    assert path.read_bytes() == raw
    assert store.all()[0].damaged


def test_a_killed_writer_loses_nothing_that_was_kept(store: Sessions) -> None:
    program = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from localmoe.prompt.messages import Message\n"
        "from localmoe.chat.session import Sessions\n"
        "session = Sessions(Path(sys.argv[1])).open_or_new('one', 'demo')\n"
        "messages = session.messages\n"
        "for n in itertools.count(len(messages) // 2):\n"
        "    answer = Message('assistant', 'x' * n, (n,))\n"
        "    messages = [*messages, Message('user', f'{n}?'), answer]\n"
        "    session.sync(messages)\n"
        "    print(n + 1, flush=True)\n"
    )
    for delay_s in (0.0, 0.013, 0.05, 0.02):
        command = [sys.executable, "-c", program, str(store.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            kept = int(writer.stdout.readline())
            time.sleep(delay_s)
            writer.kill()
            kept = int((writer.stdout.read().split() or [kept])[-1])
        with store.open("one") as session:  # the lock went with its owner
            messages = session.messages
        assert len(messages) // 2 in (kept, kept + 1)
        assert [m.content for m in messages[::2]] == [f"{n}?" for n in range(len(messages) // 2)]


FULL_DISK = (
    "import resource, signal, sys\n"
    "from pathlib import Path\n"
    "from localmoe.errors import LocalMoeError\n"
    "from localmoe.prompt.messages import Message\n"
    "from localmoe.chat.session import Sessions\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
)
"""How a program begins whose files may not grow beyond a limit, as on a disk that is full."""


def test_a_full_disk_is_a_sentence_and_leaves_the_file_as_it_was(store: Sessions) -> None:
    path = written(store, TURN)
    before = path.read_bytes()
    program = FULL_DISK + (
        "session = Sessions(Path(sys.argv[1])).open('one')\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + 20,) * 2)\n"
        "try:\n"
        "    session.sync([*session.messages, Message('user', 'x' * 100)])\n"
        "except LocalMoeError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.check_output([sys.executable, "-c", program, str(store.folder)], text=True)
    assert out.startswith("The chat can't be kept: ")
    assert len(out.splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_that_is_deleted_while_the_chat_runs_is_written_anew(
    store: Sessions, whole_folder: bool
) -> None:
    written(store, TURN)
    for is_first in (True, False):  # before the first turn that this chat adds, and after it
        with store.open("one") as session:
            session.use("demo", "file-a")
            if not is_first:
                assert not session.sync([*TURN, *NEXT])
            shutil.rmtree(store.folder) if whole_folder else session.path.unlink()
            assert session.sync([*TURN, *NEXT, *TURN])
            assert not session.sync([*TURN, *NEXT, *TURN, *NEXT])
            with pytest.raises(LocalMoeError, match="open in another chat"):
                store.lock("one")
        found = store.read("one")
        assert (found.messages, found.damaged) == ([*TURN, *NEXT, *TURN, *NEXT], [])
        assert (found.model, found.file) == ("demo", "file-a")


@pytest.mark.parametrize("change", ["add", "replace", "begin"])
def test_what_another_program_writes_while_the_chat_runs_stays(
    store: Sessions, change: str
) -> None:
    path = store.path("one")
    if change != "begin":
        written(store, TURN)
    with store.open_or_new("one", "demo") as session:
        if change == "replace":
            path.rename(path.with_name("old"))
        with path.open("ab") as file:
            file.write(b"mine\n")
        raw = path.read_bytes()
        with pytest.raises(LocalMoeError, match="The chat can't be kept: "):
            session.sync([*TURN, *NEXT])
        assert path.read_bytes() == raw


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="limits of POSIX")
def test_a_full_disk_leaves_no_empty_session(store: Sessions) -> None:
    program = FULL_DISK + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "with Sessions(Path(sys.argv[1])).new('one', 'demo') as session:\n"
        "    for _ in range(2):\n"
        "        try:\n"
        "            session.sync([Message('user', 'x' * 100)])\n"
        "        except LocalMoeError as error:\n"
        "            print(error)\n"
    )
    out = subprocess.check_output([sys.executable, "-c", program, str(store.folder)], text=True)
    assert out.count("The chat can't be kept: ") == 2
    assert list(store.folder.iterdir()) == []


def spoil(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b'{"type": "message", "n": 1, "role": "assis\n'
    path.write_bytes(b"".join(lines))


def test_a_damaged_line_is_named_and_the_rest_can_be_read(
    store: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(store, [*TURN, *NEXT])
    spoil(path, 3)
    with pytest.raises(LocalMoeError, match=r"Line 3 of .*one\.jsonl is damaged"):
        store.open("one")
    found = store.read("one")
    assert (found.messages, found.damaged) == ([TURN[0], *NEXT], [3])
    spoil(path, 2)  # the refusal let go of the lock
    with pytest.raises(LocalMoeError, match="Line 2 of"):
        store.open("one")


def test_what_a_later_version_adds_is_read_past(store: Sessions) -> None:
    path = written(store, TURN)
    with path.open("ab") as file:
        file.write(b'{"type": "picture", "n": 2, "role": 5}\n')
    with store.open("one") as session:
        assert session.messages == TURN
        session.sync([*TURN, *NEXT])
    assert store.read("one").messages == [*TURN, *NEXT]
    assert b"picture" in path.read_bytes()


def test_a_later_format_is_refused_and_not_touched(store: Sessions) -> None:
    path = written(store, TURN)
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    before = path.read_bytes()
    with pytest.raises(LocalMoeError, match="later version"):
        store.open("one")
    assert [found.name for found in store.all()] == ["one"]
    assert path.read_bytes() == before


# ---- names, locks, permissions ----


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "ä", "x" * 65, "NUL",
     "com1.txt", "a.", "a\0b"],
)  # fmt: skip
def test_a_name_leads_nowhere_else(store: Sessions, name: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: store.new(name, "demo"), lambda: store.open(name),
        lambda: store.read(name), lambda: store.remove(name),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="can't be the name"):
            call()
    assert not store.folder.exists()


def test_a_second_chat_is_refused(store: Sessions) -> None:
    written(store, TURN)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from localmoe.chat.session import Sessions\n"
        "session = Sessions(Path(sys.argv[1])).open('one')\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(store.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdin
        other.stdout.readline()
        for refused in (store.open, store.remove):
            with pytest.raises(LocalMoeError, match="open in another chat"):
                refused("one")
        assert store.read("one").messages == TURN
        other.stdin.close()
    store.open("one").close()


def test_names_from_the_clock_are_all_different(store: Sessions) -> None:
    opened = [store.new(None, "demo") for _ in range(3)]
    names = [session.name for session in opened]
    assert len(set(names)) == 3
    for session in opened:
        session.sync(TURN)
        session.close()
    assert store.new(None, "demo").name not in names
    assert sorted(store.names()) == sorted(names)


def test_a_taken_name_is_said(store: Sessions) -> None:
    written(store, TURN)
    with pytest.raises(UsageError, match="already") as raised:
        store.new("one", "demo")
    assert raised.value.hint.endswith("localmoe chat --session one")
    with pytest.raises(UsageError, match="no session onw") as raised:
        store.open("onw")
    assert raised.value.hint == "Did you mean one?"


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = Sessions(tmp_path / "sessions")
        store.folder.mkdir(mode=0o755)
        written(store, TURN)
    finally:
        os.umask(old)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()} == {0o600}


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_all_that_is_made_on_the_way_to_the_state_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make_private_folder(tmp_path / "state" / "localmoe" / "measured")
    finally:
        os.umask(old)
    for name in ("state", "state/localmoe", "state/localmoe/measured"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_the_last_one_goes_on(store: Sessions) -> None:
    assert store.latest() is None
    for n, name in enumerate(("b", "a", "c")):
        os.utime(written(store, TURN, name=name), (n, n))
    session = store.latest()
    assert session is not None
    with session:
        assert session.name == "c"
    assert [found.name for found in store.all()] == ["c", "a", "b"]


def test_a_removed_session_leaves_nothing(store: Sessions) -> None:
    n_bytes = written(store, TURN).stat().st_size
    store.state_path("one").write_bytes(b"x" * 100)
    assert store.remove("one") == n_bytes + 100
    assert list(store.folder.iterdir()) == []


# ---- commands ----


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    """Two sessions where the commands look."""
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path / "state"))
    store = Sessions(sessions_folder())
    os.utime(written(store, [SYSTEM, *TURN, *NEXT], name="talk"), (0, 0))
    bad = Message("user", "Red \x1b[31m and \u202e turned\nsecond line")
    written(store, [bad, TURN[1]], name="evil")
    store.state_path("evil").write_bytes(b"x" * 2048)
    return store


def out(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_command(["sessions", *arguments]) == code
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) <= 1
    assert "\x1b" not in shown.out + shown.err
    assert "\u202e" not in shown.out + shown.err
    return shown.out if code == 0 else shown.err


def test_list_shows_what_there_is(kept: Sessions, capsys: pytest.CaptureFixture[str]) -> None:
    rows = out(capsys, "list").splitlines()
    assert rows[0].split() == ["NAME", "MODEL", "LAST", "MESSAGES", "TEXT", "STATE", "ABOUT"]
    assert rows[1].startswith("evil  demo")
    assert "2.0 KiB" in rows[1]
    assert rows[1].endswith("Red [31m and  turned second line")
    assert rows[2].startswith("talk  demo   1970-01-01")
    assert rows[-1].startswith("2 sessions: ")
    facts = json.loads(out(capsys, "list", "--json"))
    assert [(f["name"], f["messages"], f["state_bytes"]) for f in facts] == [
        ("evil", 2, 2048), ("talk", 4, 0),
    ]  # fmt: skip


def test_show_reads_like_a_talk(kept: Sessions, capsys: pytest.CaptureFixture[str]) -> None:
    assert out(capsys, "show", "talk") == (
        "System:\nBe brief.\n\nYou:\nHow are you?\n\ndemo:\nFine.\n\nYou:\nWhy – 為什麼?\n\n"
        "demo:\nSo.\n"
    )
    assert "  | Well, well\nSo.\n" in out(capsys, "show", "talk", "--think")
    assert "Red [31m and  turned\nsecond line" in out(capsys, "show", "evil")


def test_export_gives_markdown_and_json(
    kept: Sessions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "## You\n\nHow are you?\n\n## demo\n\nFine.\n" in out(capsys, "export", "talk")
    talk = json.loads(out(capsys, "export", "talk", "--format", "json"))
    assert talk["messages"][1:3] == [
        {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine.\n"},
    ]  # fmt: skip
    file = tmp_path / "evil.json"
    assert out(capsys, "export", "evil", "--format", "json", "-o", str(file)) == ""
    assert json.loads(file.read_text("utf-8"))["messages"][0]["content"].startswith("Red \x1b[31m")
    assert "already" in out(capsys, "export", "evil", "-o", str(file), code=2)


def test_what_is_damaged_is_exported_with_a_warning(
    kept: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(kept.path("talk"), 3)
    assert run_command(["sessions", "export", "talk"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("localmoe: warning: Line 3 of ")
    assert "How are you?" not in shown.out
    assert "Fine." in shown.out
    assert "(line 3 is damaged)" in out(capsys, "list")


@pytest.mark.parametrize("command", ["list", "show one", "rm one", "rm --all --yes"])
def test_a_folder_that_can_not_be_read_is_told_from_an_empty_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path))
    sessions_folder().write_text("not a folder")
    assert "can't be read: Not a directory" in out(capsys, *command.split(), code=1)


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
def test_a_link_that_leads_nowhere_is_listed_and_can_be_removed(
    kept: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.path("loop").symlink_to("loop.jsonl")
    assert "It can't be read: Too many levels" in out(capsys, "list")
    assert "loop.jsonl can't be read" in out(capsys, "show", "loop", code=1)
    with pytest.raises(LocalMoeError, match=r"loop\.jsonl can't be read"):
        kept.open_or_new("loop")
    assert out(capsys, "rm", "loop").startswith("1 session deleted")


def test_rm_deletes_what_is_named(kept: Sessions, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no session tolk" in out(capsys, "rm", "evil", "tolk", code=2)
    assert kept.names() == ["evil", "talk"]
    assert out(capsys, "rm", "evil").startswith("1 session deleted, 2.")
    assert kept.names() == ["talk"]
    assert "delete 1 session. Say --all --yes" in out(capsys, "rm", "--all", code=2)
    assert "Name the sessions" in out(capsys, "rm", code=2)
    out(capsys, "rm", "--all", "--yes")
    assert out(capsys, "list") == ""
    assert list(kept.folder.iterdir()) == []


def test_rm_leaves_what_is_in_use(kept: Sessions, capsys: pytest.CaptureFixture[str]) -> None:
    with Session(kept, "evil"):
        assert run_command(["sessions", "rm", "--all", "--yes"]) == 1
        assert "evil is open in another chat" in capsys.readouterr().err
        assert run_command(["sessions", "rm", "evil"]) == 1
        assert capsys.readouterr().out == ""  # nothing was deleted, and no line says so
    assert kept.names() == ["evil"]


def test_hostile_files_are_chats_or_sentences(store: Sessions) -> None:
    """Random changes of a file: it opens, or is refused; nothing else, and it can be read."""
    whole = written(store, [SYSTEM, *TURN, *NEXT]).read_bytes()
    path, rng = store.path("one"), random.Random(0)
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.choice(b'\0\n"{}[]9-\xff\x80e')
        path.write_bytes(raw)
        with suppress(LocalMoeError):
            store.open("one").close()
        assert all(isinstance(m.content, str) for m in store.read("one").messages)
