"""Thinking told from answer: by ids, wherever streams are cut, and on the real engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabulary_files import write_byte_level

from localmoe.chat.chat import AnswerOptions, ChatModel
from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Delta, Placement, Request, Sampling, TextPiece
from localmoe.engine.worker.sampling import TextStream
from localmoe.gguf.demo import DEMO
from localmoe.gguf.model_meta import read_meta
from localmoe.loading import open_vocabulary, thinking_remark
from localmoe.prompt.formats import (
    NO_THINKING,
    TemplateFacts,
    prompt_format,
    thinking_variables,
)
from localmoe.prompt.messages import Message, Prompt
from localmoe.prompt.mistral import MistralFormat
from localmoe.prompt.reasoning import (
    Answer,
    HarmonyMarkers,
    ReasoningMarkers,
    ThinkMarkers,
    find_reasoning_markers,
    join_reasoning,
    split_reasoning,
)
from localmoe.prompt.reasoning_tags import TextTags, find_text_tags

OPEN, CLOSE = 1, 2
THINK = ThinkMarkers(OPEN, CLOSE)
START, CHANNEL, MESSAGE, END = 11, 12, 13, 14
HARMONY = HarmonyMarkers(START, CHANNEL, MESSAGE, END)
FIRST_WORD = 100


@dataclass
class Stream:
    """A token for each piece of bytes, and their deltas as the scheduler makes them."""

    stop: Sequence[str] = ()
    pieces: dict[int, bytes] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def say(self, *parts: int | str | bytes) -> Stream:
        """Markers by id, words as text or bytes."""
        for part in parts:
            if isinstance(part, int):
                self.tokens.append(part)
            else:
                token = FIRST_WORD + len(self.pieces)
                self.pieces[token] = part.encode() if isinstance(part, str) else part
                self.tokens.append(token)
        return self

    def deltas(self, markers: ReasoningMarkers) -> Iterator[Delta]:
        text = TextStream(self.stop)
        yield Delta(1, prompt_tokens=5)
        for token in self.tokens:
            is_marker = token in markers.ids
            out = text.finish() if is_marker else text.feed(self.pieces[token])
            if text.stopped_by is not None:
                yield Delta(1, out, (token,), finish_reason="stop", stopped_by=text.stopped_by)
                return
            yield Delta(1, out, (token,), has_pending_text=text.has_pending_text)
        yield Delta(1, text.finish(), finish_reason="stop")

    def answer(
        self, markers: ReasoningMarkers, *, is_open: bool = False, prompt: tuple[int, ...] = (5,)
    ) -> Answer:
        answer = Answer()
        asked = asking(is_open) if is_open else Request(prompt)
        for delta in split_reasoning(self.deltas(markers), markers, asked):
            answer.add(delta)
        assert answer.last is not None
        return answer

    def whole(self, markers: ReasoningMarkers, prompt: tuple[int, ...] = (5,)) -> Answer:
        """The answer from deltas as an unstreamed request has them: one at each marker."""
        gathered, text, tokens = list[Delta](), "", ()
        for delta in self.deltas(markers):
            text, tokens = text + delta.text, (*tokens, *delta.tokens)
            if delta.finish_reason or set(delta.tokens) & set(markers.ids):
                gathered.append(replace(delta, text=text, tokens=tokens))
                text, tokens = "", ()
        return join_reasoning(gathered, markers, Request(prompt))

    def spelled(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", "replace")


def asking(is_open: bool = False) -> Request:
    """A request whose prompt opened the thinking, or didn't."""
    return Request((5, OPEN) if is_open else (5,))


# ---- <think> ----


def test_thinking_is_told_from_the_answer() -> None:
    stream = Stream().say(OPEN, "\n", "Hm", "?", "\n", CLOSE, "\n\n", "Yes", ".")
    answer = stream.answer(THINK)
    assert (answer.thinking, answer.text) == ("Hm?\n", "Yes.")
    assert answer.tokens == tuple(stream.tokens)
    assert stream.spelled(answer.text_tokens) == "Yes."
    assert answer.message() == Message("assistant", "Yes.", answer.text_tokens, "Hm?\n")


