"""The house of the design: which module may import what, held by a walk over every import."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "localmoe"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

MANY_MODULE_LINES = 450
MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60

READER = "config/environment.py"
TERMINALS = {"click", "rich", "prompt_toolkit"}
# what a module (or all of a folder) must not import; the longest matching entry counts
FORBIDDEN = {
    "planner/": {"huggingface_hub", "llama_cpp", *TERMINALS},
    "perf/": {"huggingface_hub", "llama_cpp", *TERMINALS},
    "hardware/": {"huggingface_hub", "llama_cpp", *TERMINALS},
    "planner/plan.py": {
        "huggingface_hub", "llama_cpp", *TERMINALS, "os", "pathlib", "io", "socket", "subprocess",
        "psutil", "localmoe.engine.client", "localmoe.hub.client", "localmoe.catalog.catalog",
    },
    "hub/": {"llama_cpp", *TERMINALS, "localmoe.engine", "localmoe.planner"},
    "gguf/": {
        "huggingface_hub", "llama_cpp", *TERMINALS, "localmoe.engine", "localmoe.planner",
        "localmoe.hub", "localmoe.catalog",
    },
    "engine/": {
        "huggingface_hub", "llama_cpp", *TERMINALS, "localmoe.planner", "localmoe.hub",
        "localmoe.catalog",
    },
    "engine/native/llama.py": {"huggingface_hub", *TERMINALS, "localmoe.planner", "localmoe.hub"},
    "prompt/": {"huggingface_hub", "llama_cpp", *TERMINALS, "psutil", "localmoe.planner"},
    "chat/": {"huggingface_hub", "llama_cpp", *TERMINALS, "psutil", "localmoe.planner"},
    "batch/": {"huggingface_hub", "llama_cpp", *TERMINALS, "psutil"},
    "api.py": {"huggingface_hub", "llama_cpp", *TERMINALS, "psutil"},
    "": {"llama_cpp", "huggingface_hub", *TERMINALS},
    "cli/": {"llama_cpp", "huggingface_hub"},
    "repl/": {"llama_cpp", "huggingface_hub"},
    "terminal/": {"llama_cpp", "huggingface_hub"},
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a module imports, at the top or later."""
    package = ["localmoe", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def rule_for(module: str) -> set[str]:
    return FORBIDDEN[max((p for p in FORBIDDEN if module.startswith(p)), key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_it_must_not_know(module: str) -> None:
    broken = {
        name
        for name in imports(PACKAGE / module)
        for forbidden in rule_for(module)
        if name == forbidden or name.startswith(forbidden + ".")
    }
    assert not broken


@pytest.mark.parametrize("module", [m for m in MODULES if m != READER])
def test_only_one_module_reads_the_environment(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text("utf-8"))
    reads = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert reads == []


def test_the_walk_sees_an_import_that_is_forbidden() -> None:
    assert "llama_cpp.llama_cpp" in set(imports(PACKAGE / "engine/native/llama.py"))
    assert "llama_cpp" in rule_for("engine/worker/scheduler.py")
    assert "llama_cpp" not in rule_for("engine/native/llama.py")


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_can_be_read_in_one_sitting(module: str) -> None:
    text = (PACKAGE / module).read_text("utf-8")
    n_lines = len(text.splitlines())
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    if n_lines > MANY_MODULE_LINES:
        warnings.warn(f"{module} has {n_lines} lines: look for a second concept", stacklevel=1)
    assert n_lines <= MAX_MODULE_LINES
    assert long == {}
