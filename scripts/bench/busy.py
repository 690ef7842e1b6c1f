"""How long compute threads should spin at a barrier: on a quiet machine, and beside others.

    python scripts/make_model.py --preset mixtral-1gb --quant Q4_K /tmp/mixtral-1gb.gguf
    python scripts/bench/busy.py /tmp/mixtral-1gb.gguf --spins 3000 10000 30000

Each value of GOMP_SPINCOUNT has an engine process of its own, by turns; prompts are of random
tokens, answers are drawn as the program does. `--busy` programs count up beside it, begun and ended
for each cell. Medians over the rounds, tokens per second.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localmoe.config.settings import load_settings
from localmoe.engine.protocol import Request, Sampling, Timings
from localmoe.loading import OpenModel, load_local

COUNTING = "n = 0\nwhile True: n += 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--spins", type=int, nargs="+", default=[1000, 3000, 10000, 30000, 300000])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    found: dict[tuple[int, int], list[Timings]] = defaultdict(list)
    for turn in range(arguments.rounds):
        for n_busy in arguments.busy:
            for spin in arguments.spins:
                with programs(n_busy):
                    timings = measured(arguments, spin, random.Random(turn))
                found[n_busy, spin].append(timings)
                print(f"{n_busy} busy, {spin}: {line([timings])}", flush=True)
    for (n_busy, spin), some in found.items():
        print(f"{n_busy} busy, {spin:>6}, median: {line(some)}")


def measured(arguments: argparse.Namespace, spin: int, rng: random.Random) -> Timings:
    """One answer in a process that has answered a little before."""
    os.environ["GOMP_SPINCOUNT"] = str(spin)
    with load_local(arguments.model, load_settings({}), workload="chat") as loaded:
        answer(loaded, rng, 16, 8)
        return answer(loaded, rng, arguments.prompt, arguments.tokens)


def answer(loaded: OpenModel, rng: random.Random, n_prompt: int, n: int) -> Timings:
    tokens = tuple(rng.choices(range(300, loaded.meta.tokenizer.n_vocab), k=n_prompt))
    last = list(loaded.engine.generate(Request(tokens, Sampling(), n)))[-1]
    assert last.timings
    return last.timings


@contextmanager
def programs(n: int) -> Iterator[None]:
    """Programs that each take all of a core that they can get."""
    started = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(n)]
    try:
        yield
    finally:
        for program in started:
            program.kill()
            program.wait()


def line(timings: list[Timings]) -> str:
    prompt = statistics.median(t.prompt_tps for t in timings)
    generation = statistics.median(t.generation_tps for t in timings)
    return f"prompt {prompt:.1f}, generation {generation:.1f} tok/s"


if __name__ == "__main__":
    main()
