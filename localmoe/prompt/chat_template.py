"""A model's own Jinja template: rendered whole in a process of its own, and tokenized whole.

Two things are cut out and treated apart. Where text of a message spells a control token, that span
is encoded as plain text. And where an answer's sampled ids are known and its text stands in the
prompt as it was sampled, the ids stand there, so that the prompt begins with the very tokens that
the model saw and wrote.

To know which text comes from where, the conversation is rendered twice: once *plain*, with shadows
(injection_guard.py) only for what spells control tokens, and once *covered*, with all
text of messages in
shadows and a single mark for each answer that has ids. If both say the same, the covered one tells
the origin of every character; if a template decides by what messages say, the plain one counts, as
long as its control tokens are those of the covered one, which no message can have touched.
Templates that cut the thinking out of past answers look for its marks: the plain one has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

from ..engine.interfaces import Tokenizer
from ..engine.protocol import TextPiece
from ..errors import PromptError
from .injection_guard import (
    ControlTokens,
    Provenance,
    TextSpan,
    control_tokens,
    control_tokens_of_any_case,
    spelled_by_messages,
)
from .jinja_client import Renderer, RenderError, Rendering, RenderJob, render
from .messages import Message, Prompt, check_conversation, without_empty_system
from .segments import encode_parts

JOIN = "\n\n"
THINKING = ("<think>", "</think>")
CLOSERS = re.compile(r"</[^<>]{1,40}>|\[/[^\[\]]{1,40}\]|<[^<>]{1,40}\|>")
"""What a template may cut a past answer's thinking off behind."""
PARTS = re.compile(r"""\[\s*['"](?:type|text)['"]\s*\]|\.(?:type|text)\b""")
"""How templates speak of the parts of a content."""
OTHER_FILE = "Try another file of this model; templates differ from one to the next."


@dataclass(frozen=True, slots=True)
class TemplateFormat:
    """A template, and what it and the tokenizer need of the model's vocabulary.

    `puts_space`: llama.cpp puts a space before each text that it encodes (SentencePiece).
    `renderer`, where many conversations are encoded, spares a process for each.
    """

    template: str
    bos: int | None = None
    bos_text: str = ""
    eos_text: str = ""
    add_bos: bool = False
    puts_space: bool = False
    control_tokens: frozenset[str] = frozenset()
    variables: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    renderer: Renderer | None = None

    @property
    def answers_start_text(self) -> bool:
        """Answers go on with the text that a template began."""
        return False

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Prompt:
        """The prompt of a conversation. Raises PromptError."""
        layout = self._layout(without_empty_system(check_conversation(messages)))
        ids = encode_parts(
            layout.parts(), tokenizer, puts_space=self.puts_space, control=self._control
        )
        return self._with_one_bos(layout.text, ids)

    @property
    def _control(self) -> frozenset[str]:
        return self.control_tokens | {self.bos_text, self.eos_text}

    def _layout(self, messages: list[Message]) -> RenderedPrompt:
        """Renders the conversation in the first form in which the template leaves out no text.

        Raises PromptError where there is none: a prompt without what somebody said is no prompt.
        """
        refused: RenderError | None = None
        missing: Message | None = None
        for form in conversation_forms(messages):
            for as_parts in (False, True) if PARTS.search(self.template) else (False,):
                try:
                    layout = self._render(form, as_parts=as_parts)
                except RenderError as error:
                    if error.kind == "limit":
                        raise template_error(error) from None
                    refused = error
                    continue
                lost = first_missing(form, layout.text)
                if lost is None:
                    return layout
                missing = missing or lost
        if refused is not None:
            raise template_error(refused) from None
        assert missing is not None
        raise PromptError(
            f"The model's prompt template leaves out what the {missing.role} says: "
            f"{ascii(missing.content[:40])}.",
            OTHER_FILE,
        )

    def _render(self, messages: list[Message], *, as_parts: bool) -> RenderedPrompt:
        """Raises RenderError. With `as_parts`, a content is a list of one part of type text."""
        contents = [message.content for message in messages]
        shadows = Provenance(contents, taken=self.template + self.bos_text + self.eos_text)
        marks = [shadows.mark() if is_marked(messages, n) else "" for n in range(len(messages))]
        plain = [self._plain(message, shadows) for message in messages]
        covered = [mark or shadows.cover(text) for mark, text in zip(marks, contents, strict=True)]
        prompted = messages[-1].role != "assistant"
        n_asked = last_sampled(messages)
        written = partial(rendering, as_parts=as_parts)
        texts = self._texts(
            written(messages, plain, prompted=prompted),
            written(messages, covered, prompted=prompted),
            *(written(messages[:n_asked], plain, prompted=p) for p in (True, False) if n_asked),
        )
        renders = Renders(*texts[:2], *map(shadows.uncover, texts[2:]))
        marked = {mark: message for mark, message in zip(marks, messages, strict=True) if mark}
        return assemble_prompt(renders, marked, shadows, control_tokens(self._control), prompted)

    def _plain(self, message: Message, shadows: Provenance) -> str:
        """A message's text with what spells control tokens in shadows."""
        text, spans = (
            message.content,
            control_tokens_of_any_case(self._control).spans(message.content),
        )
        if message.role == "assistant":
            spans = [span for span in spans if text[span.start : span.end] not in THINKING]
        return shadows.cover_spans(text, spans)

    def _texts(self, *renders: Rendering) -> list[str]:
        variables = {**self.variables, "bos_token": self.bos_text, "eos_token": self.eos_text}
        job = RenderJob(self.template, renders, variables, self.now)
        return self.renderer.render(job) if self.renderer else render(job, self.env)

    def _with_one_bos(self, text: str, ids: list[int]) -> Prompt:
        """BOS once where the model wants it, whether or not the template writes it."""
        if self.bos is not None:
            while ids[:2] == [self.bos, self.bos]:
                ids, text = ids[1:], text.removeprefix(self.bos_text)
            if self.add_bos and ids[:1] != [self.bos]:
                ids, text = [self.bos, *ids], self.bos_text + text
        return Prompt(text, tuple(ids))


