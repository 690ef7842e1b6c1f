#!/usr/bin/env python3
"""Kill a batch at random moments, parent or engine, and look at what is left of its output.

    scripts/soak/batch.py --kills 1000 --seed 1
    scripts/soak/batch.py --input-gib 2

After every kill: no line that was there is gone or changed, none is there twice, and all that was
acknowledged is there. At the end the batch is finished, and its texts are those of a run that
nobody disturbed. `localmoe batch` itself is run; with --direct a program of a few lines that does
the same without looking for a model, which starts faster and says what it has acknowledged.

With --input-gib nothing is killed: an input of that size, half of it a single line, is held against
one of two lines, and the memory that both took is said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

N_LINES = 60
ANSWER_TOKENS = 5
SUBJECTS = ("tea", "music", "dogs", "rain", "Sunday", "the sea", "books", "soup", "trains", "snow")
COMMAND = (sys.executable, "-m", "localmoe", "batch", "demo", "--temp", "0", "--no-share", "-q",
           "--parallel", "1")  # fmt: skip
DIRECT = (sys.executable, str(Path(__file__).resolve()), "--one")


@dataclass(frozen=True, slots=True)
class Tally:
    """Kills of each kind so far, runs that they were spread over, and runs that came to an end."""

    parents: int = 0
    engines: int = 0
    runs: int = 0
    finished: int = 0


def write_input(path: Path, n_lines: int) -> None:
    """Requests with names of their own, some of which can't be asked."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(n_lines):
            prompt = f"What do you think of {SUBJECTS[n % len(SUBJECTS)]}, number {n}?"
            request = {"custom_id": f"id-{n}", "prompt": prompt, "max_tokens": ANSWER_TOKENS}
            file.write(("{" if n % 20 == 7 else json.dumps(request)) + "\n")


# ---- the kills -----------------------------------------------------------------------------------


def soak(command: Sequence[str], folder: Path, n_kills: int, rng: random.Random) -> Tally:
    """Kill until it is enough, looking after each kill; then finish. Raises AssertionError."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    parents = engines = runs = finished = 0
    while parents + engines < n_kills:
        before = whole_lines(output)
        process = start(command, source, output, folder / "said")
        runs += 1
        while parents + engines < n_kills and wait_for_moment(process, output, rng):
            if rng.random() < 0.4:
                process.kill()
                parents += 1
                break
            engines += kill_engine(process, rng)
        else:
            if process.poll() is None:
                process.kill()
        process.wait()
        assert process.returncode in (-9, 0, 1, 5), (folder / "said").read_text()
        after = whole_lines(output)
        check_kept(before, after, acknowledged(folder / "said"))
        if process.returncode in (0, 5) and is_complete(after):
            finished += 1
            forget(output)
    return Tally(parents, engines, runs, finished)


def wait_for_moment(process: subprocess.Popen[bytes], output: Path, rng: random.Random) -> bool:
    """Wait for some lines to come, or for a while; False where the process ended first."""
    wanted = n_bytes(output) + rng.randrange(1, 3000)
    patience = rng.uniform(0, 1.0) if rng.random() < 0.3 else 20.0
    until = time.monotonic() + patience
    while n_bytes(output) < wanted and time.monotonic() < until:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))
    return process.poll() is None


def kill_engine(process: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Kill a child of the process, if it has one."""
    with suppress(psutil.Error, IndexError):
        rng.choice(psutil.Process(process.pid).children(recursive=True)).kill()
        return True
    return False


def start(
    command: Sequence[str], source: Path, output: Path, said: Path
) -> subprocess.Popen[bytes]:
    with said.open("wb") as file:
        arguments = [*command, "-i", str(source), "-o", str(output)]
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)


# ---- what is left --------------------------------------------------------------------------------


def n_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that have their line end."""
    raw = path.read_bytes() if path.exists() else b""
    return raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)


def acknowledged(said: Path) -> int:
    """How many lines of its run the direct program said are safe."""
    found = re.findall(r"safe (\d+)\n", said.read_text("utf-8", "replace"))
    return int(found[-1]) if found else 0


def check_kept(before: list[bytes], after: list[bytes], n_acknowledged: int) -> None:
    """Nothing that was there is gone or changed, nothing is there twice. Raises AssertionError."""
    assert after[: len(before)] == before, "a line that was written is gone or changed"
    assert len(after) >= len(before) + n_acknowledged, "an acknowledged line is lost"
    keys = [json.loads(line)["id"] for line in after]
    assert len(set(keys)) == len(keys), "an answer is there twice"
    lines = [json.loads(line)["line"] for line in after]
    assert len(set(lines)) == len(lines), "a request has two answers"


def is_complete(lines: list[bytes]) -> bool:
    return len(lines) >= N_LINES


def texts(output: Path) -> dict[str, str]:
    """What was answered to whom; an error by its code."""
    found = {}
    for line in whole_lines(output):
        value = json.loads(line)
        response, error = value["response"], value["error"]
        said = response["body"]["choices"][0]["message"]["content"] if response else error["code"]
        found[value["custom_id"]] = said
    return found


def forget(output: Path) -> None:
    """Begin anew: take an output and what belongs to it away."""
    for path in (output, output.with_name(f"{output.name}.manifest.json")):
        path.unlink(missing_ok=True)


def finish(command: Sequence[str], folder: Path) -> dict[str, str]:
    """Let the batch come to its end, undisturbed; what an engine died of too often is asked again.

    Gives its texts.
    """
    output = folder / "out.jsonl"
    process = start([*command, "--retry-errors"], folder / "in.jsonl", output, folder / "said")
    assert process.wait() in (0, 5), (folder / "said").read_text()
    check_kept([], whole_lines(output), 0)
    assert is_complete(whole_lines(output))
    return texts(output)


# ---- large inputs --------------------------------------------------------------------------------


def write_large_input(path: Path, n_bytes: int) -> None:
    """Two good lines; between them, half lines that can't be asked, half a single line of zeros."""
    good = b'{"prompt": "Hi!", "max_tokens": 1}\n'
    bad = b'{"prompt": "' + b"many words and more of them " * 36 + b'", "n": 2}\n'
    with path.open("wb") as file:
        file.write(good)
        while file.tell() < n_bytes // 2:
            file.write(bad * 1000)
        file.truncate(n_bytes)
        file.seek(n_bytes)
        file.write(b"\n" + good)


