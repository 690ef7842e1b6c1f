"""Lines of a batch: what each asks, and a sentence with its number for each that can't be asked."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.batch.encoder import (
    Encoder,
    RestartingVocabulary,
    Side,
    head_of_text,
    tail_of_text,
    text_begins,
)
from localmoe.batch.parameters import ItemError
from localmoe.batch.requests import (
    BatchRequest,
    Defaults,
    Form,
    form_of,
    request_of,
    request_of_line,
)
from localmoe.chat.chat import AnswerOptions
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Sampling, TextPiece
from localmoe.errors import EngineError, UsageError
from localmoe.files import InputLine, digest, read_lines
from localmoe.loading import open_vocabulary
from localmoe.prompt.chat_template import TemplateFormat
from localmoe.prompt.messages import Message, PromptFormat
from localmoe.prompt.mistral import MistralFormat

HI = [{"role": "user", "content": "Hi!"}]


def line_of(raw: bytes, number: int = 1) -> InputLine:
    return InputLine(number, 0, len(raw) + 1, raw, True, digest(raw))


def asked(value: object, defaults: Defaults | None = None, form: Form = "json") -> BatchRequest:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return request_of_line(line_of(raw), form, defaults or Defaults())


def refused(value: object, number: int = 1) -> ItemError:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(ItemError) as raised:
        request_of_line(line_of(raw, number), "json", Defaults())
    return raised.value


def opened(body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


# ---- lines of a file ----


@given(st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b""))), st.booleans())
def test_lines_are_those_of_the_file(texts: list[bytes], ends: bool) -> None:
    raw = b"\n".join(texts) + b"\n" * ends
    found = list(read_lines(io.BytesIO(raw), max_bytes=20))
    assert b"".join(raw[line.offset : line.offset + line.n_bytes] for line in found) == raw
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    for line in found:
        text = raw[line.offset : line.offset + line.n_bytes]
        text = text.removesuffix(b"\n").removesuffix(b"\r")
        assert line.raw == (text if len(text) <= 20 else None)
        assert line.whole == raw[line.offset : line.offset + line.n_bytes].endswith(b"\n")
        if line.raw is not None:
            assert line.digest == digest(text)


def test_a_line_that_is_too_long_is_passed_by() -> None:
    stream = io.BytesIO(b"a\n" + b"x" * 5_000_000 + b"\nb\n")
    first, long, last = read_lines(stream, max_bytes=1000)
    assert (first.raw, long.raw, last.raw) == (b"a", None, b"b")
    assert (long.n_bytes, last.number, last.offset) == (5_000_001, 3, 5_000_003)
    other = list(read_lines(io.BytesIO(b"x" * 5_000_001 + b"\n"), max_bytes=1000))[0]
    assert long.digest != other.digest


@pytest.mark.parametrize(
    ("name", "raw", "form"),
    [
        ("a.txt", b'{"prompt": "x"}\n', "text"),
        ("a.jsonl", b"no JSON\n", "json"),
        ("a", b'\n\n  {"prompt": "x"}\n', "json"),
        ("a", b'\xef\xbb\xbf{"prompt": "x"}\n', "json"),
        ("stdin", b"Hi!\n", "text"),
        ("stdin", b"", "text"),
    ],
)
def test_a_form_is_known_by_name_or_by_the_first_line(name: str, raw: bytes, form: Form) -> None:
    stream = io.BytesIO(raw)
    assert form_of(name, stream) == form
    assert stream.tell() == 0


def test_a_json_list_is_refused_with_the_command_that_mends_it() -> None:
    with pytest.raises(UsageError, match=r"jq -c '\.\[\]' a\.json"):
        form_of("a.json", io.BytesIO(b'[{"prompt": "x"}]'))


# ---- what a line asks ----


def test_an_openai_chat_line() -> None:
    body = {"model": "gpt", "messages": HI, "max_tokens": 9, "temperature": 0, "stop": "x", "n": 1}
    request = asked(opened(body))
    assert request.custom_id == "a"
    assert request.messages == (Message("user", "Hi!"),)
    assert request.options == AnswerOptions(Sampling(temperature=0), 9, ("x",))


def test_an_openai_text_line_is_continued_as_it_stands() -> None:
    request = asked(opened({"prompt": " Once"}, "/v1/completions"))
    assert (request.text, request.is_chat) == (" Once", False)


@pytest.mark.parametrize("value", [{"prompt": "Hi!"}, {"messages": HI}])
def test_a_plain_line_is_a_chat(value: dict[str, Any]) -> None:
    request = asked({"id": 7, **value, "seed": 3, "top_k": 5})
    assert request.messages == (Message("user", "Hi!"),)
    assert request.custom_id == "7"
    assert request.options.sampling == Sampling(seed=3, top_k=5)


def test_a_text_line_is_a_prompt() -> None:
    assert asked(b'{"prompt"', form="text").messages == (Message("user", '{"prompt"'),)


@pytest.mark.parametrize(
    "url",
    ["/chat/completions", "/v1/chat/completions", "https://api.openai.com/v1/chat/completions",
     "/openai/deployments/gpt/chat/completions?api-version=2024-10-21", None],
)  # fmt: skip
def test_chats_are_asked_as_other_shops_write_them(url: str | None) -> None:
    line = {"custom_id": "a", "method": "post", "url": url, "body": {"messages": HI}}
    assert asked(line).messages == (Message("user", "Hi!"),)
    assert asked({"custom_id": "a", "body": {"messages": HI}}).is_chat


@pytest.mark.parametrize("url", ["/completions", "https://x/v1/completions", None])
def test_texts_are_asked_as_other_shops_write_them(url: str | None) -> None:
    request = asked({"custom_id": "a", "url": url, "body": {"prompt": "Once"}})
    assert (request.text, request.is_chat) == ("Once", False)


def test_a_plain_line_may_have_a_system_message() -> None:
    defaults = Defaults(system="Be long.")
    own = asked({"prompt": "Hi!", "system": "Be brief."}, defaults)
    assert own.messages == (Message("system", "Be brief."), Message("user", "Hi!"))
    assert asked({"prompt": "Hi!", "system": ""}, defaults).messages[0].content == "Be long."


def test_penalties_and_biases_are_those_of_openai() -> None:
    said = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"9": -100, "5": 2}}
    sampling = asked({"prompt": "Hi!", "repetition_penalty": 1.1, **said}).options.sampling
    assert sampling == Sampling(
        repeat_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias=((5, 2.0), (9, -100.0)),
    )
    assert asked({"prompt": "Hi!", "logit_bias": {}}).options == asked({"prompt": "Hi!"}).options


def test_further_columns_are_left_alone() -> None:
    columns = {"category": "greeting", "answer": 42, "tags": ["a"], "source_url": "x", "topic": 1}
    plain = asked({"id": "x1", "prompt": "Hi!", "max_tokens": 8, **columns})
    assert plain == asked({"id": "x1", "prompt": "Hi!", "max_tokens": 8})
    assert asked({**opened({"messages": HI}), **columns}) == asked(opened({"messages": HI}))


def test_defaults_hold_where_a_line_says_nothing() -> None:
    schema = AnswerOptions(Sampling(top_k=3, json_schema="{}"), 50, ("end",))
    defaults = Defaults(schema, "Be brief.")
    plain = asked({"prompt": "Hi!", "seed": None}, defaults)
    assert plain.options == schema
    assert plain.messages == (Message("system", "Be brief."), Message("user", "Hi!"))
    own = [{"role": "system", "content": "Be long."}, *HI]
    other = asked({"messages": own, "grammar": 'root ::= "a"', "max_tokens": 2}, defaults)
    assert [m.content for m in other.messages] == ["Be long.", "Hi!"]
    assert other.options.sampling == Sampling(top_k=3, grammar='root ::= "a"')
    assert other.options.max_tokens == 2


@pytest.mark.parametrize(
    ("format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}},
            {"enum": [1]},
        ),
    ],
)  # fmt: skip
def test_a_response_format_is_a_schema(format: dict[str, Any], schema: object) -> None:
    found = asked(opened({"messages": HI, "response_format": format})).options.sampling.json_schema
    assert (json.loads(found) if found else None) == schema


# ---- what can't be asked ----

DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("value", "code", "sentence"),
    [
        (b"{", "invalid_json", "at character 2"),
        (b"nonsense", "invalid_json", "not JSON"),
        (b'{"prompt": "a"} x', "invalid_json", "Extra data at character 17"),
        (b'{"prompt": "a", "seed": NaN}', "invalid_json", "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "invalid_json", "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value", "inf"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_json", "not JSON"),
        (b'{"prompt": "a\0"}', "invalid_json", "control character"),
        (b'{"prompt": "a\xff"}', "invalid_encoding", "byte 14"),
        (b'{"prompt": "a\\u0000"}', "invalid_messages", "NUL character at character 2"),
        (b'{"prompt": "a\\ud800"}', "invalid_messages", "half of a surrogate pair"),
        (b'{"prompt": "a", "stop": "\\udc00"}', "invalid_value", "half of a surrogate pair"),
        (b'{"custom_id": "\\ud800", "prompt": "a"}', "invalid_custom_id", "surrogate"),
        (DEEP, "invalid_json", "nested too deeply"),
        (b"[]", "invalid_request", "not a JSON object"),
        (b'"text"', "invalid_request", "not a JSON object"),
        ({"custom_id": 1.5, "prompt": "a"}, "invalid_custom_id", "1 to 512"),
        ({"custom_id": "", "prompt": "a"}, "invalid_custom_id", "1 to 512"),
        ({"custom_id": "x" * 513, "prompt": "a"}, "invalid_custom_id", "1 to 512"),
        ({}, "invalid_request", "neither a prompt nor messages"),
        ({"prompt": "a", "messages": HI}, "invalid_request", "both"),
        ({"prompt": ["a", "b"]}, "invalid_request", "not a text"),
        ({"prompt": ""}, "invalid_messages", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_messages", "Tool calls"),
        ({"prompt": "a", "tools": [{}]}, "unsupported_parameter", '"tools"'),
        ({"prompt": "a", "n": 2}, "unsupported_parameter", '"n", which isn\'t supported but as 1'),
        ({"prompt": "a", "n": True}, "unsupported_parameter", '"n"'),
        ({"prompt": "a", "stream": True}, "unsupported_parameter", '"stream"'),
        ({"prompt": "a", "logprobs": True}, "unsupported_parameter", '"logprobs"'),
        ({"prompt": "a", "reasoning_effort": "much"}, "invalid_value", "one of none, minimal"),
        ({"prompt": "a", "chat_template_kwargs": [1]}, "invalid_value", "must be an object"),
        ({"prompt": "a", "chat_template_kwargs": {"tools": 1}}, "invalid_value", '"tools"'),
        ({"prompt": "a", "chat_template_kwargs": {"a b": 1}}, "invalid_value", '"a b"'),
        ({"prompt": "a", "presence_penalty": 2.5}, "invalid_value", "must be -2 to 2"),
        ({"prompt": "a", "logit_bias": [1]}, "invalid_value", "object of token ids"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "invalid_value", '"-1", which is no token id'),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "invalid_value", "must be -100 to 100"),
        ({"prompt": "a", "logit_bias": {"5": None}}, "invalid_value", "must be a number"),
        ({"prompt": "a", "temprature": 1}, "unknown_parameter", '"temprature"'),
        ({"prompt": "a", "temperature": -1}, "invalid_value", "is -1; it must be 0 to 100"),
        ({"prompt": "a", "temperature": "0"}, "invalid_value", "must be a number"),
        ({"prompt": "a", "top_k": 1.5}, "invalid_value", "a whole number"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "is 0; it must be 1"),
        ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "differ"),
        ({"prompt": "a", "stop": [""]}, "invalid_value", "empty"),
        ({"prompt": "a", "stop": 3}, "invalid_value", "list of texts"),
        ({"prompt": "a", "grammar": "g", "json_schema": {}}, "invalid_value", "used together"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "invalid_value", "schema"),
        ({"prompt": "a", "Max-Tokens": 1}, "unknown_parameter", 'Did you mean "max_tokens"?'),
        ({"prompt": "a", "mesages": HI}, "unknown_parameter", 'Did you mean "messages"?'),
        ({"prompt": "a", "temp": 0}, "unknown_parameter", 'Did you mean "temperature"?'),
        ({"prompt": "a", "system": 3}, "invalid_request", '"system" is not a text'),
        (opened({"messages": HI, "category": 1}), "unknown_parameter", '"category"'),
        ({**opened({"messages": HI}), "seed": 1}, "unknown_parameter", 'beside its "body"'),
        ({**opened({"messages": HI}), "methd": 1}, "unknown_parameter", '"method"'),
        ({**opened({"messages": HI}), "method": "GET"}, "invalid_request", "POST"),
        (opened({"messages": HI}, "/v1/embeddings"), "invalid_url", "/v1/chat/completions"),
        (opened({"prompt": "x"}), "invalid_request", 'no "messages"'),
        (opened({"prompt": ""}, "/v1/completions"), "invalid_request", "not empty"),
        ({"custom_id": "a", "url": "/v1/completions", "body": 3}, "invalid_request", "object"),
    ],
)  # fmt: skip
def test_each_mistake_is_a_sentence(value: object, code: str, sentence: str) -> None:
    error = refused(value)
    assert error.code == code
    assert sentence in error.message
    assert len(error.message) < 250
    assert error.message.isprintable()


def test_a_byte_order_mark_is_allowed_only_where_a_file_begins() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "a"}'
    assert asked(raw).messages[0].content == "a"
    assert "byte order mark" in refused(raw, number=2).message


def test_an_error_knows_the_custom_id_of_its_line() -> None:
    assert refused({"custom_id": "me", "prompt": "a", "n": 2}).custom_id == "me"


def test_a_long_line_is_refused_with_its_length() -> None:
    with pytest.raises(ItemError, match="1,000,000,000 bytes"):
        request_of_line(InputLine(1, 0, 10**9, None, True, b""), "json", Defaults())


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_sentence(raw: bytes) -> None:
    with suppress(ItemError):
        request_of_line(line_of(raw), "json", Defaults())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ["prompt", "messages", "body", "url", "custom_id", "stop", "seed", "n", "response_format"]


@given(st.dictionaries(st.sampled_from(KEYS), json_values))
def test_any_object_is_a_request_or_a_sentence(value: dict[str, Any]) -> None:
    with suppress(ItemError):
        request_of(value, Defaults())


# ---- what a template is told ----


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({}, "True medium"),
        ({"reasoning_effort": "none"}, "False low"),
        ({"reasoning_effort": "xhigh"}, "True high"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "False medium"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": 7}}, "7 high"),
        ({"json_schema": {"type": "string"}}, "False low"),
    ],
)
def test_a_line_says_how_hard_its_model_thinks(
    said: dict[str, Any], text: str, tiny_engine: Any
) -> None:
    template = "{{ enable_thinking }} {{ reasoning_effort or 'medium' }} {{ messages[0].content }}"
    format = TemplateFormat(template, variables={"enable_thinking": True})
    tokens, _ = Encoder(format, tiny_engine, 512).encode(asked({"prompt": "Hi", **said}))
    assert tiny_engine.detokenize(tokens).strip() == f"{text} Hi"


# ---- prompts that are too long ----


@pytest.mark.parametrize(
    ("format", "ids"),
    [
        (MistralFormat("v1", bos=1, eos=2), (1,)),
        (TemplateFormat("x", bos=7, add_bos=True), (7,)),
        (TemplateFormat("x", bos=7), ()),
        (TemplateFormat("x", add_bos=True), ()),
    ],
)
def test_a_text_to_be_continued_begins_as_the_model_wants_it(
    format: PromptFormat, ids: tuple[int, ...]
) -> None:
    assert text_begins(format) == ids


class Words:
    """A vocabulary of words, each with the space before it."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def tokenize(self, pieces: Any) -> list[tuple[int, ...]]:
        return [tuple(map(self._id, f" {piece.text}".split(" ")[1:])) for piece in pieces]

    def detokenize(self, tokens: Any) -> str:
        return "".join(f" {self.known[token]}" for token in tokens)

    def _id(self, word: str) -> int:
        if word not in self.known:
            self.known.append(word)
        return self.known.index(word)


