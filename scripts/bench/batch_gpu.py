"""Files of requests on a GPU: localmoe's batch beside llama-server and llama-batched-bench.

    python scripts/make_model.py --preset mixtral-8x7b --quant Q4_K /tmp/q4k.gguf
    python scripts/bench/batch_gpu.py /tmp/q4k.gguf --tools llama.cpp-tools --results out.jsonl

Every figure is a line of the results file; a cell that is there already is not measured again, so
that a run can be broken off and gone on with. Each cell has a process of its own, started when the
GPU is free. Prompts are random token ids, the same for all; that the model's router spreads them
evenly over its experts is measured first. The made file is edited once, so that it never ends an
answer: all then generate equally many tokens, which is checked. `--summary` prints what is there.

own      all on the GPU, 64 requests of 128 own tokens, 64 generated
shared   the same with 1,000 shared and 50 own tokens
16GiB    at this budget, 64 requests of 128 own tokens, 128 generated; 8GiB likewise
edge     at 16 GiB, a few sequences generating while experts in RAM are copied to the GPU, or not

first_to_last_s is from the first request, with the model loaded, to the last answer, and whole_s
from the start of the process. width_tps is what llama-batched-bench calls S_TG: tokens a second
while all sequences generate, so from the last one's first token to the first one's last. Steps are
counted by one answer that is streamed. Ours has the sampling of each token in it, theirs has not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from batch import free_port, is_ready  # noqa: E402
from placement import MIB, Results, peer_environment, routing, total_mib  # noqa: E402
from placement import used_bytes as gpu_used_bytes  # noqa: E402

from localmoe.batch.dispatch import StopFlag
from localmoe.batch.manifest import Manifest, input_file
from localmoe.batch.pending import PendingRequest, PendingRequests
from localmoe.batch.prefix_sharing import batch_shape_of
from localmoe.batch.responses import FileOutput
from localmoe.batch.runner import RunOptions, recover, run_batch
from localmoe.callbacks import LoadCallbacks
from localmoe.catalog.model_name import ModelName
from localmoe.catalog.resolve import ResolvedModel
from localmoe.chat.chat import AnswerOptions
from localmoe.config.settings import Settings, load_settings, parse_size
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Delta, Request, Sampling
from localmoe.gguf.model_meta import read_meta
from localmoe.loading import load_found, open_vocabulary
from localmoe.planner.planner import Planner
from localmoe.planner.request import BatchShape

Cell = dict[str, Any]
Figures = dict[str, Any]

N = 64
WORKLOADS = {  # shared tokens, own tokens, generated
    "own": (0, 128, 64),
    "shared": (1000, 50, 64),
    "16GiB": (0, 128, 128),
    "8GiB": (0, 128, 128),
}
EDGE_WIDTHS = (8, 16, 24, 32, 48)
EDGES = (8, 1000)
"""GGML_OP_OFFLOAD_MIN_BATCH: from 8 tokens on, so always here, and never. Any other is one of the
two at each width: the default of 32 is never at 24, and always at 32."""
EDGE_PROMPT, EDGE_GENERATED = 4, 11
SERVER_SHARE = 8
"""llama-server with its defaults gets an 8th of a budget's requests, twice its 4 slots: they are
full all along, so that its time for all is 8 times as much."""
CELL_SECONDS = 110
MANIFEST = Manifest(input_file("-", io.BytesIO()), {})
PARTS = ("own", "16GiB", "shared", "8GiB", "edge", "cli")
SERVERS = {  # {c}: cells that all requests take
    "server -np 64": ["-np", "{n}", "-c", "{c}", "-no-kvu"],
    "server -np 64 -ub 2048": ["-np", "{n}", "-c", "{c}", "-no-kvu",
                               "-fa", "on", "-b", "4096", "-ub", "2048"],
    "server -np 64 -ub 2048 -kvu": ["-np", "{n}", "-c", "{c}", "-kvu",
                                    "-fa", "on", "-b", "4096", "-ub", "2048"],
    "server": [],
}  # fmt: skip


def main() -> None:
    arguments = parsed()
    if arguments.contender:
        print(json.dumps(contender(json.load(sys.stdin))), flush=True)
        return
    results = Results(arguments.results)
    if not arguments.summary:
        run(arguments, results)
    summary(results)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--tools", type=Path, help="where llama-server lies")
    parser.add_argument("--results", type=Path, default=Path("batch_gpu.jsonl"))
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", type=int, default=N)
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens, for a rehearsal")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: no budgets, no GPU")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace, results: Results) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    file = {"file": arguments.model.name, "threads": arguments.threads}
    make_endless(arguments.model)
    for kind in ("routing", "prepare"):
        job = {"kind": kind, "model": str(arguments.model), "threads": arguments.threads}
        results.measure({"cell": kind, **file}, lambda j=job: caught(lambda: in_child(j)))
    for cell in cells(arguments):
        if time.monotonic() > deadline:
            print("out of time: run it again to go on")
            return
        results.measure({**cell, **file}, lambda c=cell: caught(lambda: measured(c, arguments)))


def caught(measure: Callable[[], Figures]) -> Figures:
    """What was measured, or why it could not be: no cell ends the run."""
    try:
        return measure()
    except subprocess.CalledProcessError as error:
        return {"failed": f"ended with {error.returncode}: {str(error.stderr)[-700:]}"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:700]}


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """What is measured, in order."""
    n = arguments.requests
    for turn in range(arguments.rounds):
        for part in arguments.parts:
            for system in systems_of(part):
                yield {"cell": system, "part": part, "round": turn, "n": n}


def systems_of(part: str) -> list[str]:
    if part == "own":
        return ["localmoe", *list(SERVERS)[:3], "batched-bench"]
    if part == "shared":
        return ["localmoe", "server -np 64 -ub 2048", "server -np 64 -ub 2048 -kvu", "server"]
    if part == "edge":
        return [f"edge {edge}" for edge in EDGES]
    if part == "cli":
        return ["cli"]
    return ["localmoe", "one", *(["server"] if part == "16GiB" else [])]


def measured(cell: Cell, arguments: argparse.Namespace) -> Figures:
    before = wait_until_free()
    job = job_of(cell, arguments)
    if cell["cell"] == "batched-bench":
        found = batched_bench(job, arguments)
    elif cell["cell"] == "cli":
        found = command_line(job)
    elif cell["cell"].startswith("server"):
        found = server(cell, job, arguments)
    else:
        found = in_child(job)
    if "used_mib" in found:
        found["used_mib"] -= before // MIB
    return found


def job_of(cell: Cell, arguments: argparse.Namespace) -> Figures:
    part = "own" if cell["part"] in ("edge", "cli") else cell["part"]
    n_shared, n_own, n_generated = (max(int(n * arguments.scale), n > 0) for n in WORKLOADS[part])
    budget = {"edge": "16GiB"}.get(cell["part"], cell["part"] if "GiB" in cell["part"] else None)
    return {
        "kind": cell["cell"],
        "model": str(arguments.model),
        "prompts": prompts_of(cell["n"], n_shared, n_own, cell["round"]),
        "n_generated": n_generated,
        "budget": None if arguments.cpu else budget,
        "threads": arguments.threads,
        "edge": int(cell["cell"].split()[1]) if cell["part"] == "edge" else 0,
    }


def prompts_of(n: int, n_shared: int, n_own: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    shared = draw.choices(range(300, 31000), k=n_shared)
    return [shared + draw.choices(range(300, 31000), k=n_own) for _ in range(n)]


def used_bytes() -> int:
    """Memory in use on the GPU; 0 where there is none."""
    try:
        return gpu_used_bytes()
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def wait_until_free() -> int:
    """Wait until the process before has given its memory back. Gives the bytes still in use."""
    until = time.monotonic() + 20
    while (used := used_bytes()) > 1 << 30:
        if time.monotonic() > until:
            raise ValueError(f"{used // MIB} MiB of the GPU are in use before the cell")
        time.sleep(0.2)
    return used


def make_endless(path: Path) -> None:
    """Take away the end-of-text token's row of the output matrix: at temperature 0 it is never
    drawn, as its logit is 0 and some other's is above. The file must be a made one."""
    meta = read_meta(path)
    output = next(t for t in meta.tensors if t.name == "output.weight")
    n_row = output.n_bytes // output.shape[1]
    with meta.paths[output.shard].open("r+b") as file:
        file.seek(output.offset + (meta.tokenizer.eos_id or 2) * n_row)
        row = file.read(n_row)
        if any(row):
            file.seek(-n_row, os.SEEK_CUR)
            file.write(bytes(n_row))


