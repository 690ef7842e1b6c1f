"""Forecast against fact on this machine's CPU: before any run, and after a single one.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/forecast.py /tmp/mixtral-1gb.gguf localmoe/models/demo/demo.gguf

Measures the machine, then runs each model on random tokens in cells of threads, micro-batch, cache
type, prompt and depth, and takes each cell's best of some rounds. Only the first cell of a model
is recorded; the others are then forecast from it, as on a machine that ran it once. Rates and
cells are measured in turn, so a machine that is busy is busy for both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Placement, Request, Sampling, Timings, Usage
from localmoe.engine.rates import Bandwidths
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.perf.cost_model import Forecast, Task, cost_model_of, forecast, records_of
from localmoe.perf.rates import threads_to_measure, types_to_measure
from localmoe.perf.store import parse_bandwidths

N_GENERATED = 32
QUIET = 0.03
RATES = """
import json, sys
from dataclasses import asdict
from localmoe.engine.native import llama
from localmoe.engine.native.device_benchmark import measure
llama.log_to(lambda level, text: None)
threads, types = json.loads(sys.argv[1])
print(json.dumps(asdict(measure(llama.ggml, threads, types))))
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is run: a placement and, in tokens, what is held already and what is new."""

    placement: Placement
    n_cached: int
    n_prompt: int

    def __str__(self) -> str:
        place = self.placement
        return (
            f"{place.n_threads} threads, -ub {place.n_ubatch}, {place.kv_type:4}, "
            f"{self.n_prompt:4} tokens at {self.n_cached:4}"
        )


@dataclass(frozen=True, slots=True)
class Fact:
    """What a cell got, and the share of the processors that others took meanwhile."""

    usage: Usage
    prompt_tps: float
    generation_tps: float
    disturbed: float


def main() -> None:
    arguments = parse_arguments()
    placements = placements_of(arguments.threads)
    print(f"load {os.getloadavg()[0]:.2f} before")
    for path in arguments.models:
        meta = read_meta(path)
        bandwidths = quiet_rates(arguments.threads, meta, arguments.tries)
        show_rates(bandwidths)
        facts: dict[Cell, Fact] = {}
        for placement in placements:
            facts |= run(path, placement, cells_of(placement, arguments.depth), arguments.tries)
        report(meta, bandwidths, facts)
    print(f"\nload {os.getloadavg()[0]:.2f} after")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=4, help="to have a quiet moment")
    return parser.parse_args()


def placements_of(n_threads: int) -> list[Placement]:
    """The first is the one that is recorded."""
    half = max(1, n_threads // 2)
    return [
        Placement(n_threads=n_threads),
        Placement(n_threads=half),
        Placement(n_threads=n_threads, n_ubatch=128, n_batch=128),
        Placement(n_threads=n_threads, kv_type="q8_0", flash_attention="on"),
    ]


def cells_of(placement: Placement, depth: int) -> list[Cell]:
    return [Cell(placement, 0, 128), Cell(placement, 0, 768), Cell(placement, depth, 128)]


def quiet_rates(n_threads: int, meta: ModelMeta, tries: int) -> Bandwidths:
    """What an engine process measures for a model's types, least disturbed of some tries."""
    wanted = json.dumps([threads_to_measure(n_threads), types_to_measure(meta)])
    command = [sys.executable, "-c", RATES, wanted]
    found: list[tuple[float, float, bytes]] = []
    while len(found) < tries and not any(row[0] < QUIET for row in found):
        started, before = time.perf_counter(), others_s(child_s())
        text = subprocess.check_output(command, env=engine_environment(), stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        found.append((share(others_s(child_s()) - before, seconds), seconds, text))
    disturbed, seconds, text = min(found)
    print(f"\n{meta.name}: rates in {seconds:.1f} s, disturbed {disturbed:.0%}")
    return parse_bandwidths(text)


def run(path: Path, placement: Placement, cells: list[Cell], tries: int) -> dict[Cell, Fact]:
    """The cells of one placement, each the least disturbed of some tries."""
    draw = random.Random(0)
    facts: dict[Cell, Fact] = {}
    with EngineProcess(engine_environment()) as engine:
        n_vocab = engine.load(str(path), placement).vocabulary.n_vocab
        held = tuple(draw.randrange(300, n_vocab) for _ in range(4096))
        for cell in cells:
            found: list[Fact] = []
            while len(found) < tries and not any(fact.disturbed < QUIET for fact in found):
                answer(engine, held[: max(64, cell.n_cached)])
                new = tuple(draw.randrange(300, n_vocab) for _ in range(cell.n_prompt))
                found.append(answer(engine, held[: cell.n_cached] + new))
            facts[cell] = min(found, key=lambda fact: fact.disturbed)
    return facts


def answer(engine: EngineProcess, tokens: tuple[int, ...]) -> Fact:
    request = Request(tokens, Sampling(temperature=0.0), max_tokens=N_GENERATED)
    started, before = time.perf_counter(), others_s(process_s(engine.pid))
    for delta in engine.generate(request):
        last = delta
    seconds = time.perf_counter() - started
    others = share(others_s(process_s(engine.pid)) - before, seconds)
    assert last.usage
    assert last.timings
    return Fact(last.usage, last.timings.prompt_tps, last.timings.generation_tps, others)


# ---- who else is at work (Linux) ----


def others_s(own_s: float) -> float:
    """Processor seconds of everything but what is measured, from an arbitrary beginning."""
    up, idle = map(float, Path("/proc/uptime").read_text().split())
    return up * (os.cpu_count() or 1) - idle - own_s


def process_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child_s() -> float:
    """Of processes that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def share(others: float, seconds: float) -> float:
    return max(0.0, others / seconds / (os.cpu_count() or 1))


# ---- what came of it ----


def report(meta: ModelMeta, bandwidths: Bandwidths, facts: dict[Cell, Fact]) -> None:
    """Each cell forecast by formula and from the first one's run, beside what it got."""
    settings = {cell: cost_model_of(cell.placement, meta, bandwidths) for cell in facts}
    first = next(iter(facts))
    timings = Timings(0.0, facts[first].prompt_tps, facts[first].generation_tps)
    records = records_of(settings[first], facts[first].usage, timings, time.time())
    errors: dict[str, list[float]] = {}
    print(f"{'':44}{'prompt: formula, corrected, real':>34}{'generation':>34}")
    for cell, fact in facts.items():
        task = task_of(fact.usage)
        before, after = (forecast(settings[cell], known, task) for known in ((), records))
        line = f"{cell}{'?' if fact.disturbed >= QUIET else ''}".ljust(44)
        for kind in ("prompt_tps", "generation_tps"):
            line += shown(kind, before, after, fact, errors, cell == first)
        print(line)
    for name, found in errors.items():
        off = sorted(map(abs, found))
        print(f"{name:28} off by {statistics.median(off):.0%} (median), {off[-1]:.0%} at most")


def shown(
    kind: str, before: Forecast, after: Forecast, fact: Fact, errors: dict[str, list[float]],
    is_first: bool,
) -> str:  # fmt: skip
    """Formula, correction and fact, with how far both were off; counted in `errors`."""
    real = getattr(fact, kind)
    off = [getattr(said, kind) / real - 1 for said in (before, after)]
    errors.setdefault(f"{kind}, by formula", []).append(off[0])
    if not is_first:
        errors.setdefault(f"{kind}, after one run", []).append(off[1])
    return (
        f"  {getattr(before, kind):7.1f} {off[0]:+4.0%} {getattr(after, kind):7.1f} {off[1]:+4.0%}"
        f" {real:7.1f}"
    )


def task_of(usage: Usage) -> Task:
    return Task(
        usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    )


def show_rates(bandwidths: Bandwidths) -> None:
    for d in bandwidths.devices:
        print(f"  {d.device} x{d.n_threads}: reads {d.read_bytes_per_s / 1e9:.1f} GB/s, "
              f"operation {d.node_s * 1e6:.2f} us, attention {d.attention_values_per_s / 1e9:.1f} "
              f"and {d.attention_batch_values_per_s / 1e9:.1f} G values/s")  # fmt: skip
    for p in bandwidths.products:
        print(f"  {p.device} x{p.n_threads} {p.type}: {p.vector_bytes_per_s / 1e9:.2f} GB/s for "
              f"one token, {p.matrix_flops / 1e9:.0f} GFLOPS for many")  # fmt: skip


if __name__ == "__main__":
    main()