@pytest.mark.parametrize("said", [
    (OPEN, "\n", "Hm", "?", CLOSE, "\n\n", "Yes", "\n"), (OPEN, "Hm?", CLOSE, "\nYes", "\n"),
])  # fmt: skip
def test_an_answer_that_was_not_streamed_is_parted_alike(said: tuple[int | str, ...]) -> None:
    answer = Stream().say(*said).whole(THINK)
    assert (answer.thinking, answer.text) == ("Hm?", "Yes\n")


def test_an_answer_that_was_not_streamed_may_begin_inside_the_thinking() -> None:
    stream = Stream().say("Hm", CLOSE, "Yes")
    inside, outside = stream.whole(THINK, prompt=(5, OPEN)), stream.whole(THINK)
    assert (inside.thinking, inside.text) == ("Hm", "Yes")
    assert (outside.thinking, outside.text) == ("", "HmYes")


def test_an_answer_without_thinking_keeps_its_line_ends() -> None:
    assert Stream().say("\n\nYes").whole(THINK).text == "\n\nYes"


def test_channels_of_an_answer_that_was_not_streamed() -> None:
    said = (CHANNEL, "analysis", MESSAGE, "Hm", END, START, "assistant", CHANNEL, "final", MESSAGE)
    answer = Stream().say(*said, "Yes").whole(HARMONY)
    assert (answer.thinking, answer.text) == ("Hm", "Yes")


def test_an_answer_may_begin_inside_the_thinking() -> None:
    answer = Stream().say("Hm", CLOSE, "Yes").answer(THINK, is_open=True)
    assert (answer.thinking, answer.text) == ("Hm", "Yes")


def test_markers_spelled_in_ordinary_tokens_are_text() -> None:
    stream = Stream().say("<think>", "no", "</think>", "yes", "<|channel|>final<|message|>")
    answer = stream.answer(THINK)
    assert answer.text == "<think>no</think>yes<|channel|>final<|message|>"
    assert answer.thinking == ""
    inside = Stream().say(OPEN, "a", "</think>", "b", CLOSE, "c").answer(THINK)
    assert (inside.thinking, inside.text) == ("a</think>b", "c")


def test_text_that_was_held_back_keeps_its_kind() -> None:
    """Half a character and half a stop string, right before a marker."""
    stream = Stream(stop=["stop"]).say(OPEN, "a st", CLOSE, "b st", OPEN, b"\xe2\x82", CLOSE, "c")
    answer = stream.answer(THINK)
    assert answer.thinking == "a st�"
    assert answer.text == "b stc"


def test_every_delta_is_of_one_kind_and_none_is_lost() -> None:
    stream = Stream().say("Well", OPEN, "Hm", CLOSE, "Yes")
    deltas = list(split_reasoning(stream.deltas(THINK), THINK, asking()))
    assert [(d.kind, d.text) for d in deltas if d.text] == [
        ("text", "Well"), ("thinking", "Hm"), ("text", "Yes"),
    ]  # fmt: skip
    assert sum((d.tokens for d in deltas), ()) == tuple(stream.tokens)
    assert deltas[0].prompt_tokens == 5


words = st.binary(max_size=4) | st.sampled_from(["\n", "\n\n", "\nb", "st", "op", "€", "a"]).map(
    str.encode
)
parts = st.lists(words | st.sampled_from([OPEN, CLOSE]), max_size=14)


@given(parts, st.booleans(), st.sampled_from([(), ("stop",), ("\n\na", "€€")]))
def test_the_tokens_of_the_text_spell_it_exactly(
    said: list[int | bytes], is_open: bool, stop: tuple[str, ...]
) -> None:
    stream = Stream(stop).say(*said)
    answer = stream.answer(THINK, is_open=is_open)
    message = answer.message()
    assert answer.tokens == tuple(stream.tokens[: len(answer.tokens)])
    if message.tokens is not None:
        alone = "".join(stream.spelled(run) for run in runs_of(message.tokens, stream.tokens))
        assert alone == answer.text


