"""Memory and speed of plans beside llama.cpp's own --fit, on a GPU held to smaller budgets.

    python scripts/make_model.py --preset mixtral-8x7b --quant Q4_K /tmp/q4k.gguf
    python scripts/bench/placement.py /tmp/q4k.gguf --tools llama.cpp-tools --results out.jsonl

Every figure is a line of the results file; a cell that is there already is not measured again, so
that a run can be broken off and gone on with. Each system's process is started anew for each cell,
by turns. Prompts are of random tokens; that the model's router spreads them evenly over its experts
is measured first, and part of the results, and so is how fast the file can be read.
`--summary` prints what is there as tables.

fit     llama-bench -fitt of the same llama.cpp, told to leave all but the budget free, and its own
        margin of 1 GiB within the budget; its other defaults
layers  llama-bench with as many whole layers as the budget holds
run, chat  localmoe's engine, by the plan for that workload
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from placement_tables import SYSTEMS, summary  # noqa: E402
from synthetic.routing import expert_logits  # noqa: E402

from localmoe.config.settings import Settings, load_settings, parse_size
from localmoe.engine.protocol import Request, Sampling, Timings
from localmoe.errors import LocalMoeError
from localmoe.gguf.model_meta import read_meta
from localmoe.loading import OpenModel, load_local
from localmoe.perf.cost_model import Task, forecast
from localmoe.perf.speed_records import SpeedRecord
from localmoe.planner.planner import Planner

MIB = 1 << 20
N_PROMPT, N_GENERATED, N_CTX = 2048, 64, 4096
N_ANSWERS = 2  # of which the best counts, as neighbours on the machine make some slow
SHORT_PROMPT = 256  # to warm up with, for `run` after the first round
READ_BYTES = 16 << 20
MEMORY_BUDGETS = ("6GiB", "8GiB", "12GiB", "16GiB", "20GiB", "24GiB", "all")
SPEED_BUDGETS = ("8GiB", "16GiB", "24GiB")
DEPTH_BUDGETS = ("8GiB", "24GiB")
ROUTING_TOKENS = 64


def main() -> None:
    arguments = parsed()
    results = Results(arguments.results)
    if not arguments.summary:
        deadline = time.monotonic() + 60 * arguments.minutes
        for model in arguments.models:
            results.measure({"cell": "routing", "file": model.name}, lambda m=model: apart(m))
            results.measure({"cell": "reading", "file": model.name}, lambda m=model: reading(m))
        for cell in cells(arguments):
            if time.monotonic() > deadline:
                print("out of time: run it again to go on")
                break
            path = next(m for m in arguments.models if m.name == cell["file"])
            known = results.n_gpu_layers(cell)
            results.measure(cell, partial(measured, cell, path, arguments.tools, known))
    summary(results.rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--tools", type=Path, help="where llama-bench lies")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--parts", nargs="+", default=["speed", "memory"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-round", type=int, default=0, help="of 1 on: generation alone")
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args()


class Results:
    """Cells and what was measured in them, a JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def n_gpu_layers(self, cell: dict[str, Any]) -> int | None:
        """What the budget was found to hold in an earlier round: it takes some plans to find."""
        same = {name: cell.get(name) for name in ("cell", "file", "budget")}
        rows = (row for row in self.rows if same.items() <= row.items())
        return next((row["n_gpu_layers"] for row in rows if row.get("n_gpu_layers")), None)

    def measure(self, cell: dict[str, Any], measure: Any) -> None:
        """Measure a cell that isn't there yet."""
        if any(cell.items() <= row.items() for row in self.rows):
            return
        started = time.monotonic()
        try:
            found = measure()
        except (LocalMoeError, subprocess.SubprocessError, ValueError) as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        row = {**cell, **found, "took_s": round(time.monotonic() - started, 1)}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured, in order: speeds round by round, then memory."""
    files = [model.name for model in arguments.models]
    if "speed" in arguments.parts:
        for turn in range(arguments.first_round, arguments.rounds):
            for file in files:
                for budget in SPEED_BUDGETS:
                    for system in arguments.systems:
                        yield {"cell": system, "file": file, "budget": budget, "round": turn}
    if "memory" in arguments.parts:
        for file in files:
            for budget in MEMORY_BUDGETS:
                for n_ctx in (4096, 32768):
                    for kv in ("f16", "q8_0"):
                        yield {"cell": "memory", "file": file, "budget": budget,
                               "ctx": n_ctx, "kv": kv}  # fmt: skip
    if "depth" in arguments.parts:
        for file in files:
            for budget in DEPTH_BUDGETS:
                for n_ctx in (4096, 32768):
                    yield {"cell": "depth", "file": file, "budget": budget, "ctx": n_ctx}


def measured(
    cell: dict[str, Any], path: Path, tools: Path, n_gpu_layers: int | None
) -> dict[str, Any]:
    if cell["cell"] == "memory":
        return memory(cell, path)
    if cell["cell"] == "depth":
        return depth(cell, path)
    if cell["cell"] in ("run", "chat"):
        return ours(cell, path)
    # its prompts take long and are far from ours: once is enough
    return llama_bench(cell, path, tools, N_PROMPT if cell["round"] == 0 else 0, n_gpu_layers)


def settings_of(cell: dict[str, Any]) -> Settings:
    budget = {} if cell["budget"] == "all" else {"vram": cell["budget"]}
    return load_settings({**budget, "ctx_size": cell.get("ctx", N_CTX), "kv_type": cell.get("kv")})


# ---- routing ----


def apart(path: Path) -> dict[str, Any]:
    """`routing` in a process of its own, which takes its device's context with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(routing, path).result()


