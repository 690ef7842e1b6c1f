"""The chat at a real (pseudo) terminal, with the demo model in a real engine."""

from __future__ import annotations

import base64
import json
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("needs a pty", allow_module_level=True)

from terminal import Terminal

from localmoe.chat.session import Sessions
from localmoe.prompt.messages import Message
from localmoe.repl.commands import COMMANDS

CHAT = ["chat", "demo"]
GREEDY = ["--temp", "0"]
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
CTRL_C, CTRL_D, CTRL_G, UP, ALT_ENTER = "\x03", "\x04", "\x07", "\x1b[A", "\x1b\r"
CTRL_U = "\x15"
TOO_LONG = PASTE + "xq" * 1500 + PASTED


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_TUNE", "no")  # it takes seconds, once
    return tmp_path


@pytest.fixture
def chat(state: Path) -> Iterator[Terminal]:
    yield from a_chat(*GREEDY)


def a_chat(*options: str, **env: str) -> Iterator[Terminal]:
    terminal = Terminal([*CHAT, *options], **env)
    try:
        terminal.wait_prompt()
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def long(tmp_path: Path) -> list[str]:
    """Options for answers of more words of nonsense than are ever waited for."""
    grammar = tmp_path / "long.gbnf"
    grammar.write_text('root ::= ([a-z]{3,9} " "){200,200} [a-z]{3,9}')
    return ["--grammar", str(grammar), "--temp", "1.5", "--seed", "1"]


def engine_of(chat: Terminal) -> psutil.Process:
    """The engine, once it is loaded."""
    chat.enter("/plan")
    (engine,) = psutil.Process(chat.child.pid).children()
    return engine


def suspend(engine: psutil.Process, chat: Terminal) -> None:
    """Stop the engine for now, and wait until nothing is on its way from it any more."""
    engine.suspend()
    n_seen = -1
    while n_seen != len(chat.raw):
        n_seen = len(chat.raw)
        chat.pump(0.5)


def said(state: Path, name: str) -> list[dict[str, str]]:
    """The messages of a session, as its file has them."""
    records = [json.loads(line) for line in (state / "sessions" / f"{name}.jsonl").open()]
    return [record for record in records if record["type"] == "message"]


def questions(state: Path, name: str) -> list[str]:
    """Those of a session as it stands."""
    found = Sessions(state / "sessions").read(name).messages
    return [message.content for message in found if message.role == "user"]


def refused(chat: Terminal) -> None:
    """Ask what is too long, and empty the line that it is offered in again."""
    chat.send(CTRL_U + TOO_LONG + "\r")
    chat.wait_for("tokens; the context holds")
    chat.wait(lambda text: text.endswith("xq"))
    chat.send(CTRL_U)
    chat.wait(lambda _: chat.line == ">")


def after(text: str, mark: str) -> str:
    return text.partition(mark)[2]


def test_commands(chat: Terminal, state: Path) -> None:
    assert "/clear" in chat.enter("/?")
    assert "Did you mean /regen?" in chat.enter("/regn")
    assert chat.line == "> /regn"  # to be mended
    chat.enter(end=CTRL_C)
    assert "Nothing was asked yet" in chat.enter("/regen")
    answer = chat.enter("Hi! How are you?")
    assert len(answer.split()) > 2
    assert re.search(r"\d+ tokens, .* of 1,024 tokens of context used", chat.enter("/stats"))
    chat.enter("/stats on")
    assert "tok/s" in chat.enter("/regen")
    chat.enter("/stats off")
    assert "tok/s" not in chat.enter("What is your name?")
    assert "Taken back: What is your name?" in chat.enter("/undo")
    assert "last prompt" not in chat.enter("/show")
    assert re.search(r"messages +2$", chat.text, re.MULTILINE)
    assert "Be brief." in chat.enter("/system Be brief.")
    assert "no system message" in chat.enter("/system none")
    assert "temp is 0.5" in chat.enter("/set temp 0.5")
    assert "Did you mean top-k?" in chat.enter("/set topk 5")
    assert "temp must be a number, not 'hot'" in chat.enter("/set temp hot")
    assert "think is hide" in chat.enter("/think hide")
    assert "did not think" in chat.enter("/think")
    assert "KV cache" in chat.enter("/plan")
    assert "text models only" in chat.enter("/image")
    chat.enter("/copy")
    copied = re.search(r"\x1b]52;c;([^\x07]*)\x07", chat.raw)
    assert copied
    assert base64.b64decode(copied[1]).decode() in " ".join(chat.text.split())
    assert "has 0" in chat.enter("/copy 1")
    assert "Kept as here" in chat.enter("/save here")
    assert "here" in chat.enter("/sessions")
    assert "A new conversation" in chat.enter("/clear")
    assert "0 of 1,024" in chat.enter("/stats")
    assert "2 messages so far" in chat.enter("/load here")
    assert "There is no session her." in chat.enter("/load her")
    chat.enter("//exit")
    assert said(state, "here")[-2]["content"] == "/exit"
    assert "What was said so far is kept" in chat.enter("/model demo")
    assert "No model is called nonsens" in chat.enter("/model nonsens")
    engine = engine_of(chat)
    chat.send("/exit\r")
    assert chat.ends() == 0
    assert "localmoe chat --session here" in chat.text
    engine.wait(5)


