"""Spells out `scripts/demo_dialogues.yaml`: each exchange in many wordings, some in a row."""

from __future__ import annotations

import random
import re
from pathlib import Path

import yaml

from demo_model.openers import is_held_out

Turns = list[str]  # user, reply, user, reply, ...

DIALOGUES = Path(__file__).resolve().parent.parent / "demo_dialogues.yaml"
GREETINGS = (
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "Hi, ",
    "Hello, ",
    "Hi there! ",
    "Hey! ",
    "Good morning! ",
    "Good evening! ",
    "So, ",
)
_AMERICAN = (
    ("favourite", "favorite"),
    ("films", "movies"),
    ("film", "movie"),
    ("holiday", "vacation"),
    ("colour", "color"),
)


def spelled_out(count: int, rng: random.Random) -> list[Turns]:
    """`count` conversations: three in four a single exchange, the others several in a row."""
    source = yaml.safe_load(DIALOGUES.read_text(encoding="utf-8"))
    exchanges = [_allowed(exchange) for exchange in source["exchanges"]]
    exchanges = [exchange for exchange in exchanges if len(exchange) >= 2]
    weights = [(len(exchange[0]) * len(exchange[1])) ** 0.5 for exchange in exchanges]
    conversations: list[Turns] = []
    while len(conversations) < count:
        chosen = rng.choices(exchanges, weights, k=1 if rng.random() < 0.75 else rng.randint(2, 4))
        turns = [turn for exchange in chosen for turn in _worded(exchange, source["words"], rng)]
        if not any(map(is_held_out, turns)):  # again: a filled slot can spell an opener
            conversations.append(turns)
    return conversations


def _allowed(exchange: list[str]) -> list[list[str]]:
    """The wordings of each turn, without those that are too near to an opener."""
    turns: list[list[str]] = []
    for turn in exchange:
        wordings = [wording.strip() for wording in turn.split("|")]
        wordings = [wording for wording in wordings if not is_held_out(wording)]
        if not wordings:
            break
        turns.append(wordings)
    return turns[: len(turns) // 2 * 2]


def _worded(exchange: list[list[str]], words: dict[str, list[str]], rng: random.Random) -> Turns:
    filling = {slot: rng.choice(choices) for slot, choices in words.items()}
    n_turns = len(exchange) if rng.random() < 0.4 else 2
    turns = [_filled(rng.choice(wordings), filling) for wordings in exchange[:n_turns]]
    return [vary_user(turn, rng) if i % 2 == 0 else turn for i, turn in enumerate(turns)]


def _filled(wording: str, filling: dict[str, str]) -> str:
    text = re.sub(r"\{(\w+)\}", lambda slot: str(filling[slot[1]]), wording)
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda start: start[1] + start[2].upper(), text)


def vary_user(text: str, rng: random.Random) -> str:
    """A sentence as another user may type it: spelling, greeting, no capitals, no full stop."""
    varied = text
    if rng.random() < 0.4:
        for british, american in _AMERICAN:
            varied = varied.replace(british, american)
    if rng.random() < 0.2:
        varied = rng.choice(GREETINGS) + varied
    style = rng.random()
    if style < 0.15:
        varied = re.sub(r"[.!?,]", "", varied.lower())
    elif style < 0.25:
        varied = varied.rstrip(".!?")
    elif style < 0.3:
        varied = varied.lower()
    return varied