def routing(path: Path) -> dict[str, Any]:
    """How evenly random tokens meet the experts; shares are the worst of any layer."""
    fewest, largest_pair = 10**9, 0.0
    for logits in expert_logits(path, ROUTING_TOKENS).values():
        if len(logits) < ROUTING_TOKENS:
            continue  # the last layer computes one token alone
        pairs = [tuple(sorted(row.argsort()[-2:].tolist())) for row in logits]
        fewest = min(fewest, len({expert for pair in pairs for expert in pair}))
        largest_pair = max(largest_pair, max(map(pairs.count, pairs)) / len(pairs))
    even = fewest == logits.shape[1] and largest_pair <= 0.2
    return {"experts_used": fewest, "largest_pair_share": largest_pair, "even": even}


def reading(path: Path) -> dict[str, Any]:
    """How fast the file can be read as it lies there, by one thread: from memory, if it has been
    read before."""
    buffer, started = bytearray(READ_BYTES), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "gb_s": round(path.stat().st_size / seconds / 1e9, 2)}


# ---- localmoe ----


def ours(cell: dict[str, Any], path: Path) -> dict[str, Any]:
    """Load by the plan of a workload; then prompts (the first to warm up), and answers."""
    rng = random.Random(cell["round"])
    before, started = used_bytes(), time.perf_counter()
    with load_local(path, settings_of(cell), workload=cell["cell"]) as loaded:
        plan_and_load_s = time.perf_counter() - started
        n_in = N_PROMPT if cell["cell"] == "chat" or cell["round"] == 0 else SHORT_PROMPT
        task = Task(n_prompt=n_in, n_generated=1)
        expected_in = forecast(loaded.speed_log.setting, records_of(loaded), task)
        task = Task(n_prompt=8, n_generated=N_GENERATED)
        expected_out = forecast(loaded.speed_log.setting, records_of(loaded), task)
        n_prompts = 3 if cell["cell"] == "chat" and cell["round"] == 0 else 1
        prompts = [answer(loaded, rng, n_in, 1).prompt_tps for _ in range(n_prompts)]
        speeds = [answer(loaded, rng, 8, N_GENERATED).generation_tps for _ in range(N_ANSWERS)]
        used = used_bytes() - before
    place, budget = loaded.plan.placement, loaded.plan.memory[0].budget_bytes
    return {
        "load_s": round(loaded.load_s, 2),
        "plan_and_load_s": round(plan_and_load_s, 2),
        "pinned_bytes": loaded.loaded.n_pinned_bytes,
        "prompt_tps" if n_in == N_PROMPT else "short_prompt_tps": max(prompts),
        "generation_tps": max(speeds),
        "forecast_prompt_tps": expected_in.prompt_tps,
        "forecast_generation_tps": expected_out.generation_tps,
        "basis": expected_out.basis,
        "used_mib": used // MIB,
        "budget_mib": budget // MIB,
        "n_ubatch": place.n_ubatch,
        "load_mode": place.load_mode,
        "cpu_layers": len(place.cpu_expert_layers),
        "cpu_tensors": len(place.cpu_expert_tensors),
    }


def records_of(loaded: OpenModel) -> Sequence[SpeedRecord]:
    return loaded.speed_log.store.read(loaded.speed_log.key)


def answer(loaded: OpenModel, rng: random.Random, n_prompt: int, n: int) -> Timings:
    """The timings of one answer to random tokens; one that ended early is asked again."""
    n_vocab = loaded.meta.tokenizer.n_vocab
    for _ in range(20):
        tokens = tuple(rng.choices(range(300, n_vocab), k=n_prompt))
        request = Request(tokens, Sampling(), n)
        last = list(loaded.engine.generate(request))[-1]
        if last.usage and last.timings and last.usage.completion_tokens == n:
            loaded.speed_log.add(last)
            return last.timings
    raise ValueError("the model kept ending its answers")