@dataclass(frozen=True, slots=True)
class Renders:
    """A conversation rendered plain and covered, and what the model saw before its last answer:
    with and without the words that a template puts there for it.
    """

    plain: str
    covered: str
    prompted: str = ""
    unprompted: str = ""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A rendered prompt: what of it must not become control tokens, and where ids are known."""

    text: str
    spelled: Sequence[TextSpan]
    sampled: Sequence[tuple[TextSpan, tuple[int, ...]]]

    def parts(self) -> Iterator[TextPiece | tuple[int, ...]]:
        """The prompt in order: template text, plain text, and ids."""
        done = 0
        for span, ids in self.sampled:
            yield from self._pieces(TextSpan(done, span.start))
            yield ids
            done = span.end
        yield from self._pieces(TextSpan(done, len(self.text)))

    def _pieces(self, within: TextSpan) -> Iterator[TextPiece]:
        done = within.start
        for start, end in self.spelled:
            start, end = max(start, done), min(end, within.end)
            if start < end:
                yield TextPiece(self.text[done:start], special=True)
                yield TextPiece(self.text[start:end])
                done = end
        yield TextPiece(self.text[done : within.end], special=True)


def conversation_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yields a conversation as it is, and then with ever more of what the system says moved.

    First what the system says later goes into the user's turn that follows, with all that it says
    at the beginning in one message; then everything goes into turns of the user.
    """
    tried = [messages]
    yield messages
    for keeps_first in (True, False):
        form = fold_system(messages, keeps_first=keeps_first)
        if form not in tried:
            tried.append(form)
            yield form


def fold_system(messages: list[Message], *, keeps_first: bool) -> list[Message]:
    """Returns what the system says before the words of the user that follow, a blank line between.

    With `keeps_first`, what it says before all others stays a message of its own. Behind the last
    words of the user, it comes after these.
    """
    n_first = next(n for n, message in enumerate(messages) if message.role != "system")
    found: list[Message] = []
    waiting: list[str] = []
    for n, message in enumerate(messages):
        if message.role == "system":
            waiting.append(message.content)
            if keeps_first and n == n_first - 1:
                found.append(Message("system", JOIN.join(waiting)))
                waiting = []
        elif message.role == "user":
            found.append(replace(message, content=JOIN.join([*waiting, message.content])))
            waiting = []
        else:
            found.append(message)
    if waiting:
        last = max(n for n, message in enumerate(found) if message.role == "user")
        found[last] = replace(found[last], content=JOIN.join([found[last].content, *waiting]))
    return found


def first_missing(messages: Sequence[Message], text: str) -> Message | None:
    """Returns the first message whose words a rendered text lacks.

    A template may trim them, write them as JSON, and leave out what an answer thought before.
    """
    position = 0
    for message in messages:
        said = message.content.strip()
        if message.role == "assistant":
            said = CLOSERS.split(said)[-1].strip()
        forms = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
        places = [(text.find(form, position), len(form)) for form in forms]
        found = [place + length for place, length in places if place >= 0]
        if found:
            position = min(found)
        elif not any(form in text for form in forms):
            return message
    return None


