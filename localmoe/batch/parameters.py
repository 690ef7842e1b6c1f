"""The body of a batch line: which keys it may have, and what they ask of an answer.

The keys are those of the OpenAI API's chat and text completions, and the samplers that this engine
has besides. A key that changes nothing as it stands (`"n": 1`) is allowed; one that would change
what the answer means and isn't supported is refused by its name: nothing is silently left out.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..chat.chat import AnswerOptions
from ..engine.protocol import Sampling
from ..errors import UsageError
from ..prompt.formats import thinking_variables
from ..prompt.messages import NOT_TEXT, is_unsaid
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
    "top_p": Range("top_p", 0, 1),
    "min_p": Range("min_p", 0, 1),
    "repeat_penalty": Range("repeat_penalty", 1e-9, 1e9),
    "repetition_penalty": Range("repeat_penalty", 1e-9, 1e9),
    "presence_penalty": Range("presence_penalty", -2, 2),
    "frequency_penalty": Range("frequency_penalty", -2, 2),
    "seed": Range("seed", -(2**63), 2**64 - 1, whole=True),
}
MAX_NAME = 40
BIAS = Range("logit_bias", -100, 100)
TOKEN = re.compile(r"\d{1,9}", re.ASCII)
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
    "verbosity": (),
    "web_search_options": (),
}
EFFORTS = {"none": "off", "minimal": "low", "low": "low", "medium": "medium", "high": "high",
           "xhigh": "high"}  # fmt: skip
"""OpenAI's levels of reasoning as `--think` has them."""
OUR_VARIABLES = frozenset(["messages", "add_generation_prompt", "tools", "documents"])
PROMPT_KEYS = ("reasoning_effort", "chat_template_kwargs")
KNOWN = frozenset([
    *SAMPLING, *LENGTHS, *TEXTS, *PROMPT_KEYS, "stop", "logit_bias", "response_format", *NOTES,
])  # fmt: skip


OTHER_NAMES = {
    "temp": "temperature",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "stop_sequences": "stop",
    "guided_json": "json_schema",
    "guided_grammar": "grammar",
}
"""What other programs call parameters of ours."""
SIMILAR = 0.85
"""How much of a name must be that of a parameter to be taken for a slip (difflib)."""


def is_parameter(name: object) -> bool:
    """Whether a key says something of the answer, or is known to say nothing."""
    return name in KNOWN or name in NEUTRAL


def near_parameter(name: object, others: Sequence[str] = ()) -> str:
    """The parameter, or one of some other keys, that a name was likely meant to be; else ""."""
    if not isinstance(name, str) or is_parameter(name) or len(name) > MAX_NAME:
        return ""
    known = [*others, *KNOWN, *NEUTRAL]
    low = name.lower().replace("-", "_")
    if low in OTHER_NAMES:
        return OTHER_NAMES[low]
    near = difflib.get_close_matches(low, [k for k in known if len(k) > 3], 1, SIMILAR)
    return near[0] if near else ""


def answer_options(body: Mapping[str, Any], defaults: AnswerOptions) -> AnswerOptions:
    """The defaults with what a body says on top. Raises ItemError.

    `body` has neither messages nor a prompt any more; null stands for what isn't said.
    """
    said = {name: value for name, value in body.items() if value is not None}
    if said.get("top_k") == -1:
        said["top_k"] = 0  # where others write -1, all tokens are meant
    said = {name: value for name, value in said.items() if name not in LENGTHS or value != -1}
    _refuse_unknown(said)
    chosen: dict[str, Any] = {
        SAMPLING[name].field: _number(name, value, SAMPLING[name])
        for name, value in said.items()
        if name in SAMPLING
    }
    if not is_unsaid(said.get("logit_bias")):
        chosen["logit_bias"] = biases_of(said["logit_bias"])
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


def template_variables(body: Mapping[str, Any]) -> dict[str, object]:
    """Returns what a body has its model's prompt template told. Raises ItemError.

    `chat_template_kwargs` is vLLM's and llama-server's name for variables of the template.
    """
    effort, given = body.get("reasoning_effort"), body.get("chat_template_kwargs")
    found: dict[str, object] = {}
    if effort is not None:
        if effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise ItemError("invalid_value", f'"reasoning_effort" must be one of {known}.')
        found.update(thinking_variables(EFFORTS[effort]))
    if given is not None:
        if not isinstance(given, dict):
            raise ItemError("invalid_value", '"chat_template_kwargs" must be an object.')
        for name in given:
            if name in OUR_VARIABLES or not str(name).isidentifier():
                shown = printable_name(name)
                raise ItemError("invalid_value", f'"chat_template_kwargs" can\'t have {shown}.')
        found.update(given)
    return found


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


def biases_of(value: object) -> tuple[tuple[int, float], ...]:
    """What a map of token ids adds to logits. Raises ItemError."""
    if not isinstance(value, Mapping):
        raise ItemError("invalid_value", '"logit_bias" must be an object of token ids.')
    biases: dict[int, float] = {}
    for token, bias in value.items():
        text = str(token)
        if isinstance(token, bool) or not TOKEN.fullmatch(text):
            raise ItemError(
                "invalid_value", f'"logit_bias" has {printable_name(text)}, which is no token id.'
            )
        biases[int(text)] = float(_number("logit_bias", bias, BIAS))
    return tuple(sorted(biases.items()))


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
            f"{printable_name(names[0])} and {printable_name(names[1])} can't be used together.",
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
