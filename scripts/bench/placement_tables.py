"""What placement.py measured, as tables: medians over the rounds, and ratios to llama.cpp's fit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

Rows: TypeAlias = Sequence[dict[str, Any]]
SYSTEMS = ("fit", "run", "chat", "layers")


def summary(rows: Rows) -> None:
    for row in rows:
        if row["cell"] == "routing":
            print(f"{row['file']}: {'even' if row.get('even') else 'UNEVEN'} routing: {row}")
        if row["cell"] == "reading":
            print(f"{row['file']}: read in {row['seconds']} s, {row['gb_s']} GB/s")
    for row in rows:
        if row["cell"] == "depth":
            print(json.dumps(row))
    print(f"\n{'file':<14}{'budget':>7}  system  prompt/s  x fit   generate/s  x fit  load s")
    for file, budget in dict.fromkeys((r["file"], r["budget"]) for r in rows if "budget" in r):
        speeds = {s: medians(rows, s, file, budget) for s in SYSTEMS}
        for system, found in speeds.items():
            if found:
                print(speed_line(file, budget, system, found, speeds["fit"]))
    memory_rows = [r for r in rows if r["cell"] == "memory"]
    if memory_rows:
        fine = sum(bool(r.get("fine")) for r in memory_rows)
        print(f"\nmemory: {fine} of {len(memory_rows)} cells within max(1 %, 16 MiB) and budget")
    for r in memory_rows:
        print(json.dumps({k: v for k, v in r.items() if k not in ("cell", "took_s")}))


def medians(rows: Rows, system: str, file: str, budget: str) -> dict[str, float]:
    mine = [
        r for r in rows
        if (r["cell"], r["file"], r.get("budget")) == (system, file, budget)
    ]  # fmt: skip
    found = {}
    for name in ("prompt_tps", "generation_tps", "load_s"):
        values = [r[name] for r in mine if r.get(name)]
        if values:
            found[name] = statistics.median(values)
    return found


def speed_line(
    file: str, budget: str, system: str, found: dict[str, float], fit: dict[str, float]
) -> str:
    def pair(name: str) -> str:
        if name not in found:
            return f"{'-':>9} {'-':>6}"
        ratio = f"{found[name] / fit[name]:6.2f}" if fit.get(name) else f"{'-':>6}"
        return f"{found[name]:>9.1f} {ratio}"

    load = f"{found['load_s']:>7.1f}" if "load_s" in found else ""
    return (
        f"{file:<14}{budget:>7}  {system:<7}{pair('prompt_tps')}  {pair('generation_tps')} {load}"
    )