# ---- localmoe ----


def in_child(job: Figures) -> Figures:
    """This program as a contender, in a process of its own."""
    started = time.time()
    command = [sys.executable, __file__, "--contender"]
    env = dict(os.environ)
    if job.get("edge"):
        env["GGML_OP_OFFLOAD_MIN_BATCH"] = str(job["edge"])
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=True, env=env,
        timeout=CELL_SECONDS,
    )  # fmt: skip
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    if "last_at" in found:
        found["whole_s"] = round(found.pop("last_at") - started, 3)
    return found


def contender(job: Figures) -> Figures:
    if job["kind"] == "routing":
        return routing(Path(job["model"]))
    if job["kind"] == "prepare":
        return prepare(Path(job["model"]))
    if job["kind"] == "one":
        job["prompts"] = job["prompts"][:1]
    if job["kind"].startswith("edge"):
        return edge(job)
    with tempfile.TemporaryDirectory() as folder:
        return as_batch(job, Path(folder) / "out.jsonl")


def prepare(path: Path) -> Figures:
    """Plan once, so that what is measured of a machine only once is in nobody's time."""
    with Planner(load_settings({}), "batch") as planner:
        plan = planner.plan_to_load(path, read_meta(path))
    return shown(plan.placement)


def as_batch(job: Figures, out: Path) -> Figures:
    """What `localmoe batch` does once it has checked its input: load for these requests, ask, and
    write each answer into the journal."""
    path = Path(job["model"])
    meta = read_meta(path)
    clock = Clock(probe=len(job["prompts"]) - 1)
    with PendingRequests() as backlog, FileOutput(out, MANIFEST) as output:
        recover(output, backlog)
        fill(backlog, job["prompts"], job["n_generated"])
        is_one = job["kind"] == "one"  # then as `localmoe run` would load, which is fastest
        batch_shape = None if is_one else batch_shape_of(backlog, 1 << 15, None, reuse_prefix=True)
        started = time.monotonic()
        loaded = load_found(
            ResolvedModel(ModelName(str(path), path=path), path, meta), settings_of(job),
            LoadCallbacks(),
            "run" if is_one else "batch", batch_shape, len(job["prompts"][0]) if is_one else None,
        )  # fmt: skip
        ready = time.monotonic()
        try:
            progress = run_batch(
                backlog,
                output,
                lambda: clock.listening(loaded.engine),
                RunOptions("bench"),
                StopFlag(),
            )
            last, last_at = time.monotonic(), time.time()
            used = used_bytes()
        finally:
            loaded.engine.kill()
    place = loaded.plan.placement
    return {
        "first_to_last_s": round(last - ready, 3),
        "last_at": last_at,
        "plan_and_load_s": round(ready - started, 2),
        "load_s": round(loaded.load_s, 2),
        "completion_tokens": progress.completion_tokens,
        "short": progress.completion_tokens != len(job["prompts"]) * job["n_generated"],
        "cached_tokens": progress.cached_tokens,
        "failed_requests": progress.n_failed,
        **clock.figures(min(place.n_seq, len(job["prompts"]))),
        "used_mib": used // MIB,
        **shown(place),
    }