def memory(cell: dict[str, Any], path: Path) -> dict[str, Any]:
    """The plan's figure for the GPU, and the driver's with the model loaded and used."""
    before = used_bytes()
    with load_local(path, settings_of(cell), workload="chat") as loaded:
        rng, place = random.Random(0), loaded.plan.placement
        answer(loaded, rng, min(place.n_ubatch + 8, place.n_ctx - 16), 8)
        used = used_bytes() - before
        answer(loaded, rng, place.n_ctx - 100 if place.n_ctx <= 4096 else place.n_ubatch, 8)
        deep = used_bytes() - before
    gpus = loaded.plan.memory[:-1]
    planned = sum(m.total_bytes for m in gpus)
    budget = sum(m.budget_bytes for m in gpus)
    in_ram = [t.n_bytes for t in loaded.meta.tensors if is_in_ram(t, place)]
    return {
        "planned_mib": planned // MIB,
        "measured_mib": used // MIB,
        "growth_mib": (deep - used) // MIB,
        "budget_mib": budget // MIB,
        "of_budget": round(used / budget, 4),
        "smallest_left_mib": min(in_ram, default=0) // MIB,
        "n_ubatch": place.n_ubatch,
        "fine": abs(planned - used) <= max(0.01 * planned, 16 * MIB) and used <= budget,
    }


def depth(cell: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the GPU takes, in MiB, as the context fills up and after many answers."""
    before, taken = used_bytes(), {}
    with load_local(path, settings_of(cell), workload="chat") as loaded:
        rng, n_ctx = random.Random(0), loaded.plan.placement.n_ctx
        for n in (256, 2048, 4000, n_ctx // 2, n_ctx - 100):
            answer(loaded, rng, n, 8)
            taken[str(n)] = (used_bytes() - before) // MIB
        for _ in range(20):
            answer(loaded, rng, rng.randrange(8, 300), 16)
        taken["answers"] = (used_bytes() - before) // MIB
    gpus = loaded.plan.memory[:-1]
    return {
        "planned_mib": sum(m.total_bytes for m in gpus) // MIB,
        "taken_mib": taken,
        "budget_mib": sum(m.budget_bytes for m in gpus) // MIB,
        "cpu_layers": len(loaded.plan.placement.cpu_expert_layers),
        "n_ubatch": loaded.plan.placement.n_ubatch,
    }


def is_in_ram(tensor: Any, place: Any) -> bool:
    in_layer = tensor.layer in place.cpu_expert_layers and tensor.role == "experts"
    return in_layer or tensor.name in place.cpu_expert_tensors


def used_bytes() -> int:
    """Memory in use on all NVIDIA cards, as their driver says."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) * MIB for line in subprocess.check_output(command, text=True).split())


# ---- llama.cpp's own ----


def llama_bench(
    cell: dict[str, Any], path: Path, tools: Path, n_prompt: int, n_gpu_layers: int | None
) -> dict[str, Any]:
    command = [str(tools / "llama-bench"), "-m", str(path), "-o", "jsonl"]
    command += ["-r", str(N_ANSWERS if not n_prompt else 1)]
    command += ["-p", str(n_prompt if cell["cell"] == "fit" else 0), "-n", str(N_GENERATED)]
    if cell["cell"] == "fit":
        free = total_mib() - used_bytes() // MIB
        leave = free - parse_size(cell["budget"]) // MIB + 1024
        command += ["-fitt", str(leave), "-fitc", str(N_CTX)]
    else:
        command += ["-ngl", str(n_gpu_layers or whole_layers(cell, path))]
    env = peer_environment(tools)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise ValueError(f"llama-bench: {done.stderr[-400:]}")
    found: dict[str, Any] = {"command": " ".join(command[1:])}
    for row in rows:
        found["generation_tps" if row["n_gen"] else "prompt_tps"] = max(row["samples_ts"])
    found["n_gpu_layers"] = rows[0].get("n_gpu_layers")
    return found


def whole_layers(cell: dict[str, Any], path: Path) -> int:
    """The most layers, experts and all, that the budget holds by our own exact plan."""
    meta, settings = read_meta(path), settings_of(cell)
    lowest, highest = 1, meta.n_layers + 1
    while lowest < highest:  # some fit, and more and more don't
        middle = (lowest + highest + 1) // 2
        wanted = settings.model_copy(
            update={"n_gpu_layers": middle, "n_cpu_moe": 0, "ubatch_size": 512, "load_mode": "mmap"}
        )
        with Planner(wanted) as planner:
            try:
                planner.plan_to_load(path, meta)
                lowest = middle
            except LocalMoeError:
                highest = middle - 1
    return lowest


def total_mib() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(command, text=True).split()[0])


def peer_environment(tools: Path) -> dict[str, str]:
    """This process's own: what suits our engine is no default of llama.cpp's."""
    libraries = f"{tools}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return {**os.environ, "LD_LIBRARY_PATH": libraries}


if __name__ == "__main__":
    main()
