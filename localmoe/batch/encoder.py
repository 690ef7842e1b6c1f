"""What a batch's requests become in tokens: within the context, or cut to fit where that is wanted.

Cut is the text of the last message of the user, or a text to be continued, at borders of tokens.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from ..engine.interfaces import Engine, Tokenizer
from ..engine.protocol import TextPiece
from ..engine.retry import VOCABULARY_CRASHES, CrashCounter
from ..errors import EngineError, PromptError, RequestError
from ..prompt.chat_template import TemplateFormat
from ..prompt.formats import TextFormat
from ..prompt.jinja_client import Renderer
from ..prompt.messages import PromptFormat
from ..prompt.mistral import MistralFormat
from .parameters import ItemError
from .requests import BatchRequest

Side = Literal["head", "tail", "middle"]
Answer = TypeVar("Answer")
N_TRIES = 8


class RestartingVocabulary:
    """A vocabulary whose engine is started again where a text made it die. Close it.

    The text then is a PromptError: it alone can't be asked.
    """

    def __init__(self, engine_of: Callable[[], Engine]) -> None:
        self._engine_of = engine_of
        self._engine: Engine | None = None
        self._crashes = CrashCounter(VOCABULARY_CRASHES)

    def tokenize(self, pieces: Sequence[TextPiece]) -> list[tuple[int, ...]]:
        """Returns the ids of each piece, as Tokenizer has it."""
        return self._ask(lambda engine: engine.tokenize(pieces))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens."""
        return self._ask(lambda engine: engine.detokenize(tokens))

    def close(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ask(self, question: Callable[[Engine], Answer]) -> Answer:
        if self._engine is None:
            self._engine = self._engine_of()
        try:
            answer = question(self._engine)
        except EngineError as error:
            self._crashes.add(error)
            self.close()
            raise PromptError(f"The prompt crashed the engine: {error.message}") from None
        self._crashes.reset()
        return answer


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes prompts for a context of `n_ctx` tokens, the answer included.

    `truncate` says where a prompt that is too long is cut; None refuses it.
    """

    format: PromptFormat
    vocabulary: Tokenizer
    n_ctx: int
    truncate: Side | None = None

    def encode(self, request: BatchRequest) -> tuple[tuple[int, ...], int]:
        """The tokens of a prompt, and how many were cut from it. Raises ItemError."""
        try:
            tokens = self._tokens(request)
            if len(tokens) < self.n_ctx:
                return tokens, 0
            if self.truncate is None:
                raise self._too_long(len(tokens))
            return self._cut(request, tokens, self.truncate)
        except (PromptError, RequestError) as error:
            raise ItemError("invalid_prompt", str(error), request.custom_id) from None
        except ItemError as error:
            error.custom_id = request.custom_id
            raise

    def _tokens(self, request: BatchRequest) -> tuple[int, ...]:
        if request.is_chat:
            return self._format(request).encode(request.messages, self.vocabulary).tokens
        return text_begins(self.format) + self.vocabulary.tokenize([TextPiece(request.text)])[0]

    def _format(self, request: BatchRequest) -> PromptFormat:
        if not (request.variables and isinstance(self.format, TemplateFormat)):
            return self.format
        return replace(self.format, variables={**self.format.variables, **request.variables})

    def _too_long(self, n_tokens: int) -> ItemError:
        return ItemError(
            "context_length_exceeded",
            f"The prompt has {n_tokens} tokens; the context holds {self.n_ctx}, "
            "the answer included.",
        )

    def _cut(
        self, request: BatchRequest, whole: tuple[int, ...], side: Side
    ) -> tuple[tuple[int, ...], int]:
        """Take tokens out of the text until the prompt leaves room for the answer."""
        wanted = request.options.max_tokens or self.n_ctx // 4
        room = self.n_ctx - min(wanted, self.n_ctx // 2)
        text, put_back = cuttable(request)
        ids = self.vocabulary.tokenize([TextPiece(text)])[0]
        tokens, n_kept = whole, len(ids)
        for _ in range(N_TRIES):  # where a text is cut, its neighbours may become other tokens
            n_kept -= len(tokens) - room
            if n_kept < 1:
                break
            tokens = self._tokens(put_back(self._kept(text, ids, n_kept, side)))
            if len(tokens) <= room:
                return tokens, len(whole) - len(tokens)
        raise self._too_long(len(whole))

    def _kept(self, text: str, ids: Sequence[int], n_kept: int, side: Side) -> str:
        """What is left of a text of these tokens when only so many are kept."""
        n_tail = {"head": n_kept, "tail": 0, "middle": n_kept // 2}[side]
        n_head = n_kept - n_tail
        head = head_of_text(text, self.vocabulary.detokenize(ids[:n_head])) if n_head else ""
        tail = tail_of_text(text, self.vocabulary.detokenize(ids[-n_tail:])) if n_tail else ""
        return head + tail if head else tail.lstrip(" ")


def text_begins(format: PromptFormat) -> tuple[int, ...]:
    """What stands before a text that is to be continued as it is: BOS, where the model wants it."""
    if isinstance(format, MistralFormat):
        return (format.bos,)
    if isinstance(format, TextFormat) and format.bos is not None:
        return (format.bos,)
    if isinstance(format, TemplateFormat) and format.add_bos and format.bos is not None:
        return (format.bos,)
    return ()


def with_renderer(format: PromptFormat, renderer: Renderer) -> PromptFormat:
    """A format for many conversations; those of templates then share processes that render."""
    return replace(format, renderer=renderer) if isinstance(format, TemplateFormat) else format


def cuttable(request: BatchRequest) -> tuple[str, Callable[[str], BatchRequest]]:
    """The text of a request that may be cut, and what the request is with another in its place."""
    if not request.is_chat:
        return request.text, lambda text: replace(request, text=text)
    said = request.messages
    last = max(n for n, message in enumerate(said) if message.role == "user")

    def put_back(text: str) -> BatchRequest:
        message = replace(said[last], content=text)
        return replace(request, messages=(*said[:last], message, *said[last + 1 :]))

    return said[last].content, put_back


def head_of_text(text: str, spelled: str) -> str:
    """As much of the beginning of a text as some of its tokens spell.

    A vocabulary may spell a space before the first word; half a character at the end is left out.
    """
    if spelled[:1] == " " != text[:1]:
        spelled = spelled[1:]
    return os.path.commonprefix([text, spelled])


def tail_of_text(text: str, spelled: str) -> str:
    """As much of the end of a text as some of its tokens spell."""
    return os.path.commonprefix([text[::-1], spelled[::-1]])[::-1]