def shown(place: Any) -> Figures:
    """What a placement says, without its longest lists."""
    said = asdict(place)
    said["cpu_expert_layers"] = len(said["cpu_expert_layers"])
    said["cpu_expert_tensors"] = len(said["cpu_expert_tensors"])
    return {"placement": said}


def settings_of(job: Figures, **more: Any) -> Settings:
    return load_settings({"vram": job["budget"], "threads": job["threads"], **more})


def fill(backlog: PendingRequests, prompts: Sequence[Sequence[int]], n_generated: int) -> None:
    options = AnswerOptions(Sampling(temperature=0), max_tokens=n_generated)
    for line, prompt in enumerate(prompts, start=1):
        key = line.to_bytes(16, "big")
        backlog.add(PendingRequest(line, f"line-{line}", key, False, tuple(prompt), options))


class Clock:
    """When answers' tokens came: every last delta, and all of the one that is streamed."""

    def __init__(self, probe: int) -> None:
        self._probe = probe
        self._n_submitted = 0
        self._probe_times: list[tuple[float, int]] = []
        self._ends: list[tuple[float, Delta]] = []

    def listening(self, engine: EngineProcess) -> Any:
        return Listening(engine, self)

    def streams_next(self) -> bool:
        self._n_submitted += 1
        return self._n_submitted == self._probe + 1

    def note(self, message: Any, is_probe: bool) -> None:
        if isinstance(message, Delta):
            now = time.monotonic()
            if is_probe and message.tokens:
                self._probe_times.append((now, len(message.tokens)))
            if message.finish_reason is not None:
                self._ends.append((now, message))

    def figures(self, n_at_once: int) -> Figures:
        """The throughput while so many generate, and how long they did."""
        spans = []
        for end, delta in self._ends:
            assert delta.usage is not None
            assert delta.timings is not None
            n, tps = delta.usage.completion_tokens, delta.timings.generation_tps
            if tps:
                spans.append((end - (n - 1) / tps, end, n))
        if not spans:
            return {}
        if n_at_once == 1 == len(spans):
            (begin, end, n) = spans[0]
            return {"width": 1, "width_tps": (n - 1) / (end - begin)}
        starts, ends = sorted(s[0] for s in spans), sorted(s[1] for s in spans)
        begin, end = starts[n_at_once - 1], ends[len(ends) - n_at_once]
        tokens, basis = self._tokens(spans, begin, end, n_at_once)
        return {
            "width": n_at_once,
            "width_tps": tokens / (end - begin) if end > begin else 0.0,
            "width_s": round(end - begin, 3),
            "width_basis": basis,
            "prompts_s": round(begin - min(starts), 3),
        }

    def _tokens(
        self, spans: list[tuple[float, float, int]], begin: float, end: float, n: int
    ) -> tuple[float, str]:
        """How many tokens came between two moments; each step gives one to all that generate.

        Where not all requests run at once, the streamed one tells of a part of the time only:
        each is then taken to have generated evenly.
        """
        if n == len(spans) and len(self._probe_times) > 1:
            times = [t for t, _ in self._probe_times]
            half = statistics.median(b - a for a, b in pairwise(times)) / 2  # clocks' difference
            steps = sum(k for t, k in self._probe_times if begin < t - half <= end)
            return steps * n, "steps"
        even = sum(
            (k - 1) * max(min(b, end) - max(a, begin), 0) / (b - a) for a, b, k in spans if b > a
        )
        return even, "even"


