"""What of a conversation fits into the context: which whole turns stay, and room for an answer.

A prompt must leave an eighth of the context for the answer (less where fewer tokens are asked for):
half of what dropping down to three quarters frees, so that a context that was full lasts for some
turns. A question that no other turn makes room for may take all but LEAST_ANSWER tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import PromptError
from ..prompt.messages import Message, Prompt

ANSWER_SHARE = 8
"""The part of the context that is kept for an answer is one in so many."""
KEPT_SHARE = 3, 4
"""What dropped turns leave is at most this part of the context."""
LEAST_ANSWER = 32
SUMMARY_SHARE = 16
"""A summary takes at most one in so many of the context: it has to fit between the two above."""
SUMMARIZE = (
    "Summarize our conversation so far in a few short sentences: what was asked, what was answered,"
    " and every name, number and decision that still matters."
)

Encode = Callable[[Sequence[Message]], Prompt]


@dataclass(frozen=True, slots=True)
class ContextBudget:
    """A context of `n_ctx` tokens, and how many of them an answer may have at most."""

    n_ctx: int
    max_tokens: int | None = None
    n_summary: int = 0  # tokens that a summary is going to take of the prompt

    @property
    def n_answer(self) -> int:
        """Tokens that are kept free for the answer."""
        fair = max(1, self.n_ctx // ANSWER_SHARE)
        return min(self.max_tokens or fair, fair)

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room for a whole answer."""
        return len(prompt.tokens) + self.n_answer <= self.n_ctx

    def fits_barely(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room for a short answer."""
        return len(prompt.tokens) + min(LEAST_ANSWER, self.n_answer) <= self.n_ctx

    def is_eased(self, prompt: Prompt) -> bool:
        """Whether enough is free for the next turns too."""
        part, whole = KEPT_SHARE
        return whole * (len(prompt.tokens) + self.n_summary) <= part * self.n_ctx


@dataclass(frozen=True, slots=True)
class DroppedTurns:
    """Turns that leave: so many, of so many messages and tokens; and the prompt without them."""

    prompt: Prompt
    n_turns: int
    n_messages: int
    n_tokens: int

    @property
    def turns(self) -> str:
        """For a sentence: "2 oldest turns (1,230 tokens) no longer fit"."""
        s, fit = ("", "fits") if self.n_turns == 1 else ("s", "fit")
        return f"{self.n_turns} oldest turn{s} ({self.n_tokens:,} tokens) no longer {fit}"


def system_and_turns(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages that a conversation begins with, and all that follows."""
    n = next((n for n, m in enumerate(messages) if m.role != "system"), len(messages))
    return list(messages[:n]), list(messages[n:])


def beginnings(turns: Sequence[Message]) -> list[int]:
    """Where each turn begins: a question, or several in a row, and what followed."""
    return [
        n
        for n, message in enumerate(turns)
        if n == 0 or (message.role == "user" and turns[n - 1].role != "user")
    ]


def cut(
    encode: Encode,
    system: Sequence[Message],
    turns: Sequence[Message],
    whole: Prompt,
    room: ContextBudget,
) -> DroppedTurns:
    """Leave out as few of the oldest turns as make room; the last one, the question, stays.

    `whole` is the prompt of all. Raises PromptError where the question is too long by itself.
    """
    starts = beginnings(turns)
    prompts: dict[int, Prompt] = {0: whole}

    def without(n_turns: int) -> Prompt:
        if n_turns not in prompts:
            prompts[n_turns] = encode([*system, *turns[starts[n_turns] :]])
        return prompts[n_turns]

    last = len(starts) - 1
    if not room.fits_barely(without(last)):
        raise too_long(len(without(last).tokens), room, alone=not system)
    n_less, n_turns = 0, last  # the first is not enough, the second is, or all that there is
    while n_turns - n_less > 1:
        middle = (n_less + n_turns) // 2
        n_less, n_turns = (n_less, middle) if room.is_eased(without(middle)) else (middle, n_turns)
    prompt = without(n_turns)
    return DroppedTurns(prompt, n_turns, starts[n_turns], len(whole.tokens) - len(prompt.tokens))


def too_long(n_tokens: int, room: ContextBudget, *, alone: bool) -> PromptError:
    """A question that doesn't fit, whatever is left out."""
    what = "The message has" if alone else "The message and the system prompt have"
    return PromptError(
        f"{what} {n_tokens:,} tokens; the context holds {room.n_ctx:,}, the answer included.",
        f"Shorten it, or ask for more room: -c {2 * n_tokens}.",
    )


def full(n_tokens: int, room: ContextBudget) -> PromptError:
    """A conversation that is to stop where its context is full."""
    return PromptError(
        f"The conversation has {n_tokens:,} tokens with this message; the context holds "
        f"{room.n_ctx:,}, and {room.n_answer:,} of them are kept for the answer.",
        f"Begin anew (/clear), let the oldest turns go (--on-full drop, or summarize), or ask for "
        f"more room: -c {2 * room.n_ctx}.",
    )
