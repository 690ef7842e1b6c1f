"""The Python front door, on the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import localmoe
from localmoe import LocalMoE, LocalMoeError, Reply
from localmoe.api import Options
from localmoe.errors import PromptError, UsageError

NUMBERS = (
    "temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
HI = [{"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module")
def moe() -> Iterator[LocalMoE]:
    with LocalMoE("demo") as moe:
        yield moe


def test_the_public_names() -> None:
    names = ["BatchResult", "Delta", "LocalMoE", "LocalMoeError", "Reply", "__version__"]
    assert localmoe.__all__ == names
    assert all(getattr(localmoe, name) for name in localmoe.__all__)
    with pytest.raises(AttributeError):
        localmoe.nothing_of_that_name  # noqa: B018


def test_a_reply_is_a_message_that_knows_its_figures(moe: LocalMoE) -> None:
    reply = moe.chat(HI, max_tokens=40, seed=1)
    assert set(reply) == {"role", "content"}
    assert reply["role"] == "assistant"
    assert reply["content"] == reply.text != ""
    assert reply.finish_reason in ("stop", "length")
    assert 0 < reply.usage.completion_tokens <= 40
    assert reply.timings.generation_tps > 0


def test_a_stream_is_the_same_answer_in_pieces(moe: LocalMoE) -> None:
    reply = moe.chat(HI, temperature=0.0)
    chunks = list(moe.stream(HI, temperature=0.0))
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


def test_a_reply_given_back_is_not_computed_again(moe: LocalMoE) -> None:
    """Its tokens are the sampled ones, even where its text would be encoded otherwise."""
    messages: list[object] = [*HI]
    for text in ("What do you like?", "Why?", "Really?"):
        reply = moe.chat(messages, temperature=1.3, seed=5)
        messages += [reply, {"role": "user", "content": text}]
    last = moe.chat(messages, max_tokens=1)
    held = last.usage.prompt_tokens - last.usage.cached_tokens
    assert held < 20  # the last message alone


def test_messages_in_and_out_have_one_form(moe: LocalMoE) -> None:
    reply = moe.chat(HI, temperature=0.0)
    plain = {"role": "assistant", "content": reply["content"]}
    question = {"role": "user", "content": "And you?"}
    with_reply = moe.chat([*HI, reply, question], temperature=0.0)
    with_plain = moe.chat([*HI, plain, question], temperature=0.0)
    assert with_reply.text == with_plain.text


def test_an_answer_that_was_begun_is_gone_on_with(moe: LocalMoE) -> None:
    whole = moe.chat(HI, temperature=0.0).text
    at = whole.index(" ")
    begun = {"role": "assistant", "content": whole[:at]}
    assert moe.chat([*HI, begun], temperature=0.0).text == whole[at:]


def test_an_edited_reply_counts_by_its_text(moe: LocalMoE) -> None:
    reply = moe.chat(HI, temperature=0.0)
    reply["content"] = "I am a teapot."
    question = {"role": "user", "content": "What are you?"}
    edited = moe.chat([*HI, reply, question], max_tokens=1)
    plain = [*HI, {"role": "assistant", "content": "I am a teapot."}, question]
    assert edited.usage.prompt_tokens == moe.chat(plain, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize("stop", ["e", ["e", "zzz"]])
def test_stop_is_a_string_or_several(moe: LocalMoE, stop: object) -> None:
    assert "e" not in moe.chat(HI, stop=stop).text  # type: ignore[arg-type]


def test_a_bias_is_by_token_id(moe: LocalMoE) -> None:
    first = moe.chat(HI, temperature=0.0).tokens[0]
    banned = moe.chat(HI, temperature=0.0, logit_bias={first: -100}, presence_penalty=1.5)
    assert banned.tokens[0] != first
    with pytest.raises(UsageError, match="logit_bias"):
        moe.chat(HI, logit_bias={first: 1000})
    with pytest.raises(LocalMoeError, match="token 999999"):
        moe.chat(HI, logit_bias={999999: 1})


def test_unknown_options_are_refused_with_the_near_name(moe: LocalMoE) -> None:
    with pytest.raises(UsageError, match="Did you mean temperature"):
        moe.chat(HI, temprature=0.7)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="no option n_gpu_layers"):
        moe.chat(HI, n_gpu_layers=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="temperature"):
        moe.chat(HI, temperature=-1.0)
    with pytest.raises(UsageError, match="no_such_setting"):
        LocalMoE("demo", no_such_setting=1)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "king", "content": "x"}], [{"content": "x"}]]
)
def test_bad_messages_are_refused(moe: LocalMoE, messages: list[object]) -> None:
    with pytest.raises(PromptError):
        moe.chat(messages)


def test_every_error_is_a_localmoe_error() -> None:
    with pytest.raises(LocalMoeError):
        LocalMoE("no-such-model")


def test_a_stream_left_early_leaves_the_model_usable(moe: LocalMoE) -> None:
    for chunk in moe.stream(HI):
        if chunk.text:
            break
    assert isinstance(moe.chat(HI), Reply)


def test_a_batch_gives_each_answer_as_it_finishes() -> None:
    requests = ["Hi!", [{"role": "user", "content": "Bye!"}], {"prompt": "x", "temprature": 1}]
    with LocalMoE("demo", parallel=2, ctx_size=256) as moe:
        results = list(moe.batch(requests, max_tokens=8, temperature=0))
        alone = moe.chat([{"role": "user", "content": "Hi!"}], max_tokens=8, temperature=0)
    by_index = {result.index: result for result in results}
    assert sorted(by_index) == [0, 1, 2]
    assert by_index[0].text == alone["content"]
    assert by_index[1].text
    assert "temperature" in by_index[2].error


def test_a_batch_outlives_its_engine() -> None:
    with LocalMoE("demo", parallel=2, ctx_size=256) as moe:
        results = moe.batch([f"Tell me about {n}." for n in range(8)], max_tokens=8)
        found = [next(results)]
        moe._loaded.engine.kill()
        found += results
    assert sorted(result.index for result in found) == list(range(8))
    assert all(not result.error for result in found)


def test_an_answer_has_the_form_of_its_schema_or_is_an_error(moe: LocalMoE) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    reply = moe.chat(HI, json_schema=schema, seed=1)
    assert isinstance(json.loads(reply.text)["n"], int)
    with pytest.raises(LocalMoeError, match="cut"):
        moe.chat(HI, json_schema=schema, seed=1, max_tokens=2)


def test_what_no_answer_could_be_held_to_is_refused_at_once(moe: LocalMoE) -> None:
    with pytest.raises(UsageError, match="#/not"):
        moe.chat(HI, json_schema={"not": {"type": "string"}})
    with pytest.raises(UsageError, match="Leave one"):
        moe.chat(HI, json_schema="{}", grammar='root ::= "a"')


@pytest.mark.parametrize("value", [object(), b"x", 3.5, {1}, {"x": object()}, [object()]])
@pytest.mark.parametrize("name", sorted(set(Options.__annotations__) - {"logit_bias"}))
def test_a_wrong_type_of_an_option_is_a_localmoe_error(
    moe: LocalMoE, name: str, value: object
) -> None:
    if value == 3.5 and name in NUMBERS:
        value = "a text"
    with pytest.raises(LocalMoeError):
        moe.chat(HI, **{name: value})  # type: ignore[arg-type]


def test_none_is_what_was_not_said(moe: LocalMoE) -> None:
    nothing = dict.fromkeys(Options.__annotations__)
    assert moe.chat(HI, **{**nothing, "max_tokens": 1}).text  # type: ignore[arg-type]


@pytest.mark.parametrize("messages", [None, 3, "Hi", b"Hi", {"role": "user"}, [None], [3]])
def test_a_wrong_type_of_messages_is_a_localmoe_error(moe: LocalMoE, messages: object) -> None:
    with pytest.raises(LocalMoeError):
        moe.chat(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [None, 3, b"demo", ["demo"], Path("no-such-file.gguf")])
def test_a_wrong_type_of_model_is_a_localmoe_error(model: object) -> None:
    with pytest.raises(LocalMoeError):
        LocalMoE(model)  # type: ignore[arg-type]