class Listening:
    """An engine whose messages a clock hears. One request is streamed."""

    def __init__(self, engine: EngineProcess, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def submit(self, request: Request, inbox: Any) -> int:
        is_probe = self._clock.streams_next()
        return self._engine.submit(replace(request, stream=is_probe), Ear(self, inbox, is_probe))  # type: ignore[arg-type]

    def hear(self, message: Any, is_probe: bool) -> None:
        self._clock.note(message, is_probe)

    def cancel(self, id: int, *, only_waiting: bool = False) -> None:
        self._engine.cancel(id, only_waiting=only_waiting)

    def kill(self) -> None:
        self._engine.kill()


class Ear:
    """An inbox that tells of each message before it is put."""

    def __init__(self, listening: Listening, inbox: Any, is_probe: bool) -> None:
        self._listening, self._inbox, self._is_probe = listening, inbox, is_probe

    def put(self, message: Any) -> None:
        self._listening.hear(message, self._is_probe)
        self._inbox.put(message)


def edge(job: Figures) -> Figures:
    """Generation by some sequences, for each width in turn, in one engine."""
    path = Path(job["model"])
    n_most = max(EDGE_WIDTHS)
    settings = settings_of(job, ubatch_size=512, load_mode="pinned" if job["budget"] else None)
    found = ResolvedModel(ModelName(str(path), path=path), path, read_meta(path))
    loaded = load_found(found, settings, LoadCallbacks(), "batch", BatchShape((n_most,), 256))
    rates = {}
    try:
        for width in EDGE_WIDTHS:
            clock = Clock(probe=width - 1)
            prompts = prompts_of(width, 0, EDGE_PROMPT, seed=width)
            with (
                PendingRequests() as backlog,
                tempfile.TemporaryDirectory() as folder,
                FileOutput(Path(folder) / "out", MANIFEST) as output,
            ):
                recover(output, backlog)
                fill(backlog, prompts, EDGE_GENERATED)
                run_batch(backlog, output, lambda c=clock: c.listening(loaded.engine),
                              RunOptions("bench"), StopFlag())  # fmt: skip
            rates[str(width)] = round(clock.figures(width).get("width_tps", 0.0), 2)
        used = used_bytes()
    finally:
        loaded.engine.kill()
    place = loaded.plan.placement
    return {"tps": rates, "used_mib": used // MIB, "load_s": loaded.load_s, **shown(place)}


def command_line(job: Figures) -> Figures:
    """The command itself, on texts of about as many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        into, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        into.write_text("".join(json.dumps(line) + "\n" for line in texts(job)))
        command = [sys.executable, "-m", "localmoe", "batch", job["model"], "-i", str(into)]
        command += ["-o", str(out), "--json", "--temp", "0"]
        command += ["--max-tokens", str(job["n_generated"])]
        command += ["--threads", str(job["threads"])] if job["threads"] else []
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=CELL_SECONDS)
        whole = time.perf_counter() - started
    if done.returncode:
        raise ValueError(f"localmoe batch ended with {done.returncode}: {done.stderr[-500:]}")
    return {"whole_s": round(whole, 3), "summary": json.loads(done.stdout)}


def texts(job: Figures) -> Iterator[Figures]:
    vocabulary = open_vocabulary(Path(job["model"]))
    try:
        for number, prompt in enumerate(job["prompts"]):
            text = vocabulary.detokenize(prompt).encode("utf-8", "ignore").decode()
            yield {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions",
                   "body": {"prompt": printable(text)}}  # fmt: skip
    finally:
        vocabulary.close()


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).replace("\ufffd", "?")


# ---- llama.cpp's own ----


def fit_flags(budget: str | None) -> list[str]:
    """Flags that hold --fit to a budget, its own margin of 1 GiB within it."""
    if budget is None:
        return []
    free = total_mib() - used_bytes() // MIB
    return ["-fitt", str(free - parse_size(budget) // MIB + 1024)]


def batched_bench(job: Figures, arguments: argparse.Namespace) -> Figures:
    n, n_prompt, n_generated = len(job["prompts"]), len(job["prompts"][0]), job["n_generated"]
    command = [str(arguments.tools / "llama-batched-bench"), "-m", job["model"], "-fa", "on"]
    command += ["-c", str(n * padded(n_prompt + n_generated)), "-b", "2048", "-ub", "2048"]
    command += ["-npp", str(n_prompt), "-ntg", str(n_generated), "-npl", str(n)]
    command += ["--output-format", "jsonl", *thread_flags(job)]
    done = subprocess.run(
        command, env=peer_environment(arguments.tools), capture_output=True, text=True,
        timeout=CELL_SECONDS,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise ValueError(f"llama-batched-bench: {done.stderr[-500:]}")
    row = rows[-1]
    return {"command": " ".join(command[1:]), "width": n, "width_tps": row["speed_tg"],
            "prompt_tps": row["speed_pp"], "first_to_last_s": row["t"]}  # fmt: skip


def padded(n_tokens: int) -> int:
    return -(-n_tokens // 256) * 256


def thread_flags(job: Figures) -> list[str]:
    return ["-t", str(job["threads"])] if job["threads"] else []


def server(cell: Cell, job: Figures, arguments: argparse.Namespace) -> Figures:
    """llama-server, asked all at once by as many clients."""
    prompts, n_generated, scale = job["prompts"], job["n_generated"], 1
    if job["budget"] or (arguments.cpu and "GiB" in cell["part"]):
        scale = SERVER_SHARE
        prompts = prompts[: len(prompts) // scale]
    n = len(prompts)
    cells_of_one = padded(len(prompts[0]) + n_generated)
    flags = [f.format(n=n, c=n * cells_of_one) for f in SERVERS[cell["cell"]]]
    flags += [*fit_flags(job["budget"]), *thread_flags(job)]
    started = time.perf_counter()
    with serving(arguments.tools, job["model"], flags) as address:
        ready = time.perf_counter()
        with ThreadPoolExecutor(n) as clients:
            answers = list(clients.map(lambda p: complete(address, p, n_generated), prompts))
        last = time.perf_counter()
        used = used_bytes()
    n_tokens = sum(a["tokens_predicted"] for a in answers)
    return {
        "command": " ".join(flags),
        "asked": n,
        "scale": scale,
        "first_to_last_s": round((last - ready) * scale, 3),
        "whole_s": round(ready - started + (last - ready) * scale, 3),
        "load_s": round(ready - started, 2),
        "completion_tokens": n_tokens,
        "short": n_tokens != n * n_generated,
        "prompt_tokens": sum(a["tokens_evaluated"] for a in answers),
        "one_tps": statistics.median(a["timings"]["predicted_per_second"] for a in answers),
        "used_mib": used // MIB,
    }


@contextmanager
def serving(tools: Path, model: str, flags: list[str]) -> Iterator[str]:
    port = free_port()
    command = [str(tools / "llama-server"), "-m", model, "--port", str(port), *flags]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=peer_environment(tools)) as process,
    ):
        try:
            address, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
            while not is_ready(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    said = log.read().decode("utf-8", "replace")[-500:]
                    raise ValueError(f"llama-server isn't ready ({process.poll()}): {said}")
                time.sleep(0.02)
            yield address
        finally:
            process.kill()


def complete(address: str, prompt: list[int], n_generated: int) -> Figures:
    body = {"prompt": prompt, "n_predict": n_generated, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=CELL_SECONDS) as answer:
        found: Figures = json.load(answer)
        return found


# ---- the table ----


def summary(results: Results) -> None:
    for row in results.rows:
        if row["cell"] == "routing":
            print(f"{row['file']}: {'even' if row.get('even') else 'UNEVEN'} routing: {row}")
        elif "failed" in row:
            print(f"FAILED {row['part']} {row['cell']}: {row['failed']}")
        elif row.get("short"):
            print(f"SHORT {row['part']} {row['cell']}: {row['completion_tokens']} tokens")
    print(f"\n{'part':<8}{'system':<30}{'first-last s':>13}{'whole s':>9}{'tok/s':>8}"
          f"{'at once':>9}{'load s':>8}{'MiB':>7}")  # fmt: skip
    for part, system in dict.fromkeys((r.get("part"), r["cell"]) for r in results.rows):
        if part and part != "edge":
            print(line_of(results, part, system))
    edge_table(results)
    print()
    for text in aims(results):
        print(text)


def figure(results: Results, part: str, system: str, name: str) -> float | None:
    """The median of a figure's rounds."""
    rows = [r for r in results.rows if (r.get("part"), r["cell"]) == (part, system)]
    values = [r[name] for r in rows if r.get(name)]
    return statistics.median(values) if values else None


def line_of(results: Results, part: str, system: str) -> str:
    def said(name: str, width: int, digits: int) -> str:
        value = figure(results, part, system, name)
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    return (
        f"{part:<8}{system:<30}{said('first_to_last_s', 13, 2)}{said('whole_s', 9, 1)}"
        f"{said('width_tps', 8, 1)}{said('width', 9, 0)}{said('load_s', 8, 1)}"
        f"{said('used_mib', 7, 0)}"
    )


def edge_table(results: Results) -> None:
    rows = {r["cell"]: r["tps"] for r in results.rows if r.get("part") == "edge" and "tps" in r}
    if rows:
        print("\ntokens a second    " + "".join(f"{w:>8}" for w in EDGE_WIDTHS))
        for name, tps in rows.items():
            print(f"{name:<19}" + "".join(f"{tps.get(str(w), 0):>8.1f}" for w in EDGE_WIDTHS))


def aims(results: Results) -> Iterator[str]:
    """Each aim, what was reached, and whether that is enough."""

    def best(part: str, systems: Sequence[str]) -> float | None:
        found = [figure(results, part, s, "first_to_last_s") for s in systems]
        return min((f for f in found if f), default=None)

    def ours(part: str, name: str) -> float | None:
        return figure(results, part, "localmoe", name)

    def one(part: str) -> float | None:
        return figure(results, part, "one", "width_tps")

    first_last, tps = "first_to_last_s", "width_tps"
    bench = figure(results, "own", "batched-bench", tps)
    yield aim("own: of llama-server -np 64 at its best", best("own", list(SERVERS)[:3]),
              ours("own", first_last), 1.0)  # fmt: skip
    yield aim("own: generation of llama-batched-bench", ours("own", tps), bench, 1.05)
    yield aim("shared: times as fast as llama-server", best("shared", list(SERVERS)),
              ours("shared", first_last), 3.0)  # fmt: skip
    yield aim("16GiB: generation of one sequence", ours("16GiB", tps), one("16GiB"), 10)
    yield aim("16GiB: times as fast as llama-server's defaults", best("16GiB", ["server"]),
              ours("16GiB", first_last), 5)  # fmt: skip
    yield aim("8GiB: generation of one sequence", ours("8GiB", tps), one("8GiB"), 10)


def aim(name: str, above: float | None, below: float | None, wanted: float) -> str:
    if not above or not below:
        return f"{name:<52} not measured (aim {wanted:g})"
    ratio = above / below
    return f"{name:<52}{ratio:6.2f}  aim {wanted:g}: {'reached' if ratio >= wanted else 'MISSED'}"


if __name__ == "__main__":
    main()