def runs_of(tokens: Sequence[int], all_tokens: Sequence[int]) -> Iterator[list[int]]:
    """Tokens in runs that no marker parts: a character can't go on behind one."""
    wanted, run = set(tokens), list[int]()
    for token in all_tokens:
        if token in (OPEN, CLOSE):
            yield run
            run = []
        elif token in wanted:
            run.append(token)
    yield run


@given(parts, st.booleans(), st.integers(0, 14))
def test_left_early_tokens_and_text_agree_or_the_text_counts(
    said: list[int | bytes], is_open: bool, n: int
) -> None:
    stream = Stream(("stop",)).say(*said)
    answer = Answer()
    for _, delta in zip(
        range(n), split_reasoning(stream.deltas(THINK), THINK, asking(is_open)), strict=False
    ):
        answer.add(delta)
    message = answer.message()
    if message.tokens is not None and OPEN not in said and CLOSE not in said:
        assert stream.spelled(message.tokens) == answer.text


def test_a_channels_name_is_no_part_of_what_is_thought() -> None:
    markers = ThinkMarkers(OPEN, CLOSE, "thought")
    said = (OPEN, "tho", "ught", "\n", "Hm", CLOSE, "Yes")
    for answer in (Stream().say(*said).answer(markers), Stream().say(*said).whole(markers)):
        assert (answer.thinking, answer.text) == ("Hm", "Yes")
    other = Stream().say(OPEN, "th", "e end", CLOSE, "Yes")
    for answer in (other.answer(markers), other.whole(markers)):
        assert (answer.thinking, answer.text) == ("the end", "Yes")


# ---- tags that are plain text ----

TAGGED = TextTags((((8, 9), "</think>"),))
ANSWERS = {
    "<think>\nHm</think>\n\nYes": ("Hm", "Yes"),
    "\n<think>a < b </thin k></think>Yes": ("a < b </thin k>", "Yes"),
    "<thinking>Hm</thinking>Yes": ("Hm", "Yes"),
    "Here is my thought process:\nHm\nHere is my response:\nYes": ("Hm\n", "Yes"),
    "[THINK]Hm[/THINK]Yes </think>": ("Hm", "Yes </think>"),
    "<think>never closed": ("never closed", ""),
    "<thin ice": ("", "<thin ice"),
    "<": ("", "<"),
    "Yes <think>no</think>": ("", "Yes <think>no</think>"),
    "\n\nYes": ("", "\n\nYes"),
    "": ("", ""),
}


@given(st.sampled_from(list(ANSWERS)), st.lists(st.integers(1, 30), max_size=8))
def test_tags_are_found_wherever_a_stream_is_cut(said: str, cuts: list[int]) -> None:
    places = sorted({0, len(said), *(cut for cut in cuts if cut < len(said))})
    pieces = [said[a:b] for a, b in zip(places, places[1:], strict=False)]
    stream = Stream().say(*pieces)
    answer, whole = stream.answer(TAGGED), Stream().say(*pieces).whole(TAGGED)
    assert (answer.thinking, answer.text) == ANSWERS[said]
    assert (whole.thinking, whole.text) == ANSWERS[said]
    assert answer.tokens == tuple(stream.tokens)
    message = answer.message()
    if message.tokens:  # an answer behind a tag is known by its text alone
        assert stream.spelled(message.tokens) == answer.text


@given(st.lists(st.sampled_from([*"<>/thinkY\n ", "<think>", "</think>"]), max_size=30))
def test_no_stream_of_tags_loses_a_character_or_a_token(said: list[str]) -> None:
    stream = Stream(("stop",)).say(*said)
    answer = stream.answer(TAGGED)
    assert answer.tokens == tuple(stream.tokens)
    if answer.thinking == "" and "<think>" not in answer.text:
        assert answer.text in "".join(said)
    whole = Stream().say(*said).whole(TAGGED)
    assert (whole.thinking, whole.text) == (answer.thinking, answer.text)


