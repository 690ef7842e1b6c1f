"""How much of llama.cpp's own speed is left: `localmoe run` beside a bare loop over the C API.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/engine.py /tmp/mixtral-1gb.gguf

Both run in turn, each in fresh processes, on the same tokens, and medians and ratios are printed.
`run --json` has the engine's own figures; `run` through a pipe is timed from outside as its text
arrives. With --long, 4,000 tokens are generated and the speed at the end is compared, so that a
cost that grows in Python would show. The bare loop's process writes each token to a pipe that
its parent reads, as the engine's does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOCALMOE = [sys.executable, "-m", "localmoe"]
WORDS = ("the", "of", "time", "house", "water", "light", "music", "river", "night", "door")


def main() -> None:
    arguments = parse_arguments()
    prompt = " ".join(random.Random(0).choices(WORDS, k=arguments.words))
    tokens = tokens_of(arguments.model, prompt)
    job = {
        "model": arguments.model,
        "tokens": tokens,
        "n_tokens": 4000 if arguments.long else arguments.tokens,
        "n_ctx": 8192 if arguments.long else 4096,
        "n_ubatch": 512,
        "n_threads": arguments.threads,
    }
    print(f"{arguments.model}: {len(tokens)} tokens in, {job['n_tokens']} out, "
          f"{arguments.threads} threads")  # fmt: skip
    if arguments.long:
        compare_ends(job, prompt)
    else:
        compare(job, prompt, arguments.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--words", type=int, default=1000, help="length of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", action="store_true", help="4,000 tokens, speed at the end")
    return parser.parse_args()


def tokens_of(model: str, prompt: str) -> list[int]:
    command = [*LOCALMOE, "prompt", model, prompt, "--json"]
    tokens: list[int] = json.loads(subprocess.check_output(command))["tokens"]
    return tokens


def compare(job: dict[str, Any], prompt: str, rounds: int) -> None:
    """Alternate the three, first in changing order, and print medians and ratios."""
    contenders = [("bare loop", bare), ("run --json", run_json), ("run, piped", run_piped)]
    results: dict[str, list[dict[str, float]]] = {name: [] for name, _ in contenders}
    for round_number in range(rounds):
        turn = round_number % len(contenders)
        for name, contender in contenders[turn:] + contenders[:turn]:
            results[name].append(contender(job, prompt))
    for speed in ("prompt_tps", "generation_tps"):
        base = [result[speed] for result in results["bare loop"]]
        for name, found in results.items():
            values = [result[speed] for result in found if speed in result]
            if values:
                ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
                print(f"{speed:15} {name:11} median {statistics.median(values):8.1f}  "
                      f"of bare {ratio:.3f}  ({min(values):.1f} to {max(values):.1f})")  # fmt: skip


def compare_ends(job: dict[str, Any], prompt: str) -> None:
    """Speed of both over each 500 tokens of a long answer."""
    for number in range(2):
        ours, peer = streamed_times(job, prompt), bare(job, prompt)["times"]
        print(f"round {number + 1}: tokens from, localmoe tok/s, bare tok/s, ratio", flush=True)
        for start in range(0, job["n_tokens"] - 1, 500):
            end = min(start + 500, job["n_tokens"] - 1)
            a, b = ((end - start) / (times[end] - times[start]) for times in (ours, peer))
            print(f"  {start:5}  {a:7.1f}  {b:7.1f}  {a / b:.3f}")


def bare(job: dict[str, Any], _: str) -> Any:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "bare_loop.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write(json.dumps(job).encode())
    process.stdin.close()
    for _line in process.stderr:
        pass
    return json.loads(process.stdout.read())


def run_command(job: dict[str, Any], prompt: str) -> list[str]:
    command = [*LOCALMOE, "run", job["model"], prompt, "--temp", "0"]
    for flag, value in (("-n", "n_tokens"), ("-c", "n_ctx"), ("-t", "n_threads")):
        command += [flag, str(job[value])]
    return [*command, "-ub", str(job["n_ubatch"])]


def run_json(job: dict[str, Any], prompt: str) -> dict[str, float]:
    result = json.loads(subprocess.check_output([*run_command(job, prompt), "--json"]))
    if result["usage"]["completion_tokens"] != job["n_tokens"]:
        raise SystemExit("the model ended by itself: choose another prompt")
    timings: dict[str, float] = result["timings"]
    return timings


def run_piped(job: dict[str, Any], prompt: str) -> dict[str, float]:
    process = subprocess.Popen(run_command(job, prompt), stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout
    process.stdout.read(1)
    first = time.perf_counter()
    while process.stdout.read(65536):
        last = time.perf_counter()
    return {"generation_tps": (job["n_tokens"] - 1) / (last - first)}


def streamed_times(job: dict[str, Any], prompt: str) -> list[float]:
    """Seconds from the first token at which each arrived at the Python interface."""
    from localmoe import LocalMoE

    settings = {"ctx_size": job["n_ctx"], "threads": job["n_threads"]}
    messages = [{"role": "user", "content": prompt}]
    times = []
    with LocalMoE(job["model"], **settings) as moe:
        for chunk in moe.stream(messages, max_tokens=job["n_tokens"], temperature=0.0):
            times += [time.perf_counter()] * len(chunk.tokens)
    return [at - times[0] for at in times]


if __name__ == "__main__":
    main()
