"""How long a person waits in a chat, at a real pseudo terminal. Needs a quiet machine.

    python scripts/bench/chat.py
    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/chat.py --long /tmp/mixtral-1gb.gguf

With the demo model, medians of --rounds fresh processes: from the start of the command to its
prompt, and from Enter to the first character of the answer. With --long FILE: the time to the first
token (the engine's own first_token_s) at turn 2 and at turn --turns of one chat, with messages of
equal length; their ratio says whether what was said is computed again.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pexpect

WAIT_SECONDS = 120
PROMPT = "\x1b[?2004h"
"""prompt_toolkit turns bracketed paste on when a prompt is there."""
READ = "\x1b[?2004l"
MESSAGE = "Tell me what you think about this: " + "one two three four five six seven " * 4
FIRST_TOKEN = re.compile(r"first after ([\d.]+) s")
CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]")


class Terminal:
    """A chat at a terminal, and what it has written."""

    def __init__(self, *arguments: str) -> None:
        self.started = time.perf_counter()
        self.text = ""
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "LOCALMOE_TUNE": "no",
        }
        self.child = pexpect.spawn(
            sys.executable, ["-m", "localmoe", "chat", *arguments], encoding="utf-8",
            timeout=WAIT_SECONDS, env=environment, dimensions=(24, 80),
        )  # fmt: skip
        self.child.delaybeforesend = None

    def read(self) -> str:
        piece = str(self.child.read_nonblocking(1 << 16, WAIT_SECONDS))
        self.text += piece
        return piece

    def wait_prompt(self) -> None:
        """Wait until the next prompt is drawn."""
        while self.text.rfind(PROMPT) <= self.text.rfind(READ) or not self.text.endswith("h"):
            self.read()

    def ask(self, message: str) -> float:
        """Send a message; gives the seconds from Enter to the first visible character."""
        n_before = len(self.text)
        asked = time.perf_counter()
        self.child.send(message + "\r")
        while True:
            self.read()
            answer = self.text[n_before:].partition(READ)[2]
            if CONTROL.sub("", answer).strip():
                return time.perf_counter() - asked

    def close(self) -> None:
        self.child.close(force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", type=Path, help="a model for a chat of many turns")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument(
        "--max-tokens", type=int, default=32, help="of each answer of the long chat"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        os.environ["LOCALMOE_STATE"] = state
        if arguments.long:
            long_chat(arguments.long, arguments.turns, arguments.max_tokens)
        else:
            short_chats(arguments.rounds)


def short_chats(rounds: int) -> None:
    """Fresh chats with the demo model: one message at once, one when the model is loaded."""
    prompts, at_once, loaded = [], [], []
    for _ in range(rounds + 1):
        terminal = Terminal("demo", "--temp", "0")
        terminal.wait_prompt()
        prompts.append(time.perf_counter() - terminal.started)
        at_once.append(terminal.ask("Hi!"))
        terminal.wait_prompt()
        loaded.append(terminal.ask("How are you?"))
        terminal.close()
    for name, seconds in (
        ("start to prompt", prompts),
        ("Enter to first character, typed at once", at_once),
        ("Enter to first character, model loaded", loaded),
    ):
        kept = seconds[1:]  # the first filled the page cache
        spread = f"{min(kept):.3f} to {max(kept):.3f}"
        print(f"{name:<42}{statistics.median(kept):.3f} s ({spread}, {rounds} runs)")


def long_chat(path: Path, n_turns: int, max_tokens: int) -> None:
    """One chat with messages and answers of equal length."""
    n_ctx = (len(MESSAGE) // 3 + max_tokens + 32) * (n_turns + 2)
    terminal = Terminal(
        str(path), "--temp", "0", "--stats", "--no-save",
        "-n", str(max_tokens), "-c", str(n_ctx),
    )  # fmt: skip
    terminal.wait_prompt()
    seconds: list[float] = []
    while len(seconds) < n_turns:
        terminal.ask(MESSAGE)
        terminal.wait_prompt()
        seconds = [float(found) for found in FIRST_TOKEN.findall(terminal.text)]
        print(f"turn {len(seconds):>2}: first token after {seconds[-1]:.2f} s", flush=True)
    terminal.close()
    print(f"turn {n_turns} / turn 2: {seconds[-1] / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
