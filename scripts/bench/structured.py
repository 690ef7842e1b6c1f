"""What a JSON schema costs while an answer is generated. Needs a quiet machine.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/structured.py /tmp/mixtral-1gb.gguf --rounds 5

One model, one process: free answers and answers held to a schema by turns, of --tokens each. Prints
the medians of the generation's speed and their ratio. The schema never ends, so that every token is
held; with a model of random weights nearly every token that it likes best is refused, so that a
mask is computed each time, which is the dearest case. `--grammar` holds the same by GBNF.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from localmoe import LocalMoE, LocalMoeError

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["fruit", "vegetable", "grain"]},
            "price": {"type": "number", "minimum": 0, "maximum": 100},
            "added": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        },
        "required": ["name", "kind", "price", "added", "tags"],
    },
}
QUESTION = [{"role": "user", "content": "List what the shop has."}]
GRAMMAR = """root ::= "[" (item ",")+
item ::= "{\\"name\\":\\"" [a-zA-Z ]{0,24} "\\",\\"price\\":" [0-9]{1,2} "." [0-9]{1,4} "}"
"""


def generation_tps(moe: LocalMoE, n_tokens: int, seed: int, **form: object) -> float:
    """The speed of one answer in tokens a second. That it is cut is meant here."""
    speed = 0.0
    try:
        for delta in moe.stream(QUESTION, max_tokens=n_tokens, seed=seed, **form):
            speed = delta.timings.generation_tps if delta.timings else speed
    except LocalMoeError as error:
        if "cut" not in error.message:
            raise
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--grammar", action="store_true", help="hold by GBNF instead")
    given = parser.parse_args()
    form = {"grammar": GRAMMAR} if given.grammar else {"json_schema": SCHEMA}
    free, held = [], []
    with LocalMoE(str(given.model), ctx_size=2048) as moe:
        generation_tps(moe, 16, 0, **form)
        for seed in range(given.rounds):
            free.append(generation_tps(moe, given.tokens, seed))
            held.append(generation_tps(moe, given.tokens, seed, **form))
    ratio = statistics.median(h / f for f, h in zip(free, held, strict=True))
    print(
        f"free {statistics.median(free):.2f} tok/s, held {statistics.median(held):.2f}: {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
