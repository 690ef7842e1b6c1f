"""LocalMoE: the Python front door.

    from localmoe import LocalMoE

    with LocalMoE("demo") as moe:
        reply = moe.chat([{"role": "user", "content": "Hi!"}], max_tokens=40)
        print(reply["content"])

Messages have the Hugging Face form, the same in and out: a reply is a message, and goes back into
the list as it is. Every error is a LocalMoeError.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from .batch.encoder import Encoder, RestartingVocabulary
from .batch.parameters import ItemError, biases_of
from .batch.requests import Defaults
from .batch.runner import BatchResult, answers
from .catalog.catalog import model_aliases
from .chat.chat import AnswerOptions
from .config.settings import load_settings
from .engine.client import EngineProcess
from .engine.protocol import Delta, FinishReason, Sampling, Timings, Usage
from .engine.retry import stream_with_retry
from .errors import EngineError, LocalMoeError, PromptError, UsageError
from .loading import EngineReloader, OpenModel, open_engine, open_vocabulary
from .prompt.messages import Message, parse_messages
from .prompt.reasoning import Answer
from .structured.check import check_answer, check_sampling, unheld_parts

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What can be said for one answer; the rest is the model's own default."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int
    stop: str | Sequence[str]
    json_schema: str | dict[str, Any] | bool
    grammar: str


class Reply(dict[str, Any]):
    """An assistant's message, {"role": ..., "content": ...}, that knows how it came about.

    `tokens` are the ones that were sampled: given back in a conversation, they are used as they
    are, so that nothing of the history is encoded or computed twice. `thinking` is what a reasoning
    model thought before, which is no part of the message.
    """

    def __init__(self, answer: Answer) -> None:
        last = answer.last
        if last is None or not (last.finish_reason and last.usage and last.timings):
            raise LocalMoeError("The answer is incomplete.", "Its stream was closed early.")
        super().__init__(role="assistant", content=answer.text)
        self.text = answer.text
        self.thinking = answer.thinking
        self.tokens = answer.message().tokens
        self.finish_reason: FinishReason = last.finish_reason
        self.usage: Usage = last.usage
        self.timings: Timings = last.timings


class LocalMoE:
    """A loaded model. Close it, or use it as a context manager; its process ends with it.

    `model` is a name of `localmoe list`, a repository of the Hub, or the path of a GGUF file;
    `settings` are those of config.Settings, such as `ctx_size=4096` or `n_gpu_layers="all"`, or
    `parallel=16` to answer batches so many requests at a time. An engine that dies is started
    again, and what it was to answer begins anew.
    """

    def __init__(self, model: str | os.PathLike[str], **settings: Any) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if not isinstance(model, str):
            raise UsageError(f"A model is a name or a path, not {type(model).__name__}.")
        self._model = model
        self._settings = load_settings(settings, model=model, aliases=model_aliases)
        self._open: OpenModel | None = open_engine(model, self._settings)
        self._revive = EngineReloader(self._open, self._settings)

    @property
    def _loaded(self) -> OpenModel:
        """Raises LocalMoeError after `close`."""
        if self._open is None:
            again = f"Open it again: LocalMoE({self._model!r})."
            raise LocalMoeError("This model was closed.", again)
        return self._open

    def chat(self, messages: Sequence[Any], **options: Unpack[Options]) -> Reply:
        """Answer a conversation. Raises LocalMoeError."""
        answer = Answer()
        for delta in self.stream(messages, **options):
            answer.add(delta)
        return Reply(answer)

    def stream(
        self, messages: Sequence[Any], **options: Unpack[Options]
    ) -> Generator[Delta, None, None]:
        """Answer piece by piece; the last piece has finish_reason, usage and timings.

        A piece has `kind` "text" or "thinking". After one with `anew`, what came before it is void:
        the engine died, and the answer begins once more. Raises LocalMoeError behind the last
        piece where the answer isn't what its JSON schema or grammar demands.
        """
        chosen = self._answer_options(dict(options))
        asked = conversation(messages)

        def ask() -> Generator[Delta, None, None]:
            model = self._loaded.model
            return model.answer(model.encode(asked), chosen)

        return with_form(stream_with_retry(ask, self._come_back), chosen.sampling)

    def batch(
        self, requests: Iterable[Any], *, share: bool = True, **options: Unpack[Options]
    ) -> Generator[BatchResult, None, None]:
        """Answer many requests, each as it finishes; `index` says which one a result is of.

        A request is a prompt, a list of messages, or an object as a line of `localmoe batch` has
        it. What can't be asked is a result with an error. With `share`, requests that begin alike
        pay for their beginning once. An engine that dies is started again.
        """
        loaded = self._loaded
        chosen = self._answer_options(dict(options))
        vocabulary = RestartingVocabulary(lambda: open_vocabulary(loaded.meta.paths[0]))
        encoder = Encoder(loaded.model.format, vocabulary, loaded.model.n_ctx)
        defaults = Defaults(chosen, self._settings.system)
        with closing(vocabulary):
            yield from answers(
                requests,
                encoder,
                self._living_engine,
                defaults,
                reuse_prefix=share,
                reasoning_markers=loaded.model.reasoning_markers,
            )

    def _living_engine(self) -> EngineProcess:
        """The engine, started again where it died."""
        with self._revive.lock:
            if not self._loaded.engine.is_alive:
                self._revive(EngineError("The engine stopped."))
            return self._loaded.engine

    def _come_back(self, error: EngineError, has_begun: bool) -> None:
        with self._revive.lock:
            if self._open is None:  # closed while the answer came
                raise error
            self._revive(error)

    def close(self) -> None:
        """End the engine. Closing twice is no mistake."""
        with self._revive.lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def __enter__(self) -> LocalMoE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer_options(self, options: dict[str, Any]) -> AnswerOptions:
        """What was said for one answer, on top of the model's own. Raises UsageError."""
        bias = options.pop("logit_bias", None)
        chosen = self._loaded.options(self._with(options))
        if bias is None:
            return chosen
        try:
            biases = biases_of(bias)
        except ItemError as error:
            raise UsageError(error.message) from None
        return replace(chosen, sampling=replace(chosen.sampling, logit_bias=biases))

    def _with(self, options: dict[str, Any]) -> Any:
        known = Options.__annotations__
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
                raise UsageError(f"There is no option {name}.", hint)
        stop = options.get("stop")
        if isinstance(stop, Iterable) and not isinstance(stop, (str, bytes, dict)):
            options["stop"] = tuple(stop)
        if isinstance(options.get("json_schema"), (dict, bool)):
            try:
                options["json_schema"] = json.dumps(options["json_schema"])
            except (TypeError, ValueError, RecursionError) as error:
                raise UsageError(f"json_schema can't be written as JSON: {error}.") from None
        for name in ("json_schema", "grammar"):
            if not isinstance(options.get(name), (str, type(None))):
                kind = type(options[name]).__name__
                raise UsageError(f"{name} is {kind}, and should be a text.")
        form = {name: options.get(name) for name in ("json_schema", "grammar")}
        if any(form.values()):
            asked = Sampling(grammar=form["grammar"], json_schema=form["json_schema"])
            check_sampling(asked)
            for sentence in unheld_parts(asked):
                warnings.warn(sentence, stacklevel=3)
        else:
            form = {}  # that of the model's own settings stays
        said = {**self._settings.model_dump(exclude_unset=True), **options, **form}
        return load_settings(said, env={})


def with_form(
    deltas: Generator[Delta, None, None], sampling: Sampling
) -> Generator[Delta, None, None]:
    """The answer, and at its end an error where it hasn't the form that it must have."""
    answer = Answer()
    with closing(deltas):
        for delta in deltas:
            answer.add(delta)
            yield delta
    check_answer(answer.text, answer.last.finish_reason if answer.last else None, sampling)


def conversation(messages: Sequence[Any]) -> list[Message]:
    """Checked messages; replies keep the tokens that were sampled for them."""
    if not isinstance(messages, Iterable) or isinstance(messages, (str, bytes, Mapping)):
        raise PromptError(f"The messages are {type(messages).__name__}, and should be a list.")
    messages = list(messages)
    parsed = parse_messages(messages)
    return [
        replace(message, tokens=given.tokens)
        if isinstance(given, Reply) and given["content"] == given.text
        else message
        for message, given in zip(parsed, messages, strict=False)
    ]


__all__ = ["BatchResult", "Delta", "LocalMoE", "LocalMoeError", "Options", "Reply"]