def test_a_prompt_may_end_with_a_tag() -> None:
    answer = Stream().say("Hm", "</thi", "nk>Yes").answer(TAGGED, prompt=(5, 8, 9))
    assert (answer.thinking, answer.text) == ("Hm", "Yes")


def test_only_tags_of_the_template_are_looked_for_in_prompts(words: EngineProcess) -> None:
    plain = find_text_tags("{{ messages }}", words)
    assert plain == TextTags()
    tags = find_text_tags("assistant\n[THINK]", words)
    for behind in ("", "\n"):
        ids = words.tokenize([TextPiece("assistant\n[THINK]" + behind, special=True)])[0]
        assert tags.closer_after(ids) == "[/THINK]"
    assert tags.closer_after(words.tokenize([TextPiece("[THINK] no")])[0]) == ""


def test_an_answer_that_must_have_a_form_has_no_tags() -> None:
    stream = Stream().say('"<think>a"')
    asked = Request((5, 8, 9), Sampling(json_schema="{}"))
    deltas = list(split_reasoning(stream.deltas(TAGGED), TAGGED, asked))
    assert {delta.kind for delta in deltas if delta.text} == {"text"}


# ---- harmony ----


def test_channels_are_told_apart() -> None:
    stream = Stream().say(
        CHANNEL, "ana", "lysis", MESSAGE, "Hm.", END, START, "assistant", CHANNEL, "final",
        MESSAGE, "Y", "es.",
    )  # fmt: skip
    answer = stream.answer(HARMONY)
    assert (answer.thinking, answer.text) == ("Hm.", "Yes.")
    assert stream.spelled(answer.text_tokens) == "Yes."


def test_headers_are_no_text_whatever_they_hold() -> None:
    stream = Stream().say(
        CHANNEL, "commentary to=x", MESSAGE, "{}", END, START, "assistant", MESSAGE
    )
    answer = stream.say("Hi").answer(HARMONY)
    assert (answer.thinking, answer.text) == ("{}", "Hi")
    unfinished = Stream().say(CHANNEL, "final").answer(HARMONY)
    assert (unfinished.thinking, unfinished.text) == ("", "")


def test_an_answer_without_a_header_is_text() -> None:
    """A grammar leaves no room for one."""
    assert Stream().say("{", "}").answer(HARMONY).text == "{}"


@given(st.lists(words | st.sampled_from(HARMONY.ids), max_size=14))
def test_no_stream_breaks_the_channels(said: list[int | bytes]) -> None:
    stream = Stream(("stop",)).say(*said)
    answer = stream.answer(HARMONY)
    assert answer.tokens == tuple(stream.tokens[: len(answer.tokens)])
    assert not set(answer.text_tokens) & set(HARMONY.ids)


# ---- what the prompt opened ----


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ((5, OPEN), True),
        ((5, OPEN, 9), True),
        ((5, OPEN, 9, CLOSE, 9), False),  # thinking that is turned off
        ((5, OPEN, 9, CLOSE), False),
        ((OPEN, 5, 6, 7, 8), False),  # instructions that speak of it
        ((5, 6), False),
    ],
)
def test_only_an_opener_at_the_end_of_the_prompt_counts(
    prompt: tuple[int, ...], is_open: bool
) -> None:
    assert THINK.is_open_after(prompt) is is_open


@dataclass
class Fake:
    stream: Stream
    requests: list[Request] = field(default_factory=list)

    def tokenize(self, pieces: Sequence[TextPiece]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, piece.text)) for piece in pieces]

    def generate(self, request: Request) -> Iterator[Delta]:
        self.requests.append(request)
        yield from self.stream.deltas(THINK)