def encoder(truncate: Side | None, n_ctx: int = 40) -> Encoder:
    return Encoder(MistralFormat("v1", bos=1, eos=2), Words(), n_ctx, truncate)


LONG = " ".join(f"w{n}" for n in range(100))


def test_a_prompt_that_fits_is_not_cut() -> None:
    request = asked({"prompt": "one two"})
    tokens, n_cut = encoder("head").encode(request)
    assert (len(tokens), n_cut) == (5, 0)


def test_a_prompt_that_is_too_long_is_refused_with_the_counts() -> None:
    with pytest.raises(ItemError, match="has 103 tokens; the context holds 40") as raised:
        encoder(None).encode(asked({"id": "x", "prompt": LONG}))
    assert (raised.value.code, raised.value.custom_id) == ("context_length_exceeded", "x")


@pytest.mark.parametrize(
    ("side", "first", "last"),
    [("tail", "w0", "w26"), ("head", "w73", "w99"), ("middle", "w0", "w99")],
)
def test_a_long_prompt_is_cut_where_it_is_wanted(side: Side, first: str, last: str) -> None:
    maker = encoder(side)
    tokens, n_cut = maker.encode(asked({"prompt": LONG, "max_tokens": 10}))
    words = maker.vocabulary.detokenize(tokens[1:]).split()
    assert (words[0], words[1], words[-2], words[-1]) == ("[INST]", first, last, "[/INST]")
    assert (len(tokens), n_cut) == (30, 73)


