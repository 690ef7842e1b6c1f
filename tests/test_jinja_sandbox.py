"""Rendering templates in a child: the surroundings they expect, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from localmoe.prompt.jinja_client import CHILD, Limits, RenderError, Rendering, RenderJob, render

MESSAGES = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Hey"}]
TIGHT = Limits(wall_s=8.0, cpu_s=1, memory_bytes=256 << 20, output_chars=1 << 20)
SPINNING = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS_WRITER = "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}"


def text_of(template: str, **variables: object) -> str:
    job = RenderJob(template, [Rendering(MESSAGES)], variables, datetime(2026, 7, 4, 12, 30))
    return render(job, {})[0]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {% if true %}\n[{{ m.role }}]{{ m['content'] | trim }}"
         "\n  {% endif %}\n{% endfor %}", "[user]Hi\n[assistant]Hey\n"),
        ("{{ messages[1:] | tojson }}", '[{"role": "assistant", "content": "Hey"}]'),
        ("{{ '<é>' | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1) }}",
         '"<é>"{\n "b": 1,\n "a": 2\n}'),
        ("{{ strftime_now('%d %B %Y') }}", "04 July 2026"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
         "{% endfor %}", "assistant"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ thinking is defined }}{{ effort }}", "Falselow"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n * 3 }}{{ '-' * 3 }}{{ 2 ** 10 }}{{ 'a' + 'b' }}", "6---1024ab"),
        ("{{ messages[0].content.strip().upper() }}{{ 'a,b'.split(',')[-1] }}", "HIb"),
        ("{%- macro turn(m) -%}{{ m.role }}:{%- endmacro -%}{{ turn(messages[0]) }}", "user:"),
        ("{{ '\\ud800' }}", "?"),
    ],
)  # fmt: skip
def test_a_template_finds_what_hugging_face_gives_it(template: str, text: str) -> None:
    assert text_of(template, effort="low") == text


def test_one_child_renders_several_conversations() -> None:
    job = RenderJob(
        "{{ messages | length }}{% if add_generation_prompt %}>{% endif %}",
        [Rendering(MESSAGES), Rendering(MESSAGES[:1], add_generation_prompt=False)],
    )
    assert render(job, {}) == ["2>", "1"]


# What each hostile template may come to: an error of a kind, or a text that tells nothing.
HOSTILE = [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", {"unsafe"}),
    ("{{ ''['__class__']['__mro__'] }}", {"unsafe"}),
    ("{{ (''|attr('__class__'))|attr('__mro__') }}", {"unsafe", ""}),
    ("{{ lipsum.__globals__['os'].popen('id').read() }}", {"unsafe", "failed"}),
    ("{{ cycler.__init__.__globals__.os.system('id') }}", {"unsafe"}),
    ("{{ joiner.__init__.__globals__ }}", {"unsafe"}),
    ("{{ namespace.__init__.__globals__ }}", {"unsafe"}),
    ("{{ raise_exception.__globals__.sys }}", {"unsafe", "failed"}),
    ("{{ strftime_now.__closure__[0].cell_contents }}", {"unsafe", "failed"}),
    ("{{ self._TemplateReference__context.environment }}", {"unsafe", "failed"}),
    ("{{ self.__init__.__globals__.__builtins__ }}", {"unsafe", "failed"}),
    ("{{ '{0.__class__.__mro__}'.format('') }}", {"unsafe", ""}),
    ("{{ '{m.__class__}'.format_map({'m': 1}) }}", {"unsafe", ""}),
    ("{{ messages.append(1) }}", {"unsafe"}),
    ("{{ messages[0].update(role='x') }}", {"unsafe"}),
    ("{{ messages.clear() }}", {"unsafe"}),
    ("{% import 'os' as os %}{{ os }}", {"failed"}),
    ("{% include '/etc/passwd' %}", {"failed"}),
    (SPINNING, {"limit"}),
    ("{{ range(10 ** 9) | list | length }}", {"failed"}),
    ("{{ 'a' * 10 ** 12 }}", {"limit"}),
    ("{{ [0] * 10 ** 12 }}", {"limit"}),
    ("{{ (10 ** 12) * 'a' }}", {"limit"}),
    ("{{ 10 ** (10 ** 10) }}", {"limit"}),
    ("{{ 2 ** (3 ** (4 ** 5)) }}", {"limit"}),
    ("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
     "{% endfor %}{{ ns.s }}", {"limit"}),
    ("{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
     "{% endfor %}{{ ns.s }}", {"limit"}),
    ("{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
     "{% endfor %}{{ ns.n }}", {"limit", "failed"}),
    ("{{ 'a' | center(10 ** 12) }}", {"limit"}),
    ("{{ ('a' * 99999) | replace('a', 'b' * 99999) }}", {"limit"}),
    ("{{ '%01000000000d' | format(1) }}", {"limit"}),
    ("{{ '%01000000000d' % 1 }}", {"limit"}),
    ("{{ '{:1000000000}'.format(1) }}", {"limit"}),
    ("{{ lipsum(n=1000000) }}", {"limit"}),
    (ENDLESS_WRITER, {"limit"}),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {"limit"}),
    ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", {"limit"}),
    ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", {"limit"}),
    ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", {"limit"}),
    ("{{ " + "[" * 90 + "1" + "]" * 90 + " }}", {"limit", "failed", "syntax"}),
    ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, {"limit"}),
    ("{{ " + "-" * 90000 + "1 }}", {"limit"}),
    ("{{ 1" + "+1" * 90000 + " }}", {"limit"}),
    ("{{ strftime_now('%c' * 9999) }}", {"limit"}),
    ("{{ [1] | tojson(indent=10 ** 10) }}", {"limit"}),
    ("{{ 1/0 }}", {"failed"}),
    ("{% if %}", {"syntax"}),
    ("{{ unknown.attribute }}", {"failed"}),
    ("x" * 2_000_000, {"limit"}),
]  # fmt: skip


def shown(value: str | set[str]) -> str:
    """A parameter as a name that is the same in every process."""
    return value[:40] if isinstance(value, str) else "-".join(sorted(value))


@pytest.mark.parametrize(("template", "kinds"), HOSTILE, ids=shown)
def test_no_hostile_template_executes_or_hangs(template: str, kinds: set[str]) -> None:
    job = RenderJob(template, [Rendering(MESSAGES)], limits=TIGHT)
    try:
        outcome, words = "", render(job, {})[0]
    except RenderError as error:
        outcome, words = error.kind, error.message
    assert outcome in kinds, words
    assert "uid=" not in words
    assert "root:" not in words
    assert "<class" not in words


def test_a_template_that_sleeps_through_its_time_is_ended() -> None:
    limits = Limits(wall_s=0.5, cpu_s=60)
    with pytest.raises(RenderError, match=r"still at work after 0\.5 s") as error:
        render(RenderJob(SPINNING, [Rendering(MESSAGES)], limits=limits), {})
    assert error.value.kind == "limit"


def test_a_refusal_is_the_templates_own_words_made_harmless() -> None:
    template = "{{ raise_exception('No\x1b[31m system\n\u202e role!' ~ 'x' * 999) }}"
    with pytest.raises(RenderError) as error:
        text_of(template)
    assert error.value.kind == "raised"
    assert error.value.message.startswith("No [31m system role!xxx")
    assert len(error.value.message) <= 160


def test_the_child_is_given_nothing_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it import what lies where it was started."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": str(tmp_path), "HF_TOKEN": "secret", "PYTHONHASHSEED": "broken"}
    assert render(RenderJob("{{ 1 }}", [Rendering(MESSAGES)]), env) == ["1"]


def test_the_child_starts_fast() -> None:
    """A bare Python takes most of it, since nothing else of the program is imported."""
    command = [sys.executable, "-X", "importtime", str(CHILD)]
    ran = subprocess.run(command, input="", capture_output=True, text=True)
    imported = [line.split("|")[-1].strip() for line in ran.stderr.splitlines() if "|" in line]
    assert "jinja2" in imported
    packages = {name.split(".")[0] for name in imported}
    assert not packages & {"localmoe", "numpy", "pydantic", "llama_cpp"}


def test_only_the_child_imports_jinja() -> None:
    package = Path(__file__).parent.parent / "localmoe"
    importing = {
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(n.split(".")[0] == "jinja2" for n in _modules(node))
    }
    assert importing == {"jinja_sandbox.py"}


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names]