def test_a_grammars_answer_is_text_even_where_the_prompt_opened_the_thinking() -> None:
    engine = Fake(Stream().say("{}"))
    model = ChatModel(engine, MistralFormat("v1", 1, 2), 100, reasoning_markers=THINK)  # type: ignore[arg-type]
    prompt = Prompt("", (5, OPEN))
    bound = AnswerOptions(Sampling(json_schema="{}"))
    assert {d.kind for d in model.answer(prompt, bound) if d.text} == {"text"}
    assert {d.kind for d in model.answer(prompt, AnswerOptions()) if d.text} == {"thinking"}
    assert engine.requests[0].reasoning_tokens == (OPEN, CLOSE)


# ---- vocabularies ----


@pytest.mark.parametrize(
    ("control", "markers"),
    [
        (["<|im_end|>", "<think>", "</think>"], ThinkMarkers(257, 258)),
        (["</s>", "[/THINK]", "[THINK]"], ThinkMarkers(258, 257)),
        (
            ["<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"],
            HarmonyMarkers(start=257, channel=260, message=259, end=258),
        ),
        (["<turn|>", "<|channel>", "<channel|>"], ThinkMarkers(257, 258, "thought")),
        (["<|im_end|>", "<think>"], TextTags()),
        (["<|im_end|>"], TextTags()),
    ],
)
def test_the_markers_are_those_of_the_vocabulary(
    tmp_path: Path, control: list[str], markers: ReasoningMarkers | None
) -> None:
    special = write_byte_level(tmp_path / "words.gguf", control)
    engine = open_vocabulary(tmp_path / "words.gguf")
    try:
        assert find_reasoning_markers(frozenset(special), engine) == markers
        # as a template's text without a token of that name, it is text
        assert find_reasoning_markers(frozenset(), engine) == TextTags()
    finally:
        engine.close()


def test_the_demo_model_has_none() -> None:
    words = read_meta(DEMO).tokenizer
    assert not {"<think>", "[THINK]", "<|channel|>"} & {*words.control_tokens, *words.user_tokens}


# ---- templates ----

