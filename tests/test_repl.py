"""The chat at a real (pseudo) terminal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest

pexpect = pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("needs a pty", allow_module_level=True)

READY = r">[^>]*\x1b\[\?25h"  # the prompt, and the cursor shown behind it
ENDLESS = ["--temp", "1.5", "--min-p", "0", "--top-k", "0", "--top-p", "1", "--seed", "1"]


@pytest.fixture
def chat() -> Iterator[pexpect.spawn]:
    command = ["-m", "localmoe", "chat", "demo", "--temp", "0"]
    child = spawn(command)
    yield child
    child.close(force=True)


def spawn(command: list[str]) -> pexpect.spawn:
    """A chat at a terminal that is ready for a line; the terminal answers no questions."""
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=20, env=env)
    child.expect(READY)
    return child


def engine_of(chat: pexpect.spawn) -> psutil.Process:
    (engine,) = psutil.Process(chat.pid).children()
    return engine


def test_it_answers_and_remembers(chat: pexpect.spawn) -> None:
    chat.sendline("Hi! How are you?")
    chat.expect(r"\d+ tokens, [\d.]+ tok/s")
    chat.expect(READY)
    chat.sendline("/stats")
    chat.expect(r"(\d+) of 1024 tokens of context used")
    assert int(chat.match[1]) > 10
    chat.sendline("/clear")
    chat.expect_exact("A new conversation")
    chat.sendline("/stats")
    chat.expect_exact("0 of 1024 tokens")


def test_commands_and_leaving(chat: pexpect.spawn) -> None:
    chat.sendline("/?")
    chat.expect_exact("/clear")
    chat.sendline("/nonsense")
    chat.expect_exact("There is no command /nonsense")
    engine = engine_of(chat)
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    engine.wait(5)


def test_ctrl_d_leaves(chat: pexpect.spawn) -> None:
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    child = spawn(["-m", "localmoe", "chat", "demo", *ENDLESS])
    for _ in range(3):
        child.sendline("Tell me everything.")
        child.expect_exact("\x1b[?2004l")  # the line is read; what follows is the answer
        child.expect(r"\w+ ")
        child.sendintr()
        # or the answer was faster than the signal, which then may also take its figures' place
        if child.expect([r"stopped|tokens", READY]) == 0:
            child.expect(READY)
    child.sendline("/exit")
    child.expect(pexpect.EOF)


def test_ctrl_c_at_the_prompt_only_empties_the_line(chat: pexpect.spawn) -> None:
    chat.send("half a thou")
    chat.sendintr()
    chat.sendline("/stats")
    chat.expect_exact("0 of 1024 tokens")


def test_a_killed_engine_is_a_line_and_the_terminal_is_usable(chat: pexpect.spawn) -> None:
    engine_of(chat).send_signal(signal.SIGKILL)
    chat.sendline("Hi!")
    chat.expect(r"localmoe: The engine was killed[^\n]*\n")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 1
    assert "Traceback" not in (chat.before or "")
