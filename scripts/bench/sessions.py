"""How fast a long chat opens again: from the state of its cache, and from its text.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/sessions.py /tmp/mixtral-1gb.gguf

A chat of about --tokens tokens is had once. Then it goes on with a short question, each time in a
fresh process, with its state and without by turns:

first token   seconds from where the engine has loaded the model until the first token of the
              answer; reading the session, checking and reading its state are counted
whole         seconds of `localmoe chat MODEL --session NAME -n 1` as a person would run it, loading
              and writing the new state at its end included

With --cold the state is thrown out of the page cache before it is read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from localmoe.chat.chat import Chat
from localmoe.chat.kv_snapshot import file_key, restore_state, save_state
from localmoe.chat.session import Sessions
from localmoe.config.settings import Settings
from localmoe.loading import load_local

NAME = "long"
QUESTION = "And what comes next?"
WORDS = ("the", "of", "time", "house", "water", "light", "music", "river", "night", "door")


def main() -> None:
    arguments = parse_arguments()
    if arguments.folder:
        print(json.dumps(one(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        compare(arguments, Path(scratch))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000, help="length of the chat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read the state from the disk")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begin", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, scratch: Path) -> None:
    """Have the chat, open it again both ways by turns, and print medians and their ratio."""
    kept = Sessions(scratch / "kept" / "sessions")
    begun = child(arguments, kept.folder, "--begin")
    n_bytes = kept.state_path(NAME).stat().st_size
    print(
        f"{arguments.model.name}: {begun['n_tokens']} tokens, state of {n_bytes / 2**20:.1f} MiB "
        f"written in {begun['save_s']:.2f} s, {arguments.threads} threads, "
        f"{'cold' if arguments.cold else 'warm'}"
    )
    found: dict[str, list[dict[str, Any]]] = {"state": [], "text": []}
    for n in range(arguments.rounds):
        for way in ("state", "text") if n % 2 else ("text", "state"):
            found[way].append(opened(arguments, kept, scratch / "used", way))
    expect_same(found)
    for what in ("first_token_s", "restore_s", "whole_s"):
        row = {way: statistics.median(r[what] for r in rows) for way, rows in found.items()}
        print(
            f"{what:<14} state {row['state']:8.3f}   text {row['text']:8.3f}   "
            f"text/state {row['text'] / row['state'] if row['state'] else 0:6.1f}"
        )


def opened(arguments: argparse.Namespace, kept: Sessions, state: Path, way: str) -> dict[str, Any]:
    """The chat, opened again one way: by the library for the first token, then by the command."""
    folder = state / "sessions"
    figures: dict[str, Any] = {}
    for measure in (child, whole):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept.folder, folder)
        path = Sessions(folder).state_path(NAME)
        if way == "text":
            path.unlink()
        elif arguments.cold:
            forget(path)
        figures |= measure(arguments, folder)
    return figures


def forget(path: Path) -> None:
    """Throw a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def expect_same(found: dict[str, list[dict[str, Any]]]) -> None:
    """The two ways must have computed different amounts, and come to the same token."""
    tokens = {row["token"] for rows in found.values() for row in rows}
    cached = {way: {row["n_cached"] for row in rows} for way, rows in found.items()}
    print(f"first token {tokens}, tokens of the prompt that were held: {cached}")
    if cached["text"] != {0} or 0 in cached["state"]:
        sys.exit("The two ways did not do what they are named after.")


def child(arguments: argparse.Namespace, folder: Path, *more: str) -> dict[str, Any]:
    command = [
        sys.executable, __file__, str(arguments.model), "--folder", str(folder),
        "--tokens", str(arguments.tokens), "--threads", str(arguments.threads), *more,
    ]  # fmt: skip
    figures: dict[str, Any] = json.loads(subprocess.check_output(command))
    return figures


def whole(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "localmoe", "chat", str(arguments.model), "--session", NAME, "-q",
        "-n", "1", "--temp", "0", "-c", str(context(arguments)), "-t", str(arguments.threads),
    ]  # fmt: skip
    env = {**os.environ, "LOCALMOE_STATE": str(folder.parent), "LOCALMOE_TUNE": "no"}
    started = time.perf_counter()
    subprocess.run(command, input=QUESTION + "\n", text=True, env=env, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return {"whole_s": time.perf_counter() - started}


def context(arguments: argparse.Namespace) -> int:
    return int(arguments.tokens) + 1024


# ---- in a process of its own ----


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model; then begin the chat, or go on with it up to the first token."""
    settings = Settings(
        ctx_size=context(arguments), threads=arguments.threads, temperature=0, tune=False
    )
    sessions = Sessions(arguments.folder)
    with load_local(arguments.model, settings, workload="chat") as loaded:
        started = time.perf_counter()
        chat = Chat(loaded.model, loaded.options(settings))
        with closing(sessions.open_or_new(NAME, str(arguments.model))) as session:
            session.use(str(arguments.model), file_key(loaded.meta.paths))
            chat.messages = session.messages
            if not arguments.begin:
                n_held = restore_state(session, loaded.engine)
                restored = time.perf_counter()
                return {"restore_s": restored - started, "n_held": n_held, **first(chat, started)}
            for question in questions(chat, arguments.tokens):
                for _ in chat.ask(question):
                    pass
            session.sync(chat.messages)
            tokens = chat.model.encode(chat.messages).tokens
            started = time.perf_counter()
            n_saved = save_state(sessions, session, loaded.engine, tokens)
            return {"n_tokens": n_saved, "save_s": time.perf_counter() - started}


def questions(chat: Chat, n_tokens: int) -> Iterator[str]:
    """Long questions until the chat has about so many tokens."""
    rng = random.Random(0)
    chat.options = type(chat.options)(chat.options.sampling, max_tokens=32)
    while (n_left := n_tokens - chat.n_tokens()) > 64:
        yield " ".join(rng.choices(WORDS, k=min(700, n_left - 48)))


def first(chat: Chat, started: float) -> dict[str, Any]:
    """Ask, up to the first token; and how much of the prompt had been held."""
    chat.options = type(chat.options)(chat.options.sampling, max_tokens=1)
    token, first_s, n_cached = -1, 0.0, -1
    for delta in chat.ask(QUESTION):
        if delta.tokens and token < 0:
            token, first_s = delta.tokens[0], time.perf_counter() - started
        if delta.usage:
            n_cached = delta.usage.cached_tokens
    return {"first_token_s": first_s, "token": token, "n_cached": n_cached}


if __name__ == "__main__":
    main()
