"""Locking pages of a mapped file: which, where they lie, and what happens where it can't be."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from make_model import SHAPES, make_model

from localmoe.engine.native.llama import devices, host_memory
from localmoe.engine.native.pinning import (
    HostMemory,
    PinnedPages,
    address_of,
    can_pin,
    joined,
    mapped,
)
from localmoe.engine.protocol import FileSpan, Placement
from localmoe.engine.worker.model import NativeModel
from localmoe.gguf.model_meta import read_meta
from localmoe.planner.plan import pinned_spans

PAGE = mmap.PAGESIZE


class Driver:
    """What a backend's two functions do, kept as a list of what is locked."""

    def __init__(self, allows: Callable[[int], bool] = lambda n_bytes: True) -> None:
        self.locked: dict[int, int] = {}
        self.memory = HostMemory(self._register, self._unregister)
        self._allows = allows

    def _register(self, address: int, n_bytes: int) -> bool:
        if self._allows(n_bytes):
            self.locked[address] = n_bytes
            return True
        return False

    def _unregister(self, address: int) -> None:
        del self.locked[address]


@contextmanager
def mapping(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.gguf"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    return path


def test_what_is_locked_is_what_the_span_holds(file: Path) -> None:
    driver = Driver()
    spans = [FileSpan(str(file), 12345, 777), FileSpan(str(file), 500_000, 100)]
    with mapping(file) as view:
        pages = PinnedPages(driver.memory)
        pages.pin(spans)
        assert pages.n_bytes == 877
        found = [ctypes.string_at(address, n) for address, n in driver.locked.items()]
        assert found == [view[span.start : span.start + span.n_bytes] for span in spans]
        pages.release()
    assert driver.locked == {}
    assert pages.n_bytes == 0


def test_spans_that_share_a_page_are_one() -> None:
    """A copy may not reach over two registrations, and a page may not be left between them."""
    spans = [FileSpan("a", 5000, 10), FileSpan("a", 0, 1000), FileSpan("a", 5010, 9000)]
    far = FileSpan("a", 14010 + PAGE, 5)
    assert joined([*spans, far, FileSpan("b", 5020, 5)]) == [
        FileSpan("a", 0, 14010) if PAGE > 4000 else FileSpan("a", 0, 1000),
        far,
        FileSpan("b", 5020, 5),
    ]


def test_what_the_driver_refuses_stays_as_it_is(file: Path) -> None:
    driver = Driver(lambda n_bytes: n_bytes < 500)
    with mapping(file):
        pages = PinnedPages(driver.memory)
        pages.pin([FileSpan(str(file), 0, 777), FileSpan(str(file), 500_000, 100)])
        assert pages.n_bytes == 100
        assert list(driver.locked.values()) == [100]
        pages.release()


def test_what_is_not_mapped_is_not_locked(file: Path) -> None:
    driver = Driver()
    assert address_of(FileSpan(str(file), 0, 10), mapped()) is None
    PinnedPages(driver.memory).pin([FileSpan(str(file), 0, 10)])
    with mapping(file):
        PinnedPages(driver.memory).pin([FileSpan(str(file), 2**20 - 5, 10)])
    assert driver.locked == {}
    assert list(mapped(file.with_name("no-such-file"))) == []


def test_a_page_is_tried_before_anything_is_loaded(file: Path) -> None:
    driver = Driver()
    assert can_pin(driver.memory, str(file))
    assert driver.locked == {}
    assert not can_pin(Driver(lambda n_bytes: False).memory, str(file))


def test_without_a_backend_that_locks_nothing_is_locked(tiny_model: Path) -> None:
    if any(device.kind == "gpu" for device in devices()):
        pytest.skip("this build has a GPU")
    assert host_memory() is None
    spans = (FileSpan(str(tiny_model), 4096, 4096),)
    model = NativeModel(str(tiny_model), Placement(1, n_ctx=256, load_mode="pinned"), spans)
    assert model.n_pinned_bytes == 0
    model.free()


def test_spans_are_the_tensors_that_a_gpu_copies(tmp_path: Path) -> None:
    paths = make_model(tmp_path / "m.gguf", SHAPES["mixtral-1gb"], header_only=True, shards=3)
    meta = read_meta(paths[0])
    place = Placement(
        4,
        n_gpu_layers=meta.n_layers + 1,
        cpu_expert_layers=(0, 1),
        cpu_expert_tensors=("blk.5.ffn_up_exps.weight",),
        load_mode="pinned",
    )
    wanted = {
        (str(meta.paths[t.shard]), t.offset, t.n_bytes)
        for t in meta.tensors
        if t.role == "experts" and (t.layer in (0, 1) or t.name == "blk.5.ffn_up_exps.weight")
    }
    spans = pinned_spans(meta, place)
    assert {(span.path, span.start, span.n_bytes) for span in spans} == wanted
    assert len(wanted) == 7
    assert pinned_spans(meta, Placement(4, n_gpu_layers=20)) == ()


def test_of_layers_in_ram_the_dense_matrices_are_copied_too(tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", SHAPES["mixtral-8x7b"], header_only=True)
    meta = read_meta(path)
    place = Placement(4, n_gpu_layers=meta.n_layers, load_mode="pinned")  # all but the first
    found = pinned_spans(meta, place)
    first = [t for t in meta.tensors if t.layer == 0 and t.n_bytes >= 1 << 20]
    assert {span.start for span in found} == {t.offset for t in first}
    assert any(t.role == "attention" for t in first)
