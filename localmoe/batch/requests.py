"""The lines of a batch's input: which form a file has, and what each line asks.

A file holds OpenAI batch lines (`custom_id`, `method`, `url`, `body`), plain ones
(`{"prompt": ...}` or `{"messages": ...}`, with sampling beside them), or one prompt a line as text.
The keys of a body are those of OpenAI's chat and text completions, and the samplers that this
engine has besides. A key that changes nothing (`"n": 1`) is allowed. One that would change what the
answer means, and isn't supported, is refused by its name. A line that can't be asked is an
ItemError of its own and stops no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, BinaryIO, Literal

from ..chat.chat import AnswerOptions
from ..engine.protocol import Sampling
from ..errors import PromptError, UsageError
from ..files import MAX_LINE_BYTES, InputLine, read_lines
from ..prompt.messages import NOT_TEXT, Message, is_unsaid, parse_messages
from ..structured.check import check_sampling


class ItemError(Exception):
    """A request that can't be asked or answered; `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a key may have; `field` is what it is called here."""

    field: str
    low: float
    high: float
    whole: bool = False


SAMPLING = {
    "temperature": Range("temperature", 0, 100),
    "top_k": Range("top_k", 0, 2**31 - 1, whole=True),
    "top_p": Range("top_p", 1e-9, 1),
    "min_p": Range("min_p", 0, 1),
    "repeat_penalty": Range("repeat_penalty", 1e-9, 1e9),
    "seed": Range("seed", -(2**63), 2**64 - 1, whole=True),
}
LENGTHS = ("max_completion_tokens", "max_tokens")
LENGTH = Range("max_tokens", 1, 2**31 - 1, whole=True)
TEXTS = ("grammar", "json_schema")
# what says nothing about the answer
NOTES = frozenset([
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
])  # fmt: skip
# what is allowed only empty or with the value that changes nothing, as JSON
NEUTRAL = {
    "n": ("1",),
    "best_of": ("1",),
    "stream": ("false",),
    "stream_options": (),
    "logprobs": ("false",),
    "top_logprobs": ("0",),
    "logit_bias": ("{}",),
    "presence_penalty": ("0", "0.0"),
    "frequency_penalty": ("0", "0.0"),
    "echo": ("false",),
    "suffix": (),
    "tools": (),
    "functions": (),
    "tool_choice": ('"none"', '"auto"'),
    "function_call": ('"none"', '"auto"'),
    "parallel_tool_calls": ("true", "false"),
    "modalities": ('["text"]',),
    "prediction": (),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
KNOWN = frozenset([*SAMPLING, *LENGTHS, *TEXTS, "stop", "response_format", *NOTES])


def answer_options(body: Mapping[str, Any], defaults: AnswerOptions) -> AnswerOptions:
    """The defaults with what a body says on top. Raises ItemError.

    `body` has neither messages nor a prompt any more; null stands for what isn't said.
    """
    said = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown(said)
    chosen: dict[str, Any] = {
        SAMPLING[name].field: _number(name, value, SAMPLING[name])
        for name, value in said.items()
        if name in SAMPLING
    }
    form = _form(said)
    if form is not None:
        chosen.update({"grammar": None, "json_schema": None, **form})
    sampling = replace(defaults.sampling, **chosen)
    if form:
        _check_form(sampling)
    return AnswerOptions(
        sampling,
        _length(said, defaults.max_tokens),
        _stop(said["stop"]) if "stop" in said else defaults.stop,
    )


def _refuse_unknown(said: Mapping[str, Any]) -> None:
    for name, value in said.items():
        if name in KNOWN:
            continue
        if name not in NEUTRAL:
            raise ItemError(
                "unknown_parameter", f"The body has {printable_name(name)}, which isn't known."
            )
        if not is_unsaid(value) and json.dumps(value) not in NEUTRAL[name]:
            allowed = " or ".join(NEUTRAL[name])
            raise ItemError(
                "unsupported_parameter",
                f"The body has {printable_name(name)}, which isn't supported"
                f"{f' but as {allowed}' if allowed else ''}.",
            )


def _number(name: str, value: object, range: Range) -> float | int:
    kinds = (int,) if range.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if range.whole else "a number"
        raise ItemError("invalid_value", f"{printable_name(name)} must be {kind}.")
    if not range.low <= value <= range.high:
        raise ItemError(
            "invalid_value",
            f"{printable_name(name)} is {value:.10g}; "
            f"it must be {range.low:.10g} to {range.high:.10g}.",
        )
    return value


def _length(said: Mapping[str, Any], default: int | None) -> int | None:
    given = {name: _number(name, said[name], LENGTH) for name in LENGTHS if name in said}
    if len(set(given.values())) > 1:
        raise ItemError(
            "invalid_value", '"max_tokens" and "max_completion_tokens" say different things.'
        )
    return int(next(iter(given.values()))) if given else default


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ItemError("invalid_value", '"stop" must be a text or a list of texts.')
    for text in texts:
        if not text:
            raise ItemError("invalid_value", 'A text of "stop" is empty.')
        check_text('"stop"', text)
    return tuple(texts)


def _form(said: Mapping[str, Any]) -> dict[str, str] | None:
    """The form that an answer has to have: a grammar or a schema, nothing, or None: not said."""
    names = [name for name in (*TEXTS, "response_format") if name in said]
    if len(names) > 1:
        raise ItemError(
            "invalid_value",
            f"{printable_name(names[0])} and {printable_name(names[1])} exclude another.",
        )
    if not names:
        return None
    name, value = names[0], said[names[0]]
    if name == "response_format":
        return _response_format(value)
    if name == "json_schema" and isinstance(value, (dict, bool)):
        return {"json_schema": json.dumps(value)}
    if not isinstance(value, str):
        raise ItemError("invalid_value", f"{printable_name(name)} must be a text.")
    check_text(printable_name(name), value)
    return {name: value}


def _check_form(sampling: Sampling) -> None:
    try:
        check_sampling(sampling)
    except UsageError as error:
        raise ItemError("invalid_value", str(error)) from None


def _response_format(value: object) -> dict[str, str]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if kind != "json_schema":
        raise ItemError(
            "invalid_value",
            'The type of "response_format" must be "text", "json_object" or "json_schema".',
        )
    assert isinstance(value, dict)
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise ItemError("invalid_value", '"response_format" has no "json_schema" with a "schema".')
    return {"json_schema": json.dumps(schema)}


def check_text(what: str, text: str) -> None:
    """Raises ItemError where a text can't be written in UTF-8 or holds a NUL."""
    bad = NOT_TEXT.search(text)
    if bad:
        problem = "a NUL character" if bad[0] == "\0" else "half of a surrogate pair"
        raise ItemError("invalid_value", f"{what} holds {problem} at character {bad.start() + 1}.")


def printable_name(name: object) -> str:
    """A name from outside, short and in ASCII."""
    text = ascii(name)[1:-1] if isinstance(name, str) else ascii(name)
    return f'"{text[:40]}{"..." if len(text) > 40 else ""}"'


Form = Literal["json", "text"]
BOM = b"\xef\xbb\xbf"
MAX_ID_CHARS = 512
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ENVELOPE = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every request that doesn't say otherwise."""

    options: AnswerOptions = AnswerOptions()
    system: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What is asked: a conversation, or with no messages, a text to be continued as it stands."""

    custom_id: str | None
    messages: tuple[Message, ...]
    text: str
    options: AnswerOptions

    @property
    def is_chat(self) -> bool:
        """Whether it asks a conversation, not a text to be continued."""
        return bool(self.messages)


def form_of(name: str, stream: BinaryIO) -> Form:
    """The form of a file, by its name or by its first line that isn't blank; it is rewound.

    Raises UsageError on a JSON list, which is one value and not lines.
    """
    first = next((line.raw for line in read_lines(stream) if not is_blank(line)), None) or b""
    stream.seek(0)
    first = first.removeprefix(BOM).lstrip()
    suffix = PurePath(name).suffix.lower()
    if suffix == ".txt":
        return "text"
    if suffix in (".json", ".jsonl", ".ndjson") or first.startswith(b"{"):
        if first.startswith(b"["):
            raise UsageError(
                f"{name} holds a JSON list; a batch wants one object a line.",
                f"Try: jq -c '.[]' {name} > lines.jsonl",
            )
        return "json"
    return "text"


def is_blank(line: InputLine) -> bool:
    """Whether a line holds nothing but white space."""
    return line.raw is not None and not line.raw.strip()


def request_of_line(line: InputLine, form: Form, defaults: Defaults) -> BatchRequest:
    """What a line asks. Raises ItemError, with the line's custom_id where it could be read."""
    text = decode_line(line)
    if form == "text":
        return request_of({"prompt": text}, defaults)
    return request_of(json_of(text), defaults)


def decode_line(line: InputLine) -> str:
    """A line as text; a byte order mark is allowed where a file begins. Raises ItemError."""
    raw = line.raw
    if raw is None:
        raise ItemError(
            "line_too_long",
            f"The line has {line.n_bytes:,} bytes; {MAX_LINE_BYTES:,} are the most allowed.",
        )
    if raw.startswith(BOM):
        if line.number > 1:
            raise ItemError("invalid_json", "The line begins with a byte order mark.")
        raw = raw.removeprefix(BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ItemError(
            "invalid_encoding", f"The line is not UTF-8: see its byte {error.start + 1}."
        ) from None


def json_of(text: str) -> object:
    """A line's JSON value. Raises ItemError; NaN and Infinity are not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"The line is not JSON: {error.msg} at character {error.colno}."
    except RecursionError:
        message = "The line is nested too deeply."
    except ValueError as error:
        message = f"The line is not JSON: {str(error).split(';')[0]}."
    raise ItemError("invalid_json", message)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")


def request_of(value: object, defaults: Defaults) -> BatchRequest:
    """What a decoded line asks, or a request of a Python program. Raises ItemError."""
    if not isinstance(value, Mapping):
        raise ItemError("invalid_request", "The line is not a JSON object.")
    custom_id = id_of(value)
    try:
        body, is_chat = _opened(value) if "body" in value or "url" in value else _plain(value)
        options = answer_options(body, defaults.options)
        if not is_chat:
            return BatchRequest(custom_id, (), _text(body_prompt(value)), options)
        return BatchRequest(custom_id, _messages(value, defaults.system), "", options)
    except ItemError as error:
        error.custom_id = custom_id
        raise
    except RecursionError:
        raise ItemError("invalid_json", "The line is nested too deeply.", custom_id) from None


def id_of(value: Mapping[str, Any]) -> str | None:
    """The custom_id of a line, or of a plain one the id. Raises ItemError."""
    given = value.get("custom_id")
    if given is None and "body" not in value:
        given = value.get("id")
    if given is None:
        return None
    text = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(text, str) or not 0 < len(text) <= MAX_ID_CHARS:
        raise ItemError(
            "invalid_custom_id", f"The custom_id must be a text of 1 to {MAX_ID_CHARS} characters."
        )
    try:
        check_text("The custom_id", text)
    except ItemError as error:
        raise ItemError("invalid_custom_id", error.message) from None
    return text


def _opened(value: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The body of an OpenAI batch line without its prompt, and whether it is for a chat."""
    for name in value:
        if name not in ENVELOPE:
            raise ItemError(
                "unknown_parameter", f"The line has {printable_name(name)}, which isn't known."
            )
    if value.get("method", "POST") != "POST":
        raise ItemError("invalid_request", 'The "method" must be "POST".')
    url, body = value.get("url"), value.get("body")
    if url not in (CHAT, COMPLETION):
        raise ItemError("invalid_url", f'The "url" must be "{CHAT}" or "{COMPLETION}".')
    if not isinstance(body, dict):
        raise ItemError("invalid_request", 'The "body" is not an object.')
    name = "messages" if url == CHAT else "prompt"
    if name not in body:
        raise ItemError("invalid_request", f'The body has no "{name}", which {url} wants.')
    return {key: given for key, given in body.items() if key != name}, url == CHAT


def _plain(value: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options of a plain line; what it asks is a chat, be it a single prompt or messages."""
    names = [name for name in ("prompt", "messages") if name in value]
    if len(names) != 1:
        problem = "both a prompt and messages" if names else "neither a prompt nor messages"
        raise ItemError("invalid_request", f"The line has {problem}.")
    taken = ("custom_id", "id", "prompt", "messages")
    return {key: given for key, given in value.items() if key not in taken}, True


def body_prompt(value: Mapping[str, Any]) -> object:
    """Returns a body's prompt; a list of one is its only element."""
    prompt = value["body"]["prompt"]
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


def _text(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt:
        raise ItemError("invalid_request", 'The "prompt" must be one text that is not empty.')
    check_text('The "prompt"', prompt)
    return prompt


def _messages(value: Mapping[str, Any], system: str | None) -> tuple[Message, ...]:
    """The conversation of a line, behind the system message that holds for all if it has none."""
    body = value.get("body", value)
    given = body["messages"] if "messages" in body else _as_messages(body["prompt"])
    try:
        messages = parse_messages(given)
    except PromptError as error:
        raise ItemError("invalid_messages", str(error)) from None
    if system is not None and not any(message.role == "system" for message in messages):
        messages = [Message("system", system), *messages]
    return tuple(messages)


def _as_messages(prompt: object) -> list[dict[str, object]]:
    if not isinstance(prompt, str):
        raise ItemError("invalid_request", 'The "prompt" is not a text.')
    return [{"role": "user", "content": prompt}]
