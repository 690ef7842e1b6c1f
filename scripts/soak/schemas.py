"""How many random JSON schemas the demo model answers as they demand.

    python scripts/soak/schemas.py 200

Each schema is asked once, with the demo model's own sampling. An answer that ends must validate;
one that runs into the end of the context has not finished. Prints what did neither, and the
shares; exits with 1 where fewer than 90 % finish or one of them doesn't validate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jsonschema import Draft202012Validator
from synthetic.schemas import random_schema

from localmoe import LocalMoE, LocalMoeError

QUESTION = [{"role": "user", "content": "Tell me something about yourself."}]
WANTED_SHARE = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", type=int, nargs="?", default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    unfinished, wrong, slowest = 0, 0, 0.0
    with LocalMoE("demo") as moe:
        for seed in range(given.first, given.first + given.n):
            schema = random_schema(seed)
            started = time.monotonic()
            try:
                reply = moe.chat(QUESTION, json_schema=schema, seed=seed)
            except LocalMoeError as error:
                is_cut = "was cut" in error.message
                unfinished, wrong = unfinished + is_cut, wrong + (not is_cut)
                print(f"{seed}: {error.message} {json.dumps(schema)[:300]}")
            else:
                problems = list(Draft202012Validator(schema).iter_errors(json.loads(reply.text)))
                wrong += bool(problems)
            slowest = max(slowest, time.monotonic() - started)
    share = 1 - unfinished / given.n
    print(
        f"{given.n} schemas: {share:.1%} finished, {wrong} of them wrong; slowest {slowest:.1f} s"
    )
    return 0 if share >= WANTED_SHARE and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
