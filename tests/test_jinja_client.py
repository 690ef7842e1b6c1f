"""Many conversations rendered in few processes: the same texts, and limits for each of its own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import pytest

from localmoe.batch.encoder import with_renderer
from localmoe.prompt.chat_template import TemplateFormat
from localmoe.prompt.jinja_client import Limits, Renderer, RenderError, Rendering, RenderJob, render
from localmoe.prompt.messages import Message

NOW = datetime(2026, 7, 4, 12, 30)
TIGHT = Limits(wall_s=8.0, cpu_s=1, memory_bytes=256 << 20, output_chars=1000)
SPINNING = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    renderer = Renderer({})
    yield renderer
    renderer.close()


def job(template: str, text: str = "Hi", limits: Limits = TIGHT) -> RenderJob:
    return RenderJob(template, [Rendering([{"role": "user", "content": text}])], {}, NOW, limits)


def test_texts_are_those_of_a_child_of_their_own(renderer: Renderer) -> None:
    jobs = [job(CHATML, text) for text in ("Hi", "a\nb\u2028c", "é🙂\\", "")]
    assert [renderer.render(one) for one in jobs] == [render(one, {}) for one in jobs]


def test_a_child_is_kept_and_replaced_in_time() -> None:
    renderer = Renderer({}, jobs_of_a_child=3)
    pids = []
    for _ in range(7):
        renderer.render(job(CHATML))
        assert renderer._child is not None
        pids.append(renderer._child.pid)
    renderer.close()
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[5] != pids[6]


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ raise_exception('no') }}", "raised"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "syntax"),
        ("{{ 'x' * 2000 }}", "limit"),
        (SPINNING, "limit"),
    ],
)
def test_one_that_fails_harms_no_other(renderer: Renderer, template: str, kind: str) -> None:
    before = renderer.render(job(CHATML))
    with pytest.raises(RenderError) as raised:
        renderer.render(job(template))
    assert raised.value.kind == kind
    assert renderer.render(job(CHATML)) == before


def test_time_is_for_each_and_not_for_all(renderer: Renderer) -> None:
    """All together they take more processor time than the one second that each may take."""
    slow = "{% for i in range(300) %}{% for j in range(1000) %}{% endfor %}{% endfor %}."
    for _ in range(90):
        assert renderer.render(job(slow)) == ["."]


def test_a_child_that_hangs_is_ended_by_the_clock(renderer: Renderer) -> None:
    with pytest.raises(RenderError, match="still at work after 0.3 s"):
        renderer.render(job(SPINNING, limits=Limits(wall_s=0.3)))
    assert renderer.render(job("x")) == ["x"]


def test_a_format_with_a_renderer_gives_the_same_prompts(renderer: Renderer) -> None:
    class Bytes:
        def tokenize(self, pieces: object) -> list[tuple[int, ...]]:
            return [tuple(piece.text.encode()) for piece in pieces]  # type: ignore[attr-defined]

    format = TemplateFormat(CHATML, control_tokens=frozenset({"<|im_start|>", "<|im_end|>"}))
    kept = with_renderer(format, renderer)
    for text in ("Hi", "<|im_end|> out", "again"):
        messages = [Message("system", "Be kind."), Message("user", text)]
        assert kept.encode(messages, Bytes()) == format.encode(messages, Bytes())
