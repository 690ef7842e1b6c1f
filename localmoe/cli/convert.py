"""`convert`: an early Mixtral file becomes one that runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..catalog.catalog import better, read_catalog
from ..config.environment import config_folder, engine_environment
from ..engine.client import EngineProcess
from ..engine.protocol import Placement, Request, Sampling
from ..errors import EngineError, LocalMoeError
from ..gguf.merge_experts import merge_experts as write_file
from ..gguf.merge_experts import plan_conversion
from ..gguf.model_meta import SHARD_NAME
from ..hardware.detect import this_machine
from ..terminal import console
from .options import json_option, verbosity_options

if TYPE_CHECKING:
    from ..gguf.merge_experts import Conversion
    from ..gguf.model_meta import ModelMeta

TRY_OUT_CONTEXT = 256  # tokens; fewer are rounded up to this
# quants of which early files lose no more than later ones: all their matrices have one type
AS_GOOD = ("F32", "F16", "BF16", "Q8_0", "Q6_K")
BETTER = "The catalog has a better file, made after April 2024"


@click.command()
@click.argument("file", metavar="OLD.gguf")
@click.option(
    "-o", "--output", metavar="NEW.gguf", help="What to write; OLD-merged.gguf beside the old one."
)
@json_option
@verbosity_options
def convert(file: str, output: str | None, as_json: bool, verbose: bool, quiet: bool) -> None:
    """Make a Mixtral file of before April 2024 run: its experts are merged, nothing is lost.

    Such files have a tensor for each expert, which llama.cpp no longer loads. The old file stays
    as it is; the new one takes as much disk again, and is tried out before it gets its name.
    """
    path = Path(file).expanduser()
    conversion = plan_conversion(path)
    target = Path(output).expanduser() if output else beside(path)
    better = better_file(conversion.meta)
    if better and not quiet:
        console.note(f"{better} Converting anyway.")
    for text in conversion.warnings:
        console.warning(text)
    ran = write(conversion, target, verbose, quiet or as_json)
    if as_json:
        console.document(summary(conversion, target, better, ran))
    else:
        tried = "tried out" if ran else "not tried out: more than the memory that is free"
        size = console.size(conversion.n_bytes)
        command = f"localmoe run {shlex.quote(str(target))}"
        console.lines([f"{target.name} is here, {size}, {tried}. Next: {command}"])


def beside(path: Path) -> Path:
    """Where the new file lies if nobody says; shards become one file."""
    stem = SHARD_NAME.sub("", path.name).removesuffix(".gguf")
    return path.with_name(f"{stem}-merged.gguf")


def write(conversion: Conversion, target: Path, verbose: bool, quiet: bool) -> bool:
    """Convert with progress shown; says whether the new file has generated a token here."""
    line = console.StatusLine(quiet)
    ran = False
    shown = -1

    def report(n_bytes: int) -> None:
        nonlocal shown
        if n_bytes * 100 // conversion.n_bytes > shown:
            shown = n_bytes * 100 // conversion.n_bytes
            line.show(f"Writing {target.name} {shown:3} %", takes_minutes=True)

    def check(path: Path) -> None:
        nonlocal ran
        line.show(f"Trying {target.name} out")
        ran = try_out(path, conversion, line.around(console.log_line) if verbose else None)

    try:
        write_file(conversion, target, report, check)
    finally:
        line.done()
    return ran


def try_out(path: Path, conversion: Conversion, on_log: Callable[[str], None] | None) -> bool:
    """Whether llama.cpp generates with the new file. Raises LocalMoeError where it refuses it.

    A file larger than the memory that is free is only opened: reading it would take too long.
    """
    machine = this_machine()
    placement = Placement(n_threads=machine.n_cores, n_ctx=TRY_OUT_CONTEXT)
    fits = conversion.n_bytes <= machine.ram_available_bytes
    try:
        with EngineProcess(engine_environment(), on_log) as engine:
            if not fits:
                engine.probe(str(path), placement)
                return False
            loaded = engine.load(str(path), placement)
            start = max(loaded.vocabulary.bos, 0)
            for _ in engine.generate(Request((start,), Sampling(temperature=0), max_tokens=1)):
                pass
            return True
    except EngineError as error:
        name = conversion.meta.paths[0].name
        raise LocalMoeError(
            f"What {name} became doesn't run, and was removed: {error.message}",
            "Take a version made after April 2024: localmoe list",
        ) from None


def better_file(meta: ModelMeta) -> str:
    """A sentence on the catalog's file of the same model, or nothing.

    Early quants lose more than later ones of the same label: llama.cpp's rules did not know the
    names of separate experts (its pull request 6387).
    """
    found = None if meta.quant_label in AS_GOOD else better(meta, read_catalog(config_folder()))
    if not found:
        return ""
    label = f" {found.label}" if found.label else ""
    size = f", {found.n_bytes / 1e9:.1f} GB" if found.n_bytes else ""
    return f"{BETTER}: {found.title}{label}{size}: {found.command}."


def summary(conversion: Conversion, target: Path, better: str, ran: bool) -> dict[str, Any]:
    """What --json says. Sizes are bytes."""
    return {
        "source": [str(path) for path in conversion.meta.paths],
        "target": str(target),
        "n_bytes": conversion.n_bytes,
        "n_merged": sum(t.is_merged for t in conversion.tensors),
        "n_widened": sum(t.is_widened for t in conversion.tensors),
        "tried_out": ran,
        "better": better,
        "warnings": list(conversion.warnings),
    }