def test_a_file_goes_before_a_message(chat: Terminal, state: Path, tmp_path: Path) -> None:
    notes, long = tmp_path / "notes.txt", tmp_path / "long.txt"
    notes.write_text("Cats purr.\n")
    long.write_text("word " * 3000)
    assert "of the context are free" in " ".join(chat.enter(f"/read {long}").split())
    long.write_bytes(b"\0" * 100)
    assert "is not a text" in " ".join(chat.enter(f"/read {long}").split())
    assert "goes with your next message" in chat.enter(f"/read {notes}")
    chat.enter("What do they do?")
    chat.enter("/save a")
    assert said(state, "a")[0]["content"] == (
        "notes.txt:\n```\nCats purr.\n```\n\nWhat do they do?"
    )


def test_a_file_that_leaves_no_room_is_refused_and_one_that_fits_is_not_lost(
    chat: Terminal, state: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cats.txt"
    file.write_text("Cats purr.\n" * 20)
    read = re.search(r"(\d+) tokens, goes with", chat.enter(f"/read {file}"))
    assert read
    assert "The file that was read is left out." in chat.enter(end=CTRL_C)
    file.write_text("Cats purr.\n" * (20 * 1070 // int(read[1])))
    assert re.search(r"9\d\d tokens; 8\d\d of the", " ".join(chat.enter(f"/read {file}").split()))
    file.write_text("Cats purr.\n")
    chat.enter(f"/read {file}")
    refused(chat)
    chat.enter("What do they do?")
    chat.enter("/save cats")
    assert questions(state, "cats") == ["cats.txt:\n```\nCats purr.\n```\n\nWhat do they do?"]


def test_an_edit_that_comes_to_nothing_takes_nothing_away(chat: Terminal, state: Path) -> None:
    chat.enter("Hi!")
    chat.enter("/save one")
    chat.enter("/edit")
    assert chat.line == "> Hi!"
    chat.enter(f"{CTRL_U}/load one")
    chat.enter("And you?")
    assert questions(state, "one") == ["Hi!", "And you?"]
    chat.enter("/edit")
    chat.enter(end=CTRL_C)
    chat.enter("More.")
    assert questions(state, "one") == ["Hi!", "And you?", "More."]
    chat.enter("/edit")
    refused(chat)
    assert "messages    6" in chat.enter("/show")
    chat.enter("/edit")
    refused(chat)
    chat.enter("Less.")
    assert questions(state, "one") == ["Hi!", "And you?", "Less."]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("/help", True), ("/hepl me", True), ("/", True), ("/set temp 0", True),
     ("/system Be kind.\nAnd brief.", True), ("/home/me/a.txt what is this", False),
     ("/etc is\na folder", False), ("/help\nme", False), ("//exit", False), (" /exit", False)],
)  # fmt: skip
def test_a_path_and_a_pasted_block_are_messages(text: str, is_one: bool) -> None:
    assert COMMANDS.is_one(text) is is_one


def test_messages_of_many_lines(chat: Terminal, state: Path, tmp_path: Path) -> None:
    chat.send('"""one\r')
    chat.send("two\r")
    chat.enter('three"""')
    chat.enter(f"four{ALT_ENTER}five\\\rsix")
    chat.enter("/a/path.txt")
    lines = [f"{n}" for n in range(200)]
    chat.send(PASTE + "\r".join(lines) + PASTED)
    chat.wait(lambda text: text.endswith(" 199"))
    chat.enter()
    chat.enter("/save many")
    asked = [m["content"] for m in said(state, "many") if m["role"] == "user"]
    assert asked == ["one\ntwo\nthree", "four\nfive\nsix", "/a/path.txt", "\n".join(lines)]


def test_the_editor_the_history_and_completion(state: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'Hi\\nthere' > \"$1\"\n")
    editor.chmod(0o755)
    for chat in a_chat(*GREEDY, VISUAL=str(editor)):
        chat.send(CTRL_G)
        chat.wait_for("\n. there")
        chat.enter()
        chat.send("/re")
        chat.wait_for("/?regen .*\n.*read|read .*\n.*regen")
        chat.enter(CTRL_C, end="")
    for chat in a_chat(*GREEDY):
        chat.send(UP)
        chat.wait_for("> Hi\n. there")
    assert (state / "typed" / "history").stat().st_mode & 0o777 == 0o600
    assert (state / "typed").stat().st_mode & 0o777 == 0o700


def test_ctrl_c_at_the_prompt_empties_the_line_then_says_how_to_leave(chat: Terminal) -> None:
    chat.enter("half a thou", end=CTRL_C)
    assert "Ctrl-D or /exit leaves" not in chat.text
    chat.enter(end=CTRL_C)
    assert "Ctrl-D or /exit leaves" in chat.text
    chat.send(CTRL_D)
    assert chat.ends() == 0


def test_ctrl_c_at_random_moments_stops_the_answer_and_not_the_program(
    state: Path, long: list[str]
) -> None:
    draw = random.Random(7)
    for chat in a_chat(*long, "-n", "30"):
        assert chat.enter("Hello.")
        for n in range(20):
            n_prompts = chat.n_prompts()
            chat.send(f"Tell me everything, {n}.\r")
            time.sleep(draw.uniform(0, 0.35))
            chat.send(CTRL_C)
            chat.wait_prompt(n_prompts + 1)
            if f"everything, {n}." in chat.line:  # taken back, and offered again
                chat.enter(end=CTRL_C)
            answer = chat.enter(f"And now, {n}?")
            assert re.search(r"\w", answer), chat.text


def test_what_is_typed_during_an_answer_is_asked_next(chat: Terminal, state: Path) -> None:
    chat.send("Hi! How are you?\rWhat is your name?\r/save typed\r")
    chat.wait_for("Kept as typed")
    assert questions(state, "typed") == ["Hi! How are you?", "What is your name?"]
    assert chat.text.count("What is your name?") == 1  # not printed into the answer too


def test_a_killed_engine_is_a_line_and_the_answer_goes_on(state: Path, long: list[str]) -> None:
    for chat in a_chat(*long):
        engine = engine_of(chat)
        n_prompts = chat.n_prompts()
        chat.send("Tell me everything.\r")
        chat.wait(lambda text: len(after(text, "everything.").split()) > 3)
        engine.send_signal(signal.SIGKILL)
        chat.wait_for(r"The engine was killed(.|\n)*begins anew\.")
        chat.wait_prompt(n_prompts + 1)
        assert len(after(chat.text, "anew.").split()) > 3
        assert chat.enter("Hello?")
        assert "Traceback" not in chat.text
        chat.send(CTRL_D)
        assert chat.ends() == 0


def test_an_engine_that_hangs_is_left_and_ended_by_another_ctrl_c(
    state: Path, long: list[str]
) -> None:
    for chat in a_chat(*long):
        engine = engine_of(chat)
        n_prompts = chat.n_prompts()
        chat.send("Tell me everything.\r")
        chat.wait(lambda text: len(after(text, "everything.").split()) > 3)
        suspend(engine, chat)
        chat.send(CTRL_C)
        chat.wait_prompt(n_prompts + 1)
        chat.send("Hello?\r")
        chat.wait_for("still being stopped; Ctrl-C ends it")
        chat.send(CTRL_C)
        chat.wait_prompt(n_prompts + 2)
        assert len(after(chat.text, "Hello?").split()) > 3
        assert not engine.is_running()


def test_an_answer_that_ended_late_is_kept(state: Path, long: list[str]) -> None:
    for chat in a_chat(*long, "--session", "late"):
        engine = engine_of(chat)
        n_prompts = chat.n_prompts()
        chat.send("Tell me everything.\r")
        chat.wait(lambda text: len(after(text, "everything.").split()) > 3)
        suspend(engine, chat)
        chat.send(CTRL_C)
        chat.wait_prompt(n_prompts + 1)
        engine.resume()
        chat.enter("/show")
        assert [m["role"] for m in said(state, "late")] == ["user", "assistant"]


def test_a_model_that_cannot_be_loaded_is_one_line_and_the_exit_code(state: Path) -> None:
    terminal = Terminal([*CHAT, "--ram", "1MiB"])
    assert terminal.ends() == 3
    assert terminal.text.count("localmoe: ") == 1
    terminal = Terminal([*CHAT, "--session", "../x"])
    assert terminal.ends() == 2


def test_a_session_goes_on(state: Path) -> None:
    for chat in a_chat(*GREEDY, "--session", "mine"):
        chat.enter("My name is Tom, and I like long walks in the hills when it rains. " * 3)
        chat.send(CTRL_D)
        assert chat.ends() == 0
    terminal = Terminal(["chat", "--continue", *GREEDY])
    terminal.wait_prompt(2)
    assert "mine: 2 messages so far" in terminal.text
    assert "> My name is Tom, and" in terminal.text
    terminal.enter("What is my name?")
    terminal.enter("/show")
    held = re.search(r"([\d,]+) of them held already", " ".join(terminal.text.split()))
    assert held
    assert int(held[1]) > 5
    terminal.close()
    assert [m["role"] for m in said(state, "mine")][:4] == ["user", "assistant"] * 2


def test_a_question_that_a_crash_left_is_offered_until_another_is_asked(state: Path) -> None:
    turn = [Message("user", "Hi!"), Message("assistant", "Ho.")]
    with Sessions(state / "sessions").open_or_new("broken", "demo") as session:
        session.sync([*turn, Message("user", "Why?")])
    for chat in a_chat(*GREEDY, "--session", "broken", "-q", "-s", "Be brief."):
        assert chat.line == "> Why?"
        chat.enter(end=CTRL_C)
        chat.enter("/clear")
        chat.enter("/load broken")
        assert chat.line == "> Why?"
        chat.send(CTRL_C + CTRL_D)
        assert chat.ends() == 0
        assert questions(state, "broken") == ["Hi!", "Why?"]
    for chat in a_chat(*GREEDY, "--session", "broken"):
        chat.wait_for(r"not answered. Enter asks it again\.\n> Why\?")
        chat.enter(f"{CTRL_U}Never mind.")
        assert questions(state, "broken") == ["Hi!", "Never mind."]


def test_what_is_loaded_without_saving_is_kept_from_save_on(state: Path) -> None:
    with Sessions(state / "sessions").open_or_new("kept", "demo") as session:
        session.sync([Message("user", "Hi!"), Message("assistant", "Ho.")])
    for says, is_kept in (("/stats", False), ("/save", True)):
        for chat in a_chat(*GREEDY, "--no-save"):
            chat.enter("/load kept")
            chat.enter("And you?")
            assert "what is new is not kept" in chat.enter("/show")
            assert questions(state, "kept") == ["Hi!"]
            assert ("Kept as kept." in chat.enter(says)) is is_kept
            chat.send(CTRL_D)
            assert chat.ends() == 0
            assert ("--session kept" in chat.text) is is_kept
    assert questions(state, "kept") == ["Hi!", "And you?"]


def test_that_it_cannot_be_kept_is_said_once_and_tried_again(state: Path) -> None:
    (state / "sessions").touch()  # a file where the folder would be
    for chat in a_chat(*GREEDY):
        chat.enter("Hi!")
        chat.enter("And you?")
        assert chat.text.count("can't be read") == 1
        (state / "sessions").unlink()
        chat.enter("So?")
        (name,) = Sessions(state / "sessions").names()
        assert questions(state, name) == ["Hi!", "And you?", "So?"]


def test_save_does_not_say_kept_where_it_is_not(state: Path) -> None:
    (state / "sessions").touch()
    for chat in a_chat(*GREEDY, "--no-save"):
        chat.enter("Hi!")
        assert "can't be read" in " ".join(chat.enter("/save").split())
        chat.send(CTRL_D)
        assert chat.ends() == 0
        assert "Kept" not in chat.text
        assert "Continue with" not in chat.text


def test_save_renames_what_had_no_name_and_leaves_what_had_one(chat: Terminal, state: Path) -> None:
    chat.enter("Hi!")
    assert "Kept as f1." in chat.enter("/save f1")
    assert Sessions(state / "sessions").names() == ["f1"]
    assert "It is kept as f1 already." in chat.enter("/save f1")
    assert "Kept as f2 from here on; f1 stays as it was." in chat.enter("/save f2")
    assert "There is a session f1 already." in chat.enter("/save f1")
    chat.enter("And you?")
    assert questions(state, "f1") == ["Hi!"]
    assert questions(state, "f2") == ["Hi!", "And you?"]


def test_what_is_set_counts_after_model_and_goes_back_to_what_the_chat_began_with(
    state: Path,
) -> None:
    for chat in a_chat("--temp", "0.25"):
        assert "temp is 2.0" in chat.enter("/set temp 2")
        assert "temp is 0.25." in chat.enter("/set temp default")
        assert "temp is left to the model." in chat.enter("/set temp none")
        assert "It counts once /model" in chat.enter("/set ctx-size 512")
        assert "pending     ctx-size 512: /model" in chat.enter("/show")
        assert "is kept" in chat.enter("/model")
        assert "of 512 tokens" in chat.enter("/stats")
        assert "pending" not in chat.enter("/show")
        chat.enter("/set ram 1MiB")
        assert "localmoe: " in chat.enter("/model")
        answer = chat.enter("Hi!")  # the model that was there goes on, and was not lost
        assert len(answer) > 3
        assert "again" not in answer
        assert "localmoe: " not in answer
        assert "of 512 tokens" in chat.enter("/stats")
        assert "ram is left to the model." in chat.enter("/set ram default")
        assert "pending" not in chat.enter("/show")


def test_nothing_is_kept_where_nothing_is_to_be_kept(state: Path) -> None:
    for chat in a_chat(*GREEDY, "--no-save"):
        chat.enter("Hi!")
        chat.send(CTRL_D)
        assert chat.ends() == 0
    assert not (state / "sessions").exists()
    assert not (state / "typed").exists()


def test_a_resize_in_the_middle_of_an_answer(state: Path, long: list[str]) -> None:
    terminal = Terminal([*CHAT, *long, "--session", "wide"], columns=50)
    terminal.wait_prompt()
    terminal.send("Tell me everything.\r")
    terminal.wait(lambda text: len(after(text, "everything.").split()) > 20)
    terminal.resize(70, 24)
    terminal.wait_prompt(2)
    answer = said(state, "wide")[-1]["content"]
    shown = after(terminal.text, "everything.")
    terminal.close()
    marks = str.maketrans("", "", "*_`#>|-+~\\•│─\n ")
    assert answer.translate(marks) in shown.translate(marks)


def test_plain_text_is_not_drawn_again(state: Path) -> None:
    for chat in a_chat(*GREEDY, "--plain"):
        n_before = len(chat.raw)
        assert len(chat.enter("Hi! How are you?").split()) > 5
        answer = chat.raw[n_before:].split("\x1b[?2004l")[1].split("\x1b[?2004h")[0]
        assert "\x1b[J" not in answer
