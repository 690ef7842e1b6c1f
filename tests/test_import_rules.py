"""Rules of the architecture (docs/architecture.md), held by a walk over every import and name."""

from __future__ import annotations

import ast
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "localmoe"
PATHS = sorted(PACKAGE.rglob("*.py"))
MODULES = [path.relative_to(PACKAGE).as_posix() for path in PATHS]

MANY_MODULE_LINES, MAX_MODULE_LINES = 450, 600
MAX_FUNCTION_LINES = 60
MAX_MODULES = {"cli": 18}
MAX_MODULES_OF_OTHERS = 12
MAX_FUNCTION_IMPORTS = 20

ENVIRONMENT_READER = "config/environment.py"
PRINTER = "terminal/console.py"
# how many files each opens: those of the kernel, /dev/null, and what a person names
FILE_READERS = {
    "files.py": 2,
    "hardware/system.py": 1,
    "hub/partial_file.py": 1,
    "engine/worker/model.py": 1,
    "engine/worker/server.py": 1,
    "engine/native/pinning.py": 1,
    "cli/__init__.py": 1,
    "cli/batch.py": 1,
    "cli/sessions.py": 1,
}
LLAMA_CPP_IMPORTER = "engine/native/llama.py"
HTTP_CLIENTS = {"httpx", "huggingface_hub", "requests", "urllib3"}
TERMINALS = {"click", "prompt_toolkit", "rich"}

# from the ground up; a module imports from its own layer and from those before it alone
LAYERS = [
    {"errors", "files", "callbacks"},
    {"gguf"},
    {"engine"},
    {"structured"},
    {"config", "hardware", "hub"},
    {"perf"},
    {"prompt"},
    {"planner"},
    {"catalog"},
    {"chat"},
    {"loading"},
    {"batch"},
    {"api"},
    {"terminal"},
    {"repl"},
    {"cli"},
    {"__main__", "__init__"},
]
# what a module, or all of a package, must not reach, not even through others
UNREACHABLE = {
    "planner/plan.py": {"psutil", "subprocess", "socket", "llama_cpp", "huggingface_hub"},
    "hub/installed.py": HTTP_CLIENTS,
    "gguf/": {"llama_cpp", "socket", "subprocess", *HTTP_CLIENTS, *TERMINALS},
    "planner/": {"llama_cpp", *HTTP_CLIENTS, *TERMINALS},
    "perf/": {"llama_cpp", *HTTP_CLIENTS, *TERMINALS},
    "chat/": {"llama_cpp", "psutil", *HTTP_CLIENTS, *TERMINALS},
    "batch/": {"llama_cpp", *TERMINALS},
    "api.py": {"llama_cpp", *TERMINALS},
}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"))