def is_marked(messages: Sequence[Message], number: int) -> bool:
    """Whether the place of a message's text has to be known: ids to put there, or the open end."""
    message = messages[number]
    if message.role != "assistant" or not message.content:
        return False
    return bool(message.tokens) or number == len(messages) - 1


def last_sampled(messages: Sequence[Message]) -> int:
    """The number of messages before the last answer that has ids; 0 where there is none."""
    return max((n for n, message in enumerate(messages) if message.tokens), default=0)


def rendering(
    messages: Sequence[Message], contents: Sequence[str], *, prompted: bool, as_parts: bool
) -> Rendering:
    """Returns messages with other contents, as texts or as lists of one part each."""
    pairs = [
        {"role": m.role, "content": [{"type": "text", "text": text}] if as_parts else text}
        for m, text in zip(messages, contents, strict=False)
    ]
    return Rendering(pairs, add_generation_prompt=prompted)


def assemble_prompt(
    renders: Renders,
    marked: Mapping[str, Message],
    shadows: Provenance,
    control: ControlTokens,
    prompted: bool,
) -> RenderedPrompt:
    """Put together what the renders tell; without `prompted` the last marked answer stays open."""
    filled = renders.covered
    for mark, message in marked.items():
        filled = filled.replace(mark, shadows.cover(message.content))
    origin = renders.plain
    if shadows.uncover(filled) == shadows.uncover(origin) or (
        control.spelled(filled) != control.spelled(origin)
    ):
        origin = filled
    text = shadows.uncover(origin)
    places = find_answers(text, renders.covered, marked, shadows)
    if not prompted:
        end = open_end(text, *list(marked.items())[-1], places)
        text, origin = text[:end], origin[:end]
    sampled = [
        (place, marked[mark].tokens or ())
        for mark, place in places.items()
        if marked[mark].tokens and follows_prompt(text[: place.start], renders)
    ]
    return RenderedPrompt(text, spelled_by_messages(origin, shadows, control), sampled)


def follows_prompt(before: str, renders: Renders) -> bool:
    """Whether an answer stands where a prompt would have ended when it was sampled.

    A template may write answers of the past behind other words than those it asks with (harmony,
    or an empty <think>); then ids would come to stand where the model did not put them.
    """
    asks_with = renders.prompted.removeprefix(renders.unprompted)
    return before.endswith(asks_with) if asks_with else before == renders.prompted


def find_answers(
    text: str, covered: str, marked: Mapping[str, Message], shadows: Provenance
) -> dict[str, TextSpan]:
    """Where in a text the marked answers stand, word for word; one that doesn't is left out.

    What the covered render has between two marks leads from one place to the next.
    """
    places: dict[str, TextSpan] = {}
    at = [covered.find(mark) for mark in marked]
    if not at or at != sorted(at) or any(covered.count(mark) != 1 for mark in marked):
        return places
    ends = [*at[1:], len(covered)]
    position = at[0]
    if not text.startswith(shadows.uncover(covered[:position])):
        return places
    for (mark, message), start, end in zip(marked.items(), at, ends, strict=True):
        after = shadows.uncover(covered[start + 1 : end])
        if text.startswith(message.content + after, position):
            places[mark] = TextSpan(position, position + len(message.content))
            position += len(message.content + after)
        elif text.startswith(message.content.strip() + after, position):
            position += len(message.content.strip() + after)
        else:
            break
    return places


def open_end(text: str, mark: str, last: Message, places: Mapping[str, TextSpan]) -> int:
    """Where the prompt of an answer that is to be continued ends. Raises PromptError."""
    if mark in places:
        return places[mark].end
    content = last.content.strip()
    start = text.rfind(content)
    if not content or start < 0:
        raise PromptError(
            "The model's prompt template changes the last answer, so it can't be continued.",
            "End the conversation with a message of the user.",
        )
    return start + len(content)


def template_error(error: RenderError) -> PromptError:
    """A template that gave no text, as a sentence."""
    says = error.message.rstrip(".")
    sentences = {
        "raised": f"The model's prompt template refuses this conversation: {says}.",
        "unsafe": f"The model's prompt template tried what is not allowed: {says}.",
        "syntax": f"The model's prompt template has an error in {says}.",
        "limit": f"The model's prompt template was stopped: {says}.",
        "failed": f"The model's prompt template failed: {says}.",
    }
    hint = "Let user and assistant take turns." if error.kind == "raised" else OTHER_FILE
    return PromptError(sentences[error.kind], hint)
