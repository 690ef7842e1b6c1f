"""Speed on a CPU alone beside llama.cpp as it comes, in one run, by turns.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/cpu.py /tmp/mixtral-1gb.gguf

llama.cpp     a bare loop over its C API, with its own defaults: every matrix repacked
not repacked  the same with `--no-repack`
localmoe      the engine by the plan for a conversation; its first answer, asked for at once, and
              its second, a moment later: in between copies are made

llama.cpp built by GCC 12 for a processor with AMX crashes on repacked matrices: `--library` takes
the folder of another build of the same version for the peers. That the model's router spreads the
tokens evenly over its experts is measured first. Medians, and ratios to the first line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placement import routing  # noqa: E402

from localmoe.config.settings import load_settings
from localmoe.engine.protocol import Request, Sampling
from localmoe.loading import OpenModel, load_local

HERE = Path(__file__).resolve().parent
N_IN, N_OUT, N_CTX = 512, 128, 4096
READING_S = 4.0
Result = dict[str, float]
COLUMNS = ("load_s", "prompt_tps", "generation_tps", "total_s", "with_load_s")


def main() -> None:
    arguments = parsed()
    print(f"{arguments.model.name}: routing {routing(arguments.model)}")
    rng = random.Random(0)
    tokens = rng.choices(range(300, 30_000), k=N_IN)
    contenders: dict[str, Callable[[], dict[str, Result]]] = {
        "llama.cpp": partial(bare, arguments, tokens, defaults=True),
        "not repacked": partial(bare, arguments, tokens, defaults=False),
        "localmoe": partial(ours, arguments, tokens),
    }
    with tempfile.TemporaryDirectory() as state:
        os.environ["LOCALMOE_STATE"] = state
        ours(arguments, tokens)  # times the model, and warms the page cache for all
        results: dict[str, list[Result]] = {}
        for turn in range(arguments.rounds):
            names = list(contenders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                for line, found in contenders[name]().items():
                    results.setdefault(line, []).append(found)
    show(results)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", help="folder of libllama for the peers")
    return parser.parse_args()


def bare(arguments: argparse.Namespace, tokens: list[int], defaults: bool) -> dict[str, Result]:
    job = {
        "model": str(arguments.model), "tokens": tokens, "n_tokens": N_OUT, "n_ctx": N_CTX,
        "n_ubatch": 512, "n_threads": arguments.threads, "defaults": defaults,
    }  # fmt: skip
    env = dict(os.environ)
    if arguments.library:
        env |= {"LLAMA_CPP_LIB_PATH": arguments.library, "LD_LIBRARY_PATH": arguments.library}
    done = subprocess.run(
        [sys.executable, str(HERE / "bare_loop.py")],
        input=json.dumps(job).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    return {"llama.cpp" if defaults else "not repacked": with_totals(found, found["load_s"])}


def ours(arguments: argparse.Namespace, tokens: list[int]) -> dict[str, Result]:
    settings = load_settings({"ctx_size": N_CTX, "threads": arguments.threads})
    with load_local(arguments.model, settings, workload="chat") as loaded:
        first = answer(loaded, tokens)
        time.sleep(READING_S)
        second = answer(loaded, [t + 1 for t in tokens])
        return {
            "localmoe, first": with_totals(first, loaded.load_s),
            "localmoe, second": with_totals(second, loaded.load_s),
        }


def answer(loaded: OpenModel, tokens: list[int]) -> Result:
    """The speeds of an answer at the length that is wanted."""
    started = time.perf_counter()
    request = Request(tuple(tokens), Sampling(), N_OUT)
    last = list(loaded.engine.generate(request))[-1]
    if not (last.usage and last.timings and last.usage.completion_tokens == N_OUT):
        raise SystemExit("the model ended its answer by itself: make another file")
    return {
        "prompt_tps": last.timings.prompt_tps,
        "generation_tps": last.timings.generation_tps,
        "total_s": time.perf_counter() - started,
    }


def with_totals(found: dict[str, Any], load_s: float) -> Result:
    total_s = found.get("total_s") or N_IN / found["prompt_tps"] + (
        (N_OUT - 1) / found["generation_tps"]
    )
    speeds = {name: found[name] for name in ("prompt_tps", "generation_tps")}
    return {"load_s": load_s, **speeds, "total_s": total_s, "with_load_s": load_s + total_s}


def show(results: dict[str, list[Result]]) -> None:
    """Medians, and how many times as good as llama.cpp's defaults."""
    print(f"{N_IN} tokens in, {N_OUT} out; seconds and tokens per second")
    print(f"{'':<18}" + "".join(f"{name:>20}" for name in COLUMNS))
    base = {name: statistics.median(r[name] for r in results["llama.cpp"]) for name in COLUMNS}
    for line, found in results.items():
        cells = ""
        for name in COLUMNS:
            value = statistics.median(r[name] for r in found)
            ratio = base[name] / value if name.endswith("_s") else value / base[name]
            cells += f"{value:>12.2f} ({ratio:5.2f})"
        print(f"{line:<18}{cells}")


if __name__ == "__main__":
    main()
