"""Many requests from start to end: localmoe's engine beside what people would use instead.

    python scripts/make_model.py --preset mixtral-1gb /tmp/mixtral-1gb.gguf
    python scripts/bench/batch.py /tmp/mixtral-1gb.gguf --tools llama.cpp/build/bin

Workloads, of random tokens: `shared`, 32 requests of 512 shared and 32 own tokens, 32 generated;
and `own`, 32 requests of 64 to 544 own tokens, 32 generated. Every contender runs in a fresh
process, and its time is from its start, load included, to its last answer. Peers: llama-server of
the same llama.cpp commit (--tools) with its defaults and with its best flags, asked by 16 clients;
the `Llama` class, one request after the other; and llama-cpp-python's example server, which batches
(--example-server, examples/server/server.py of its sdist; its packages are those of
--example-python, with llama_cpp of this one). All take turns; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

N_REQUESTS = 32
N_GENERATED = 32
N_CTX = 640
"""Tokens that one request may take; a little more than the longest does."""

WORKLOADS = ("shared", "own")
Job = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.contender:
        CONTENDERS[arguments.contender](json.load(sys.stdin))
        return
    contenders = contenders_of(arguments)
    for workload in arguments.workloads:
        job = {
            "model": arguments.model,
            "threads": arguments.threads,
            "prompts": prompts_of(workload),
            "n_seq": arguments.parallel,
        }
        compare(workload, job, contenders, arguments.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tools", type=Path, help="folder of llama-server")
    parser.add_argument("--example-server", type=Path, help="server.py of llama-cpp-python")
    parser.add_argument("--example-python", default=sys.executable, help="that has its packages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=32, help="sequences of localmoe")
    parser.add_argument("--slots", type=int, nargs="*", default=[4, 8, 16, 32], help="server's -np")
    parser.add_argument("--clients", type=int, default=16, help="that ask the server at once")
    parser.add_argument("--workloads", nargs="*", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # this program as one of them
    return parser.parse_args()


def prompts_of(workload: str) -> list[list[int]]:
    draw = random.Random(1)

    def some(n: int) -> list[int]:
        return [draw.randrange(300, 31000) for _ in range(n)]

    if workload == "shared":
        shared = some(512)
        return [shared + some(32) for _ in range(N_REQUESTS)]
    prompts = [some(64 + 480 * n // (N_REQUESTS - 1)) for n in range(N_REQUESTS)]
    draw.shuffle(prompts)
    return prompts


# ---- comparing ----


def contenders_of(arguments: argparse.Namespace) -> dict[str, Callable[[Job], float]]:
    """How each is timed, by its name; localmoe first."""
    found: dict[str, Callable[[Job], float]] = {
        "localmoe": partial(run_self, "engine"),
        "Llama class": partial(run_self, "sequential"),
    }
    if arguments.example_server is not None:
        example = [arguments.example_python, "-c", EXAMPLE, str(arguments.example_server.resolve())]
        found["example server"] = partial(run_example, example, arguments.clients)
    if arguments.tools is None:
        print("llama-server is left out: --tools names its folder")
        return found
    server = partial(run_server, arguments.tools, arguments.clients)
    found["llama-server"] = partial(server, [])
    for n in arguments.slots:
        flags = ["-np", str(n), "--no-repack", "-kvu", "-c", str(N_CTX * N_REQUESTS)]
        found[f"llama-server -np {n} --no-repack -kvu"] = partial(server, flags)
    return found


def compare(
    workload: str, job: Job, contenders: dict[str, Callable[[Job], float]], rounds: int
) -> None:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(contenders[name](job))
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
            print(f"  {workload:6} {name:40} {times[name][-1]:6.1f} s  load {load:.1f}", flush=True)
    for name, found in times.items():
        ratio = statistics.median(
            peer / ours for peer, ours in zip(found, times["localmoe"], strict=True)
        )
        print(f"{workload:6} {name:40} median {statistics.median(found):6.1f} s, "
              f"best {min(found):6.1f} s, {ratio:.2f} of localmoe's time")  # fmt: skip


def run_self(contender: str, job: Job) -> float:
    """This program in a process of its own, as a contender."""
    started = time.perf_counter()
    command = [sys.executable, __file__, job["model"], "--contender", contender]
    subprocess.run(
        command, input=json.dumps(job).encode(), check=True, stderr=subprocess.DEVNULL
    )  # fmt: skip
    return time.perf_counter() - started


# ---- contenders ----


def engine(job: Job) -> None:
    """localmoe's engine as `localmoe batch` uses it on a CPU."""
    from localmoe.config.environment import engine_environment
    from localmoe.engine.client import EngineProcess, Inbox
    from localmoe.engine.protocol import Delta, Placement, Request, Sampling

    placement = Placement(
        n_threads=job["threads"], n_ctx=N_CTX, n_seq=job["n_seq"],
        flash_attention="off", batch_invariant=True,
    )  # fmt: skip
    with EngineProcess(engine_environment()) as moe:
        moe.load(job["model"], placement)
        inbox: Inbox = queue.SimpleQueue()
        for prompt in job["prompts"]:
            request = Request(
                tuple(prompt), Sampling(temperature=0), max_tokens=N_GENERATED, stream=False
            )
            moe.submit(request, inbox)
        n_ended = 0
        while n_ended < len(job["prompts"]):
            message = inbox.get()
            if not isinstance(message, Delta):
                raise SystemExit(f"not an answer: {message}")
            n_ended += message.finish_reason is not None
        moe.kill()


