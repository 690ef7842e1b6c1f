"""How llguidance is given a JSON schema: as one grammar, with what bounds its time and memory.

Both sides of the process boundary need it: a schema is tried before anything is loaded
(structured/), and held while tokens are sampled (engine/worker/sampling.py).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_PLAIN_REFERENCES = 300
DEEP_STACK_BYTES = 512 << 20
"""Address space, of which only what is needed becomes memory."""
Result = TypeVar("Result")


def library() -> ModuleType:
    """Returns llguidance."""
    import llguidance  # start-up, 60 ms

    return llguidance


def schema_grammar(schema: str) -> str:
    """Returns the grammar of a schema, given as JSON with keywords that llguidance takes alone."""
    return json.dumps({"grammars": [{"json_schema": json.loads(schema)}]})


def grammar_limits() -> LLParserLimits:
    """Returns bounds that no schema of practical use comes near.

    A mask takes some 15 ms at most (14,000 units of fuel a ms), and the states of a lexer
    some 100 MB (2 kB each).
    """
    return library().LLParserLimits(  # type: ignore[no-any-return]
        initial_lexer_fuel=5_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def grammar_problem(schema: str) -> str:
    """Returns what llguidance says against a schema, in one line; "" where it takes it."""
    grammar = schema_grammar(schema)
    said = on_deep_stack(
        schema, lambda: library().LLMatcher.validate_grammar(grammar, limits=grammar_limits())
    )
    return "" if said.startswith("WARNING") else " ".join(said.split())[:200]


def on_deep_stack(schema: str, work: Callable[[], Result]) -> Result:
    """Calls `work`, which has llguidance read a schema, where its recursion has room enough.

    It goes through a definition where it first meets its name. On 8 MB of stack 1,000 such steps
    are safe and 5,000 are not, so that many definitions get a thread with a stack of their own.
    """
    if schema.count('"$ref"') <= MAX_PLAIN_REFERENCES:
        return work()
    found: list[Result] = []
    usual = threading.stack_size(DEEP_STACK_BYTES)
    try:
        thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    return found[0]
