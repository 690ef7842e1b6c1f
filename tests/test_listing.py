"""What the list says suits a machine, and how its rows are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmoe.catalog.candidates import sized_quants
from localmoe.catalog.catalog import ModelSpec, QuantSpec, read_catalog
from localmoe.catalog.listing import CatalogRow, MemoryBudget, best_quant, memory_budget_of
from localmoe.catalog.select_quant import in_order
from localmoe.cli.models import catalog_row, footer, other_row
from localmoe.hardware.machine import Gpu, Machine
from localmoe.hub.cache_layout import CachedFile
from localmoe.hub.installed import InstalledModel
from localmoe.planner.request import PlanRequest

GIB = 1 << 30
MIXTRAL = read_catalog()["mixtral"]
QWEN = read_catalog()["qwen3-30b-a3b"]
NOTHING_ASKED = PlanRequest()
NAME, QUANT, SIZE, HERE, VERDICT = range(5)


def room(ram_gib: float, gpu_gib: float = 0, *, asked: PlanRequest = NOTHING_ASKED) -> MemoryBudget:
    ram, gpu = int(ram_gib * GIB), int(gpu_gib * GIB)
    cards = (Gpu("CUDA0", "a card", gpu, gpu),) if gpu else ()
    return memory_budget_of(Machine(ram, ram, 8, cards), asked)


def entry(spec: ModelSpec, memory: MemoryBudget, *here: InstalledModel) -> CatalogRow:
    quants = tuple(sized_quants(spec))
    return CatalogRow("it", spec, quants, here, best_quant(spec, in_order(quants), memory))


def installed(
    name: str, commit: str = "a", *, lost: int = 0, label: str = "Q4_K_M"
) -> InstalledModel:
    path = Path("/cache/models--a--b/snapshots") / commit / name
    blob = Path("/cache/models--a--b/blobs") / name
    file = CachedFile("a/b", commit, name, path, blob, 3 * GIB)
    return InstalledModel("a/b", commit, label, (file,), tuple(f"s{n}" for n in range(lost)), True)


@pytest.mark.parametrize(
    ("spec", "ram", "gpu", "quant", "verdict"),
    [
        (MIXTRAL, 64, 0, "Q4_K_M", "fits"),
        (MIXTRAL, 16, 24, "Q4_K_M", "fits"),
        (MIXTRAL, 14, 0, "i1-IQ2_XXS", "poor"),
        (MIXTRAL, 4, 0, "i1-IQ1_M", "too large"),
        (QWEN, 10.5, 0, "UD-IQ2_XXS", "fits"),
    ],
)
def test_what_suits_a_machine(
    spec: ModelSpec, ram: float, gpu: float, quant: str, verdict: str
) -> None:
    row = catalog_row(entry(spec, room(ram, gpu)))
    assert row[QUANT] == quant
    assert verdict in row[VERDICT]
    assert ("poor" in row[VERDICT]) == (verdict == "poor")


def test_budgets_are_kept_to() -> None:
    asked = PlanRequest(ram_bytes=10 * GIB, vram_bytes=(4 * GIB,))
    row = catalog_row(entry(MIXTRAL, room(64, 24, asked=asked)))
    assert row[QUANT] == "i1-IQ2_XXS"


def test_memory_that_a_gpu_shares_counts_once_and_is_as_fast() -> None:
    shared = Gpu("Metal", "Apple", 24 * GIB, 18 * GIB, unified=True)
    found = memory_budget_of(Machine(24 * GIB, 18 * GIB, 8, (shared,)), NOTHING_ASKED)
    assert (found.memory_bytes, found.gpu_bytes) == (18 * GIB, 18 * GIB)


def test_what_is_not_known_is_said() -> None:
    spec = ModelSpec(repo="a/b", quants={"Q4_K_M": QuantSpec(file="m.gguf")})
    row = catalog_row(entry(spec, room(64)))
    assert (row[QUANT], row[VERDICT]) == ("", "size unknown until pulled")


def test_a_file_of_ones_own_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    own = entry(ModelSpec(path=path), room(64))
    assert not own.is_here
    assert catalog_row(own)[HERE:5] == ("", f"missing: {path}")
    path.touch()
    assert own.is_here
    assert catalog_row(own)[HERE:5] == ("yes", "fits")


def test_one_label_stands_there_once_and_lost_shards_are_counted() -> None:
    twice = installed("a.gguf"), installed("b.gguf")
    assert catalog_row(entry(MIXTRAL, room(64), *twice))[HERE] == "Q4_K_M"
    assert other_row(installed("a.gguf", lost=1))[VERDICT] == "1 shard missing"
    row = catalog_row(entry(MIXTRAL, room(64), installed("a.gguf", lost=2)))
    assert row[VERDICT] == "2 shards missing"


def test_no_model_is_counted_twice() -> None:
    """Two names of the catalog, and two commits, may hold the same file."""
    one, again = installed("a.gguf", "a"), installed("a.gguf", "b")
    known = [entry(MIXTRAL, room(64), one), entry(QWEN, room(64), one)]
    shown = "\n".join(footer(known, [again, installed("b.gguf")], [], only_installed=True))
    assert "2 downloaded, 6.00 GiB in all." in shown