def peak_bytes(command: Sequence[str], source: Path, output: Path) -> int:
    """The most memory that a run took, its engines apart."""
    process = start(command, source, output, source.with_name("said"))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 5), source.with_name("said").read_text()
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_report(command: Sequence[str], folder: Path, n_gib: float) -> str:
    """Answer a small and a large input, and say what memory each took."""
    peaks = []
    for n_bytes in (0, int(n_gib * 2**30)):
        source, output = folder / "in.jsonl", folder / f"out-{n_bytes}.jsonl"
        write_large_input(source, n_bytes)
        peaks.append(peak_bytes(command, source, output))
    small, large = peaks
    assert large - small < 200 << 20, f"{(large - small) >> 20} MiB more than a small run"
    return f"{n_gib:g} GiB of input: {large >> 20} MiB; a small one: {small >> 20} MiB"


# ---- a program that does what `localmoe batch` does, and says what is safe -----------------------


def answer_directly(source: Path, output: Path, retry_errors: bool) -> int:
    """Run a batch on the demo model, one request at a time, sharing nothing."""
    from localmoe.batch import runner
    from localmoe.batch.dispatch import StopFlag
    from localmoe.batch.encoder import Encoder
    from localmoe.batch.manifest import Manifest, input_file
    from localmoe.batch.pending import PendingRequests
    from localmoe.batch.requests import Defaults
    from localmoe.batch.responses import FileOutput
    from localmoe.chat.chat import AnswerOptions
    from localmoe.config.environment import engine_environment
    from localmoe.engine.client import EngineProcess
    from localmoe.engine.protocol import Placement, Sampling
    from localmoe.gguf.demo import PACKAGE
    from localmoe.gguf.model_meta import read_meta
    from localmoe.loading import format_of

    meta = read_meta(PACKAGE / "models" / "demo" / "demo.gguf")

    def engine_of() -> EngineProcess:
        engine = EngineProcess(engine_environment())
        engine.load(str(meta.paths[0]), Placement(n_threads=1, n_ctx=256))
        return engine

    engines = (engine_of() for _ in iter(int, 1))
    first = next(engines)
    with source.open("rb") as stream, PendingRequests() as backlog:
        manifest = Manifest(input_file(source.name, stream), {"model file": "demo"})
        with FileOutput(output, manifest) as out:
            runner.recover(out, backlog, retry_errors=retry_errors)
            defaults = Defaults(AnswerOptions(Sampling(temperature=0)))
            encoder = Encoder(format_of(meta), first, 256)
            checked = runner.check_input(stream, "json", defaults, lambda: encoder, backlog, out)
            say_safe(checked.n_bad)
            supply = supply_of(first, engines)
            options = runner.RunOptions(
                "demo", encoder.format.answers_start_text, reuse_prefix=False
            )
            runner.run_batch(
                backlog, out, lambda: next(supply), options, StopFlag(),
                lambda progress: say_safe(checked.n_bad + progress.n_ended),
            )  # fmt: skip
    return 0


def supply_of(first: object, others: Iterator[object]) -> Iterator[object]:
    yield first
    yield from others


def say_safe(n_lines: int) -> None:
    os.write(1, b"safe %d\n" % n_lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input-gib", type=float)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--retry-errors", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-i", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        raise SystemExit(answer_directly(asked.i, asked.o, asked.retry_errors))
    command = DIRECT if asked.direct else COMMAND
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        if asked.input_gib is not None:
            print(memory_report(command, Path(name), asked.input_gib), flush=True)
        else:
            print(report(command, Path(name), asked.kills, asked.seed), flush=True)
    print(f"{time.monotonic() - started:.0f} s")


def report(command: Sequence[str], folder: Path, n_kills: int, seed: int) -> str:
    """Soak, finish, compare with an undisturbed run, and say how it went."""
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    for place in (folder, undisturbed):
        write_input(place / "in.jsonl", N_LINES)
    expected = finish(command, undisturbed)
    tally = soak(command, folder, n_kills, random.Random(seed))
    assert finish(command, folder) == expected, "texts differ from those of an undisturbed run"
    return f"{tally}: nothing lost, nothing twice, nothing changed, {len(expected)} texts the same"


if __name__ == "__main__":
    main()