# the parts of Qwen3's that concern thinking, and DeepSeek R1's that opens it in the prompt
QWEN3 = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
R1 = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + message.content + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\\n' }}{% endif %}"""
CONTROL = ["<|im_end|>", "<|im_start|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    write_byte_level(path, CONTROL)
    engine = open_vocabulary(path)
    yield engine
    engine.close()


def encoded(
    template: str,
    messages: Sequence[Message],
    engine: EngineProcess,
    variables: Mapping[str, object] | None = None,
) -> Prompt:
    facts = TemplateFacts(
        "qwen3moe", "gpt2", chat_template=template, add_bos=False, control_tokens=frozenset(CONTROL)
    )
    now = datetime(2026, 1, 1)
    format = prompt_format(facts, env=engine_environment(), variables=variables, now=now)
    return format.encode(messages, engine)


def test_thinking_stays_out_of_the_history_and_the_answer_keeps_its_ids(
    words: EngineProcess,
) -> None:
    asked = [Message("user", "Hi")]
    first = encoded(QWEN3, asked, words)
    assert not THINK_IDS.is_open_after(first.tokens)
    letters = words.tokenize([TextPiece("h"), TextPiece("e"), TextPiece("he")])
    ids = letters[0] + letters[1]
    assert ids != letters[2]  # what encoding the text would give
    answer = Message("assistant", "he", ids, thinking="Should I greet?")
    second = encoded(QWEN3, [*asked, answer, Message("user", "And?")], words)
    assert second.tokens[: len(first.tokens) + 2] == (*first.tokens, *ids)
    assert "greet" not in second.text


def test_no_thinking_is_asked_for_where_the_template_knows_how(words: EngineProcess) -> None:
    off = encoded(QWEN3, [Message("user", "Hi")], words, NO_THINKING)
    assert off.text.endswith("<think>\n\n</think>\n\n")
    assert not THINK_IDS.is_open_after(off.tokens)


def test_a_template_that_opens_the_thinking(words: EngineProcess) -> None:
    assert THINK_IDS.is_open_after(encoded(R1, [Message("user", "Hi")], words).tokens)
    # a user who spells it opens nothing
    assert not THINK_IDS.is_open_after(encoded(QWEN3, [Message("user", "<think>")], words).tokens)


THINK_IDS = ThinkMarkers(258, 259)

# how families ask for thinking: Gemma 4 and GLM; DeepSeek V3.1 and Granite; gpt-oss; Seed-OSS
SWITCHES = (
    "{% if enable_thinking is defined and enable_thinking %}+{% else %}-{% endif %}",
    "{% if thinking is defined and thinking %}+{% endif %}",
    "{{ reasoning_effort | default('medium') }}",
    "{% if thinking_budget is defined and thinking_budget == 0 %}-{% endif %}",
)


def test_on_off_and_unsaid_are_three_things(words: EngineProcess) -> None:
    def rendered(template: str, think: str | None) -> str:
        variables = thinking_variables(think)
        written = template + "{{ messages[0].content }}"
        return encoded(written, [Message("user", "Hi")], words, variables).text.removesuffix("Hi")

    assert [rendered(SWITCHES[0], think) for think in (None, "on", "off")] == ["-", "+", "-"]
    assert [rendered(SWITCHES[1], think) for think in (None, "hide", "off")] == ["", "+", ""]
    efforts = [rendered(SWITCHES[2], think) for think in (None, "on", "off", "low", "high")]
    assert efforts == ["medium", "medium", "low", "low", "high"]
    assert [rendered(SWITCHES[3], think) for think in (None, "on", "off")] == ["", "", "-"]
    assert [rendered(SWITCHES[0], effort) for effort in ("low", "high")] == ["+", "+"]


@pytest.mark.parametrize(
    ("template", "markers", "says"),
    [
        (QWEN3, THINK, ""),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", THINK, ""),
        (R1, THINK, "no way to turn its thinking off"),
        ("{{ reasoning_effort }}", HARMONY, "reasoning effort is set to low"),
        ("nothing of the kind", THINK, ""),
        (R1, None, ""),
    ],
)
def test_what_can_not_be_turned_off_is_said(
    template: str, markers: ReasoningMarkers | None, says: str
) -> None:
    remark = thinking_remark("off", template, markers)
    assert says in remark
    assert bool(says) == bool(remark)


# ---- the real engine ----


def test_the_engine_lets_text_out_at_a_marker() -> None:
    """Tokens of an answer of the demo model, taken for markers, part the same answer."""
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(DEMO), Placement(n_threads=2, n_ctx=256))
        format = MistralFormat("v1", bos=1, eos=2)
        prompt = format.encode([Message("user", "Hi! How are you today?")], engine)
        greedy = AnswerOptions(Sampling(temperature=0), 24)
        plain = Answer()
        for delta in ChatModel(engine, format, 256).answer(prompt, greedy):
            plain.add(delta)
        once = [t for t in plain.tokens if plain.tokens.count(t) == 1]
        assert len(once) >= 4
        markers = ThinkMarkers(opens=once[1], closes=once[-1])
        answer = Answer()
        # a stop string that never comes, but whose beginning is held back right before the marker
        before = plain.tokens[: plain.tokens.index(once[1])]
        held = engine.detokenize(before)[-1] + "never"
        options = AnswerOptions(greedy.sampling, 24, (held,))
        for delta in ChatModel(engine, format, 256, reasoning_markers=markers).answer(
            prompt, options
        ):
            answer.add(delta)
        assert answer.tokens == plain.tokens
        assert answer.text
        at, end = plain.tokens.index(once[1]), plain.tokens.index(once[-1])
        assert answer.text_tokens == plain.tokens[:at] + plain.tokens[end + 1 :]
        assert answer.thinking == engine.detokenize(plain.tokens[at + 1 : end])