def sequential(job: Job) -> None:
    """llama-cpp-python's own class, one request after the other.

    Without repacked weights, which the class can't be told: they would slow it (docs/notes/
    engine-process.md), and crash it on virtual machines that only seem to have AMX.
    """
    import llama_cpp.llama_cpp as C
    from llama_cpp import Llama

    defaults = C.llama_model_default_params

    def not_repacked() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    C.llama_model_default_params = not_repacked
    llama = Llama(job["model"], n_ctx=N_CTX + 128, n_threads=job["threads"],
                  n_threads_batch=job["threads"], verbose=False)  # fmt: skip
    for prompt in job["prompts"]:
        llama.create_completion(prompt, max_tokens=N_GENERATED, temperature=0.0)


CONTENDERS = {"engine": engine, "sequential": sequential}


def run_server(tools: Path, n_clients: int, flags: list[str], job: Job) -> float:
    """llama-server and clients that ask it, a request each until none is left."""
    started = time.perf_counter()
    with server(tools, flags, job) as address, ThreadPoolExecutor(n_clients) as clients:
        list(clients.map(partial(complete, address), job["prompts"]))
        return time.perf_counter() - started


EXAMPLE = """
import runpy, sys
import llama_cpp

defaults = llama_cpp.llama_model_default_params

def not_repacked():
    params = defaults()
    params.use_extra_bufts = False
    return params

llama_cpp.llama_model_default_params = not_repacked
llama_cpp.llama_cpp.llama_model_default_params = not_repacked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts the example server, without repacked weights for the same reasons as the class."""


def run_example(command: list[str], n_clients: int, job: Job) -> float:
    """llama-cpp-python's example server, with as many sequences as localmoe has."""
    started = time.perf_counter()
    port = free_port()
    settings = {
        "server": {"port": port},
        "model": {
            "path": job["model"], "alias": "model", "chat_template": "{{ messages }}",
            "n_ctx": N_CTX * N_REQUESTS, "n_batch": 512, "n_ubatch": 512,
            "n_seq_max": job["n_seq"], "threads": job["threads"],
            "threads_batch": job["threads"], "flash_attn": True, "store_logits": False,
        },
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        packages = str(Path(find_llama_cpp()).parents[1])
        environment = {**os.environ, "PYTHONPATH": packages}
        with (
            serving([*command, "-C", file.name], port, "/healthz", environment) as address,
            ThreadPoolExecutor(n_clients) as clients,
        ):
            list(clients.map(partial(complete_openai, address), job["prompts"]))
            return time.perf_counter() - started


def find_llama_cpp() -> str:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no llama_cpp")
    return spec.origin


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def server(tools: Path, flags: list[str], job: Job) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    command = [str(tools / "llama-server"), "-m", job["model"], "-t", str(job["threads"])]
    command += ["--port", str(port), *flags]
    return serving(command, port, "/health", {**os.environ, "LD_LIBRARY_PATH": str(tools)})


@contextlib.contextmanager
def serving(
    command: list[str], port: int, health: str, environment: dict[str, str]
) -> Iterator[str]:
    """A server that is ready, by its address; it is killed at the end."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            while not is_ready(address + health):
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
                time.sleep(0.02)
            yield address
        finally:
            process.kill()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # URLError is one
        return False


def complete(address: str, prompt: list[int]) -> int:
    asked = {"prompt": prompt, "n_predict": N_GENERATED, "temperature": 0}
    return int(post(f"{address}/completion", asked)["tokens_predicted"])


def complete_openai(address: str, prompt: list[int]) -> int:
    asked = {"prompt": prompt, "max_tokens": N_GENERATED, "temperature": 0}
    return int(post(f"{address}/v1/completions", asked)["usage"]["completion_tokens"])


def post(address: str, asked: dict[str, Any]) -> Any:
    body = json.dumps(asked).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
