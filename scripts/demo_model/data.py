"""The conversations that the demo model learns from, by source, and those held out to score it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from demo_model.clean import is_vulgar_or_heavy, join_utterances, tidy
from demo_model.dialogues import Turns, spelled_out, vary_user
from demo_model.openers import is_held_out

PACKAGES = ("chitchat-dataset==0.9.0", "chatterbot-corpus==1.3.3")
SOURCES = ("chitchat", "questions", "prompts", "chatterbot", "written")
HELD_OUT_PERCENT = 3
N_WRITTEN = 60_000  # conversations spelled out of demo_dialogues.yaml
N_CHATTERBOT_COPIES = 6  # wordings of each exchange, since users type in many ways

# Left out of chatterbot-corpus: programs, and talk about real people.
_CHATTERBOT_LEFT_OUT = {"coding", "politics", "gossip"}
# In these files a later line goes on with the conversation; elsewhere it is another answer.
_CHATTERBOT_IN_TURNS = {"conversations", "greetings", "health", "history", "sports", "trivia"}
# A question with one of these words needs what was said before.
_NEEDS_CONTEXT = re.compile(
    r"\b(?:it|that|this|those|these|them|they|their|he|she|him|her|his|there|one|ones|too|else|then|also|either|yours"
    r"|yourself|again|still|mean|same|though|instead|and you|about you|but|because)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Conversations (user first, turns alternating) by source, and held-out ones of chitchat."""

    training: dict[str, list[Turns]]
    held_out: list[Turns]


def install_packages(folder: Path) -> None:
    """Put the two data packages into `folder`, not into the environment: they never ship."""
    if (folder / "chitchat_dataset").exists() and (folder / "chatterbot_corpus").exists():
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
    ]
    subprocess.run([*command, *PACKAGES], check=True)


def build_corpus(packages: Path, seed: int) -> Corpus:
    """Read, clean and pair everything; deterministic for a seed."""
    rng = random.Random(seed)
    training, held_out = _chitchat(packages / "chitchat_dataset" / "dataset.json")
    training["chatterbot"] = _chatterbot(packages / "chatterbot_corpus" / "data" / "english", rng)
    training["written"] = spelled_out(N_WRITTEN, rng)
    _refuse_openers(training)
    return Corpus(training, held_out)


def _refuse_openers(training: dict[str, list[Turns]]) -> None:
    """A last look at what will really be learnt: raises ValueError if an opener is in it."""
    for source, conversations in training.items():
        leaked = [turn for turns in conversations for turn in turns if is_held_out(turn)]
        if leaked:
            raise ValueError(
                f"{len(leaked)} openers are in the {source} data, such as {leaked[0]!r}"
            )


def _chitchat(path: Path) -> tuple[dict[str, list[Turns]], list[Turns]]:
    training: dict[str, list[Turns]] = {"chitchat": [], "questions": [], "prompts": []}
    held_out: list[Turns] = []
    for key, conversation in json.loads(path.read_text(encoding="utf-8")).items():
        messages = [join_utterances([u["text"] for u in turn]) for turn in conversation["messages"]]
        stretches = _clean_stretches(messages)
        if zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT:
            held_out += [stretch[: len(stretch) // 2 * 2] for stretch in stretches]
            continue
        for stretch in stretches:
            training["chitchat"] += _both_sides(stretch)
            training["questions"] += _questions(stretch)
        prompt = tidy(conversation.get("prompt") or "")
        if (
            prompt
            and messages
            and 5 <= len(messages[0].split()) <= 40
            and not is_held_out(messages[0])
        ):
            training["prompts"].append([prompt, messages[0]])
    return training, held_out


def _clean_stretches(messages: list[str]) -> list[list[str]]:
    """Runs of at least two messages in which nothing was refused."""
    stretches: list[list[str]] = [[]]
    for message in messages:
        if message and not is_held_out(message):
            stretches[-1].append(message)
        else:
            stretches.append([])
    return [stretch for stretch in stretches if len(stretch) >= 2]


def _both_sides(stretch: list[str]) -> list[Turns]:
    """The same stretch with the first and with the second speaker as the user."""
    views = (stretch, stretch[1:])
    return [view[: len(view) // 2 * 2] for view in views if len(view) >= 2]


def _questions(stretch: list[str]) -> list[Turns]:
    """Questions that can be asked out of the blue, each with its answer as a conversation."""
    return [
        [question, answer]
        for question, answer in zip(stretch, stretch[1:], strict=False)
        if re.fullmatch(r"[^.!?]+\?", question)
        and 3 <= len(question.split()) <= 14
        and re.search(r"\b(?:you|your)\b", question, re.IGNORECASE)
        and not _NEEDS_CONTEXT.search(question)
        and 2 <= len(answer.split()) <= 30
    ]


def _chatterbot(folder: Path, rng: random.Random) -> list[Turns]:
    pairs: dict[tuple[str, ...], None] = {}
    for path in sorted(folder.glob("*.yml")):
        if path.stem in _CHATTERBOT_LEFT_OUT:
            continue
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(lines, list):
                _add_chatterbot(
                    pairs, [str(line) for line in lines], path.stem in _CHATTERBOT_IN_TURNS
                )
    copies = [pair for pair in pairs for _ in range(N_CHATTERBOT_COPIES)]
    varied = [
        [vary_user(t, rng) if i % 2 == 0 else t for i, t in enumerate(pair)] for pair in copies
    ]
    return [turns for turns in varied if not any(map(is_held_out, turns))]


def _add_chatterbot(pairs: dict[tuple[str, ...], None], lines: list[str], in_turns: bool) -> None:
    turns = [tidy(line) for line in lines]
    if not turns or any(len(turn) > 220 or is_vulgar_or_heavy(turn) for turn in turns):
        return
    if turns[0][0].isalpha() and re.match(
        r"(?:who|what|where|when|why|how|do|does|are|is|can|have|did)\b", turns[0], re.I
    ):
        turns[0] = turns[0].rstrip(".!?") + "?"
    groups = _both_sides(turns) if in_turns else [[turns[0], answer] for answer in turns[1:]]
    for group in groups:
        if all(group) and not any(map(is_held_out, group)):
            pairs[tuple(group)] = None
