"""A conversation without a terminal: each line of stdin is a message."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import LocalMoeError
from ..prompt.reasoning import Answer
from . import render

if TYPE_CHECKING:
    from .conversation import Conversation


def chat_in_lines(conversation: Conversation, *, as_json: bool) -> None:
    """Answer every line. Raises LocalMoeError where one can't be answered; what was said is
    printed (with `as_json`) and kept (with a session) all the same."""
    answers: list[dict[str, Any]] = []
    conversation.ready()
    conversation.on_note = render.note
    if session := conversation.session:
        _say_unanswered(session.name, session.unanswered)
    try:
        for line in sys.stdin:
            text = line.rstrip("\r\n")
            if text.strip():
                answers += _turn(conversation, text, as_json)
    except (LocalMoeError, KeyboardInterrupt):
        if as_json:
            _document(conversation, answers)
        raise
    if as_json:
        _document(conversation, answers)


def _say_unanswered(name: str, question: str) -> None:
    """A question that a crash left without an answer stays in the file until another is asked."""
    from .slash_talk import first_line

    if question:
        render.note(f"The last question of {name} was not answered: {first_line(question)}")


def _turn(conversation: Conversation, text: str, as_json: bool) -> list[dict[str, Any]]:
    """One message and its answer; gives the facts of it."""
    answer = Answer()
    try:
        with closing(conversation.chat.ask(text)) as deltas:
            for delta in deltas:
                answer.add(delta)
                if not as_json and delta.kind == "text":
                    render.answer_text(delta.text)
    finally:
        if not as_json and answer.text:
            render.answer_text("\n")
        conversation.save()
    if answer.last is None:
        return []
    facts = asdict(answer.last)
    return [{k: facts[k] for k in ("finish_reason", "usage", "timings")}]


def _document(conversation: Conversation, answers: list[dict[str, Any]]) -> None:
    said = [{"role": m.role, "content": m.content} for m in conversation.messages]
    render.document({"messages": said, "answers": answers})
