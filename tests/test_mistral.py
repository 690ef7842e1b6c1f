"""Mistral's format against Mistral's own reference, through llama.cpp's tokenizer."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from vocabulary_files import V1_FILE, V3_FILE, write_sentencepiece

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Placement
from localmoe.errors import PromptError
from localmoe.prompt.messages import Message
from localmoe.prompt.mistral import MistralFormat

N_CONVERSATIONS = 2500
FRAGMENTS = [
    "Hello", "how are you?", "What is 2+2?", "a", " ", "  ", "\n", "\n\n", "\t", "\r\n", "▁", "▁▁",
    "</s>", "<s>", "<unk>", "[INST]", "[/INST]", " [INST] ", "[/INST] </s><s>", "<0x0A>",
    "[TOOL_CALLS]",
    "<<SYS>>", "<|im_start|>", "[control_8]", "café", unicodedata.normalize("NFD", "café Ångström"),
    "Ångström", "日本語のテキスト", "中文，标点。", "한국어", "العربية", "עברית", "ไทย",
    "हिन्दी", "Ελληνικά",
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "‍", "​", "﻿", "\u00a0", "\u2028", "…", "“quoted”", "ﬁ",
    "½", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0010fffd", "\ue000", "def f(x):\n    return x", "{\"a\": [1, 2]}",
    "1234567890",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa", "THE QUICK", "don't", "\x01\x7f", "Z͑ͫ̓ͪ̂ͫ̽", "http://x.y/?q=1&b",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """A text of pieces that tokenizers trip over; never empty."""
    pieces = [rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.3:
        codes = rng.choices(
            [*range(32, 0x250), *range(0x3040, 0x30FF), *range(0x1F300, 0x1F64F)], k=5
        )
        pieces.insert(rng.randrange(len(pieces) + 1), "".join(map(chr, codes)))
    return rng.choice(["", " "]).join(pieces) + rng.choice(["", "", " ", "\n", "   "])


def random_conversation(rng: random.Random) -> list[Message]:
    """Any order that the reference takes: neighbours of one role, a late system, an open end."""
    messages = [Message("system", random_text(rng)) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    if messages and rng.random() < 0.1:
        messages.append(Message("assistant", random_text(rng)))
    for _ in range(rng.randint(0, 3)):
        messages += [Message("user", random_text(rng)) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        if rng.random() < 0.05:
            messages.append(Message("system", random_text(rng)))
        answers = rng.choice([1, 1, 1, 1, 2])
        messages += [Message("assistant", random_text(rng)) for _ in range(answers)]
    messages.append(Message("user", random_text(rng)))
    if rng.random() < 0.15:
        messages.append(Message("assistant", random_text(rng)))
    return messages


def reference_tokens(reference: MistralTokenizer, messages: list[Message]) -> tuple[int, ...]:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    converted = [kinds[message.role](content=message.content) for message in messages]
    if isinstance(converted[-1], AssistantMessage):
        converted[-1].prefix = True
    request = ChatCompletionRequest(messages=converted)
    return tuple(reference.encode_chat_completion(request).tokens)


FORMATS = {
    "v1": (V1_FILE, MistralFormat("v1", bos=1, eos=2), MistralTokenizer.v1),
    "v3": (V3_FILE, MistralFormat("v3", bos=1, eos=2), MistralTokenizer.v3),
}


@pytest.fixture(scope="module", params=["v1", "v3", "v1-no-space", "v3-no-space"])
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MistralFormat, MistralTokenizer, EngineProcess]]:
    """A format, its reference, and llama.cpp with the reference's vocabulary."""
    version, _, no_space = request.param.partition("-")
    file, format, reference = FORMATS[version]
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    write_sentencepiece(path, file, add_space_prefix=False if no_space else None)
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(path), Placement(n_threads=1), vocab_only=True)
        yield replace(format, add_space_prefix=not no_space), reference(), engine


def test_tokens_equal_the_reference(
    compared: tuple[MistralFormat, MistralTokenizer, EngineProcess],
) -> None:
    format, reference, engine = compared
    rng = random.Random(f"{format.version}{format.add_space_prefix}")
    for _ in range(N_CONVERSATIONS):
        messages = random_conversation(rng)
        expected = reference_tokens(reference, messages)
        assert format.encode(messages, engine).tokens == expected, messages


def test_sampled_ids_stand_for_an_answer(
    compared: tuple[MistralFormat, MistralTokenizer, EngineProcess],
) -> None:
    format, _, engine = compared
    question = [Message("user", "Hello")]
    sampled = (21558, 28706, 28725)
    asked = format.encode(question, engine).tokens
    history = [*question, Message("assistant", "Hi there", sampled), Message("user", "And?")]
    assert format.encode(history, engine).tokens[: len(asked) + 4] == (*asked, *sampled, 2)
    left_open = format.encode(history[:2], engine).tokens
    assert left_open == (*asked, *sampled)


@pytest.fixture(scope="module")
def v1_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "v1.gguf"
    write_sentencepiece(path, V1_FILE)
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(path), Placement(n_threads=1), vocab_only=True)
        yield engine


def test_the_tokens_of_mixtral_are_the_known_ones(v1_engine: EngineProcess) -> None:
    conversation = [
        Message("system", "You are a pirate."),
        Message("user", "Hello"),
        Message("assistant", "Hi there!"),
        Message("user", "How are you?"),
    ]
    prompt = MistralFormat("v1", bos=1, eos=2).encode(conversation, v1_engine)
    assert prompt.text == (
        "<s> [INST] You are a pirate.\n\nHello [/INST] Hi there!</s> [INST] How are you? [/INST]"
    )
    assert list(prompt.tokens) == [
        1, 733, 16289, 28793, 995, 460, 264, 17368, 380, 28723, 13, 13, 16230, 733, 28748, 16289,
        28793, 15359, 736, 28808, 2, 733, 16289, 28793, 1602, 460, 368, 28804, 733, 28748, 16289,
        28793,
    ]  # fmt: skip


def test_v3_shows_what_it_encodes(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "v3.gguf", V3_FILE)
    messages = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hey ")]
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(tmp_path / "v3.gguf"), Placement(n_threads=1), vocab_only=True)
        prompt = FORMATS["v3"][1].encode([*messages, Message("user", "So?")], engine)
        assert prompt.text == "<s>[INST] Hi[/INST] Hey</s>[INST] Be brief.\n\nSo?[/INST]"
        assert engine.detokenize(prompt.tokens) == prompt.text


def test_a_vocabulary_without_the_control_tokens_of_v3_is_refused(v1_engine: EngineProcess) -> None:
    with pytest.raises(PromptError, match=r"no token \[INST\]"):
        MistralFormat("v3", bos=1, eos=2).encode([Message("user", "Hello")], v1_engine)


def test_what_the_reference_refuses_is_refused(v1_engine: EngineProcess) -> None:
    format = MistralFormat("v1", bos=1, eos=2)
    late = [Message("user", "a"), Message("assistant", "b"), Message("system", "c")]
    with pytest.raises(PromptError, match="A system message follows an answer"):
        format.encode([*late, Message("user", "d")], v1_engine)
    with pytest.raises(PromptError, match=r"Message 1 \(user\) is empty"):
        format.encode([Message("user", "")], v1_engine)
    with pytest.raises(PromptError, match="no message of the user"):
        format.encode([Message("system", "a")], v1_engine)