@cache
def imports(module: str) -> frozenset[tuple[str, bool]]:
    """Absolute names of all that a module imports, and whether it does so at import time."""
    package = ["localmoe", *module.split("/")[:-1]]
    found: set[tuple[str, bool]] = set()

    def walk(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            if isinstance(child, ast.Import):
                found.update((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                name = ".".join([*base, *([child.module] if child.module else [])])
                found.update((f"{name}.{alias.name}", at_import) for alias in child.names)
            walk(child, at_import and not later)

    walk(tree_of(module), True)
    return frozenset(found)


def own_module(name: str) -> str | None:
    """The module of this package that an absolute name is, or is defined in."""
    parts = name.split(".")
    if parts[0] != "localmoe":
        return None
    for n in range(len(parts), 0, -1):
        path = "/".join(parts[1:n])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in MODULES:
                return candidate
    return None


@cache
def own_imports(module: str, *, at_import_only: bool = True) -> frozenset[str]:
    """The modules of this package that a module imports."""
    names = (name for name, at_import in imports(module) if at_import or not at_import_only)
    return frozenset(found for name in names if (found := own_module(name)))


def reached(module: str) -> set[str]:
    """A module, and all of this package that comes with it when it is imported."""
    seen, waiting = set(), [module]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += own_imports(one)
    return seen


def layer_of(module: str) -> int:
    top = module.split("/")[0].removesuffix(".py")
    return next(n for n, layer in enumerate(LAYERS) if top in layer)


def top_level(module: str) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in tree_of(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node


def functions(module: str) -> Iterator[ast.FunctionDef]:
    yield from (n for n in ast.walk(tree_of(module)) if isinstance(n, ast.FunctionDef))


# ---- layers ----


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_and_those_below(module: str) -> None:
    upward = {
        found
        for found in own_imports(module, at_import_only=False)
        if found != "__init__.py"  # the version
        and layer_of(found) > layer_of(module)
    }
    assert upward == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_reaches_nothing_that_it_must_not_know(module: str) -> None:
    forbidden = {
        name
        for rule, names in UNREACHABLE.items()
        if module == rule or (rule.endswith("/") and module.startswith(rule))
        for name in names
    }
    broken = {
        name.split(".")[0]
        for one in reached(module)
        for name, at_import in imports(one)
        if at_import and name.split(".")[0] in forbidden
    }
    assert broken == set()


def test_there_is_no_circle_when_modules_are_imported() -> None:
    for module in MODULES:
        for imported in own_imports(module) - {module}:
            assert module not in reached(imported), f"{module} <-> {imported}"


# ---- one place for each thing ----


@pytest.mark.parametrize("module", [m for m in MODULES if m != LLAMA_CPP_IMPORTER])
def test_one_module_imports_llama_cpp(module: str) -> None:
    assert not any(name.split(".")[0] == "llama_cpp" for name, _ in imports(module))


@pytest.mark.parametrize("module", [m for m in MODULES if m != ENVIRONMENT_READER])
def test_one_module_reads_the_environment(module: str) -> None:
    reads = [
        node.lineno
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert reads == []


def is_reading(call: ast.Call) -> bool:
    """Whether a call opens a file by its name and reads it, whatever the file is."""
    mode = call.args[0] if call.args else None
    match call.func:
        case ast.Name(id="open") | ast.Attribute(attr="read_bytes" | "read_text"):
            return True
        case ast.Attribute(attr="open"):
            return isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    return False


def test_one_module_opens_files_to_read() -> None:
    """What is read unasked is read by files.py, which refuses pipes and devices."""
    calls = {
        module: [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Call) and is_reading(n)]
        for module in MODULES
    }
    assert {module: len(found) for module, found in calls.items() if found} == FILE_READERS


@pytest.mark.parametrize("module", [m for m in MODULES if m != PRINTER])
def test_one_module_prints(module: str) -> None:
    calls = (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))
    assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)


def test_one_module_writes_files_whole() -> None:
    """What takes a name over from a file that was written beside it is files.py alone."""
    renames = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("os.replace", "os.rename", "shutil.move")
    }
    assert renames == {"files.py"}


# ---- names ----


def test_a_class_name_means_one_class() -> None:
    where = defaultdict(list)
    for module in MODULES:
        for node in top_level(module):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(module)
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


def test_a_public_function_name_means_two_functions_at_most() -> None:
    where = defaultdict(list)
    for module in MODULES:
        for node in top_level(module):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    del where["main"]  # of programs that are started by path
    assert {name: found for name, found in where.items() if len(found) > 2} == {}


# ---- size ----


def test_a_package_has_a_dozen_modules_at_most() -> None:
    counts = defaultdict(int)
    for module in MODULES:
        if not module.endswith("__init__.py"):
            counts[module.rpartition("/")[0]] += 1
    limits = {name: MAX_MODULES.get(name, MAX_MODULES_OF_OTHERS) for name in counts}
    assert {name: n for name, n in counts.items() if n > limits[name]} == {}


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_can_be_read_in_one_sitting(module: str) -> None:
    n_lines = len((PACKAGE / module).read_text("utf-8").splitlines())
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions(module)
        if node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    if n_lines > MANY_MODULE_LINES:
        warnings.warn(f"{module} has {n_lines} lines: look for a second concept", stacklevel=1)
    assert n_lines <= MAX_MODULE_LINES
    assert long == {}


def test_few_imports_stand_in_functions_and_each_says_why() -> None:
    found = []
    for module in MODULES:
        lines = (PACKAGE / module).read_text("utf-8").splitlines()
        for function in functions(module):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    reason = "\n".join(lines[node.lineno - 4 : node.lineno])
                    found.append((module, "start-up" in reason or "cycle" in reason))
    assert len(found) <= MAX_FUNCTION_IMPORTS
    assert [module for module, has_reason in found if not has_reason] == []


# ---- the walk itself ----


def test_the_walk_sees_what_is_imported() -> None:
    assert "engine/protocol.py" in own_imports("engine/client.py")
    assert "engine/protocol.py" in reached("chat/chat.py")
    assert any(name == "llama_cpp.llama_cpp" for name, _ in imports(LLAMA_CPP_IMPORTER))
    assert layer_of("cli/run.py") > layer_of("engine/client.py")