def test_a_text_to_be_continued_is_cut_too() -> None:
    body = {"prompt": LONG, "max_tokens": 1000}
    tokens, n_cut = encoder("head").encode(asked(opened(body, "/v1/completions")))
    assert (len(tokens), n_cut) == (20, 81)


def test_what_is_too_long_around_the_last_message_is_refused() -> None:
    messages = [{"role": "system", "content": LONG}, *HI]
    with pytest.raises(ItemError, match="has 103 tokens"):
        encoder("middle").encode(asked({"messages": messages}))


@given(st.text(min_size=1), st.integers(0, 10))
def test_what_tokens_spell_is_taken_from_the_text_itself(text: str, n: int) -> None:
    broken = text.encode("utf-8", "replace")[:n].decode("utf-8", "replace")
    assert text.startswith(head_of_text(text, broken))
    assert text.endswith(tail_of_text(text, broken))


@pytest.mark.parametrize("side", ["head", "tail", "middle"])
def test_a_real_vocabulary_is_cut_at_its_tokens(side: Side, tiny_engine: Any) -> None:
    text = "The quick brown fox — jumps über den faulen Hund 🙂. " * 60
    maker = Encoder(MistralFormat("v1", bos=1, eos=2), tiny_engine, 300, side)
    whole = maker._tokens(asked({"prompt": text}))
    tokens, n_cut = maker.encode(asked({"prompt": text, "max_tokens": 50}))
    assert 240 < len(tokens) <= 250
    assert n_cut == len(whole) - len(tokens)
    kept = tiny_engine.detokenize(tokens[1:])
    assert "\ufffd" not in kept
    assert ("The quick" in kept[:20]) == (side != "head")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_text_that_kills_the_tokenizer_is_refused_alone(tiny_model: Path) -> None:
    """A kill from outside stands in for a text that llama.cpp dies of."""
    engines: list[EngineProcess] = []

    def engine_of() -> EngineProcess:
        engines.append(open_vocabulary(tiny_model))
        return engines[-1]

    vocabulary = RestartingVocabulary(engine_of)
    maker = Encoder(MistralFormat("v1", bos=1, eos=2), vocabulary, 512)
    before = maker.encode(asked({"prompt": "Hi!"}))
    engines[-1].kill()
    with pytest.raises(ItemError, match="prompt crashed the engine") as raised:
        maker.encode(asked({"id": "x", "prompt": "poison"}))
    assert raised.value.custom_id == "x"
    assert maker.encode(asked({"prompt": "Hi!"})) == before
    assert len(engines) == 2
    vocabulary.close()


def test_a_tokenizer_that_always_dies_ends_it() -> None:
    class Dying(Words):
        def tokenize(self, pieces: Any) -> list[tuple[int, ...]]:
            raise EngineError("It died.")

        def close(self) -> None: ...

    maker = Encoder(MistralFormat("v1", bos=1, eos=2), RestartingVocabulary(Dying), 512)
    for _ in range(5):
        with pytest.raises(ItemError):
            maker.encode(asked({"prompt": "Hi!"}))
    with pytest.raises(EngineError, match="It died"):
        maker.encode(asked({"prompt": "Hi!"}))


def test_the_sides_keep_their_text_whole(tiny_engine: Any) -> None:
    cut: Callable[[str, Side], str] = lambda text, side: Encoder(  # noqa: E731
        MistralFormat("v1", bos=1, eos=2), tiny_engine, 64, side
    )._kept(text, tiny_engine.tokenize([TextPiece(text)])[0], 10, side)
    text = " ".join(f"number {n}" for n in range(50))
    assert text.startswith(cut(text, "tail"))
    assert text.endswith(cut(text, "head"))
    middle = cut(text, "middle")
    assert middle.startswith("number 0")
    assert middle.endswith("49")
