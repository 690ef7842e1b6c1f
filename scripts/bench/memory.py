"""Device memory: what a plan predicts, and what the driver says when it runs.

    python scripts/make_model.py --preset mixtral-8x7b --quant Q4_K_M /tmp/mixtral-8x7b.gguf
    python scripts/bench/memory.py /tmp/mixtral-8x7b.gguf --vram 8GiB 16GiB 24GiB -c 4096 32768

For each budget and context the model is planned, loaded, and used: a whole micro-batch of random
tokens, then some single ones. `measured` is the driver's figure with the model loaded less the one
before; `planned` is the plan's total; a cell passes where they differ by at most 1 % or 16 MiB.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from pathlib import Path

from localmoe.config.environment import engine_environment
from localmoe.config.settings import load_settings
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Request, Sampling
from localmoe.errors import LocalMoeError
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.planner.plan import Plan
from localmoe.planner.planner import plan_to_load

MIB = 1 << 20
TOLERANCE_BYTES = 16 * MIB
TOLERANCE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--vram", nargs="+", default=["8GiB", "16GiB", "24GiB"])
    parser.add_argument("-c", "--ctx-size", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--kv-type", nargs="+", default=["f16"])
    parser.add_argument("--ubatch", nargs="+", type=int, default=[512])
    arguments = parser.parse_args()
    meta = read_meta(arguments.model)
    print(
        "budget      ctx kv     ub   layers experts  planned measured   diff    of budget  load s"
    )
    failed = 0
    for budget in arguments.vram:
        for n_ctx in arguments.ctx_size:
            for kv_type in arguments.kv_type:
                for n_ubatch in arguments.ubatch:
                    settings = {"vram": budget, "ctx_size": n_ctx, "kv_type": kv_type}
                    failed += not cell(arguments.model, meta, settings, n_ubatch)
    print(f"{failed} cells out of tolerance" if failed else "every cell within tolerance")


def cell(path: Path, meta: ModelMeta, settings: dict[str, object], n_ubatch: int) -> bool:
    """Plan, load and use one placement; prints its line and says whether it was as planned."""
    env = engine_environment()
    name = "{vram:>8} {ctx_size:>6} {kv_type:<5}".format(**settings)
    before = used_bytes()
    try:
        with EngineProcess(env) as prober:
            chosen = load_settings({**settings, "ubatch_size": n_ubatch})
            plan = plan_to_load(path, meta, chosen, prober)
        with EngineProcess(env) as engine:
            started = time.perf_counter()
            engine.load(str(path), plan.placement)
            load_s = time.perf_counter() - started
            use(engine, meta, n_ubatch)
            measured = used_bytes() - before
    except LocalMoeError as error:
        print(f"{name} {n_ubatch:>5}   FAILED: {error}", flush=True)
        return False
    return report(f"{name} {n_ubatch:>5}", plan, meta, measured, load_s)


def use(engine: EngineProcess, meta: ModelMeta, n_ubatch: int) -> None:
    """A whole micro-batch of random tokens, and some tokens after it."""
    tokens = tuple(random.Random(0).choices(range(300, meta.tokenizer.n_vocab), k=n_ubatch + 8))
    for _ in engine.generate(Request(tokens, Sampling(temperature=0), max_tokens=16)):
        pass


def report(name: str, plan: Plan, meta: ModelMeta, measured: int, load_s: float) -> bool:
    gpus = plan.memory[:-1]
    planned = sum(memory.total_bytes for memory in gpus)
    budget = sum(memory.budget_bytes for memory in gpus)
    difference = measured - planned
    place = plan.placement
    n_experts = sum(t.role == "experts" for t in meta.tensors)
    per_layer = n_experts // meta.n_layers
    in_ram = per_layer * len(place.cpu_expert_layers) + len(place.cpu_expert_tensors)
    fine = abs(difference) <= max(TOLERANCE * planned, TOLERANCE_BYTES) and measured <= budget
    print(
        f"{name}  {place.n_gpu_layers:>3}/{meta.n_layers + 1} {n_experts - in_ram:>3}/{n_experts}"
        f" {planned / MIB:>8.0f} {measured / MIB:>8.0f} {difference / MIB:>+7.0f}"
        f" {measured / budget:>9.1%} {load_s:>8.1f}  {'ok' if fine else 'OUT'}"
        f"  overhead {gpus[0].overhead.n_bytes / MIB:.0f}",
        flush=True,
    )
    return fine


def used_bytes() -> int:
    """Memory in use on all NVIDIA cards, as their driver says."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) * MIB for line in subprocess.check_output(command, text=True).split())


if __name__ == "__main__":
    main()
