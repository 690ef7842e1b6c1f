"""The input of a batch: which form a file has, and what each of its lines asks.

A file holds OpenAI batch lines (`custom_id`, `method`, `url`, `body`), those of Azure (shorter
URLs) and Mistral (a body alone), plain ones (`{"prompt": ...}` or `{"messages": ...}`, with
sampling beside them if wanted), or one prompt a line as text. Further columns are the person's own
and are left alone, unless they look like a parameter that was misspelt or misplaced. A line that
can't be asked is an ItemError of its own, whatever is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, BinaryIO, Literal

from ..chat.chat import AnswerOptions
from ..errors import PromptError, UsageError
from ..files import MAX_LINE_BYTES, InputLine, read_lines
from ..prompt.formats import thinking_variables
from ..prompt.messages import Message, is_unsaid, parse_messages
from ..structured.check import is_structured
from .parameters import (
    ItemError,
    answer_options,
    check_text,
    is_parameter,
    near_parameter,
    printable_name,
    template_variables,
)

Form = Literal["json", "text"]
BOM = b"\xef\xbb\xbf"
MAX_ID_CHARS = 512
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ENDPOINT = re.compile(r"(?:https?://[^/]+)?(?:/[^?]*?)??/(chat/)?completions/?(?:\?.*)?")
"""The two endpoints as OpenAI, Azure, Mistral and people with a whole URL write them."""
ENVELOPE = ("custom_id", "method", "url", "body")
PLAIN = ("custom_id", "id", "prompt", "messages", "system")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every request that doesn't say otherwise."""

    options: AnswerOptions = AnswerOptions()
    system: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What is asked: a conversation, or with no messages, a text to be continued as it stands.

    `variables` are told to the model's prompt template beside those of the batch.
    """

    custom_id: str | None
    messages: tuple[Message, ...]
    text: str
    options: AnswerOptions
    variables: Mapping[str, object] = field(default_factory=dict)

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
        variables = template_variables(body)
        if is_structured(options.sampling):  # its text begins at once, so nothing is thought before
            variables = {**thinking_variables("off"), **variables}
        if not is_chat:
            return BatchRequest(custom_id, (), _text(body_prompt(value)), options)
        return BatchRequest(custom_id, _messages(value, defaults.system), "", options, variables)
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
    _check_columns(value, ENVELOPE)
    method, body = value.get("method"), value.get("body")
    if method is not None and not (isinstance(method, str) and method.upper() == "POST"):
        raise ItemError("invalid_request", 'The "method" must be "POST".')
    if not isinstance(body, dict):
        raise ItemError("invalid_request", 'The "body" is not an object.')
    is_chat = _is_chat(value.get("url"), body)
    name = "messages" if is_chat else "prompt"
    if name not in body:
        url = CHAT if is_chat else COMPLETION
        raise ItemError("invalid_request", f'The body has no "{name}", which {url} wants.')
    return {key: given for key, given in body.items() if key != name}, is_chat


def _is_chat(url: object, body: Mapping[str, Any]) -> bool:
    """Whether an endpoint is that of chats; where none is named, the body tells."""
    if url is None:
        return "messages" in body or "prompt" not in body
    found = ENDPOINT.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise ItemError("invalid_url", f'The "url" must be "{CHAT}" or "{COMPLETION}".')
    return found[1] is not None


def _check_columns(value: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raises ItemError where a further column of a line looks like a parameter gone astray."""
    for name, given in value.items():
        if name in own or is_unsaid(given):
            continue
        if own is ENVELOPE and is_parameter(name):
            raise ItemError(
                "unknown_parameter",
                f'The line has {printable_name(name)} beside its "body"; move it into it.',
            )
        near = near_parameter(name, own)
        if near:
            raise ItemError(
                "unknown_parameter",
                f'The line has {printable_name(name)}, which isn\'t known. Did you mean "{near}"?',
            )


def _plain(value: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options of a plain line; what it asks is a chat, be it a single prompt or messages."""
    names = [name for name in ("prompt", "messages") if name in value]
    if len(names) != 1:
        problem = "both a prompt and messages" if names else "neither a prompt nor messages"
        raise ItemError("invalid_request", f"The line has {problem}.")
    _check_columns(value, PLAIN)
    return {key: given for key, given in value.items() if is_parameter(key)}, True


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
    system = _own_system(value) or system
    given = body["messages"] if "messages" in body else _as_messages(body["prompt"])
    try:
        messages = parse_messages(given)
    except PromptError as error:
        raise ItemError("invalid_messages", str(error)) from None
    if system is not None and not any(message.role == "system" for message in messages):
        messages = [Message("system", system), *messages]
    return tuple(messages)


def _own_system(value: Mapping[str, Any]) -> str | None:
    """The system message that stands beside the prompt of a plain line."""
    system = None if "body" in value else value.get("system")
    if not is_unsaid(system) and not isinstance(system, str):
        raise ItemError("invalid_request", 'The "system" is not a text.')
    return system or None


def _as_messages(prompt: object) -> list[dict[str, object]]:
    if not isinstance(prompt, str):
        raise ItemError("invalid_request", 'The "prompt" is not a text.')
    return [{"role": "user", "content": prompt}]
