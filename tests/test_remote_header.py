"""Headers of models that are not here: fetched by ranges, kept, read like the model's own."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import FAMILIES, SHAPES, make_model
from standin_hub import Fault, RequestRecord, StandInHub

from localmoe.errors import DownloadError, ModelFileError
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.hub.client import Hub
from localmoe.hub.remote_header import READ_BYTES, header_files
from localmoe.hub.types import HubAccess, RemoteFile, TransferFault

REPO = "org/name-GGUF"
TINY = replace(SHAPES["tiny"], n_vocab=32000)


@pytest.fixture(autouse=True)
def no_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[StandInHub]:
    with StandInHub(cdn=True) as server:
        yield server


def hub_at(endpoint: str, folder: Path, offline: bool = False) -> Hub:
    access = HubAccess(
        endpoint, folder / "hub", folder / "headers", folder / "stamps", None, offline
    )
    return Hub(access, stall_s=0.3, pauses_s=(0.01, 0.01, 0.01))


def served(server: StandInHub, folder: Path, *paths: Path) -> tuple[Hub, tuple[RemoteFile, ...]]:
    """A hub with these model files, large sparse ones under an invented hash."""
    invented = {path.name: hashlib.sha256(path.name.encode()).hexdigest() for path in paths}
    server.add_repo(REPO, {path.name: path for path in paths}, sha256=invented)
    hub = hub_at(server.endpoint, folder)
    return hub, hub.repository(REPO).files


def facts(meta: ModelMeta) -> tuple[object, ...]:
    return meta.architecture, meta.n_params, meta.file_bytes, meta.quant_label, meta.bytes_by_role


@pytest.mark.parametrize("split_experts", [False, True])
def test_mixtral_costs_less_than_4_mib(
    split_experts: bool, server: StandInHub, tmp_path: Path
) -> None:
    paths = make_model(
        tmp_path / "mixtral.gguf", SHAPES["mixtral-8x7b"], "Q4_K_M",
        header_only=True, split_experts=split_experts,
    )  # fmt: skip
    hub, files = served(server, tmp_path, *paths)
    (path,) = header_files(hub, files)
    assert path == hub.access.headers / REPO / files[0].commit / "mixtral.gguf"
    assert server.bytes_sent() < 4 * 2**20
    assert path.stat().st_size == files[0].n_bytes > 20 * 2**30
    assert path.stat().st_blocks * 512 < 2 * 2**20
    meta = read_meta(path)
    assert facts(meta) == facts(read_meta(paths[0]))
    assert meta.legacy_split_experts is split_experts


def test_every_shard_is_fetched_once(server: StandInHub, tmp_path: Path) -> None:
    paths = make_model(tmp_path / "m.gguf", TINY, "Q8_0", shards=3)
    hub, files = served(server, tmp_path, *paths)
    headers = header_files(hub, files)
    assert [path.name for path in headers] == [path.name for path in paths]
    assert facts(read_meta(headers[0])) == facts(read_meta(paths[0]))
    n_requests = len(server.requests)
    assert header_files(hub, files) == headers
    assert header_files(hub_at(server.endpoint, tmp_path, offline=True), files) == headers
    assert len(server.requests) == n_requests


def test_only_the_header_is_kept(server: StandInHub, tmp_path: Path) -> None:
    (whole,) = make_model(tmp_path / "m.gguf", replace(TINY, n_vocab=300), "Q8_0")
    hub, files = served(server, tmp_path, whole)
    (path,) = header_files(hub, files)
    kept, content = path.read_bytes(), whole.read_bytes()
    assert len(kept) == len(content)
    n = len(os.path.commonprefix([kept, content]))
    assert 0 < n < 100_000
    assert not any(kept[n:])
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]  # nothing is left beside


@pytest.fixture(scope="module")
def large_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose header takes several steps."""
    path = tmp_path_factory.mktemp("models") / "large.gguf"
    family = replace(FAMILIES["qwen3moe"], n_vocab=150_000)
    make_model(path, family, "Q4_K_M", header_only=True)
    return path


def ranges(server: StandInHub) -> list[tuple[int, int]]:
    """Of the requests that bytes came for, first and one past the last."""
    asked = [r.range.removeprefix("bytes=").split("-") for r in sent(server) if r.range]
    return [(int(first), int(last) + 1) for first, last in asked]


def sent(server: StandInHub) -> list[RequestRecord]:
    return [r for r in server.requests if r.host == "cdn"]


def test_a_large_header_comes_in_growing_steps(
    large_header: Path, server: StandInHub, tmp_path: Path
) -> None:
    hub, files = served(server, tmp_path, large_header)
    (path,) = header_files(hub, files)
    assert facts(read_meta(path)) == facts(read_meta(large_header))
    steps = ranges(server)
    assert len(steps) > 1
    assert [first for first, _ in steps] == [0, *(end for _, end in steps[:-1])]
    assert sum(r.bytes_sent for r in sent(server)) == steps[-1][1]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after=400_000),
        Fault(stall_after=400_000, stall_s=20),
        Fault(status=503),
        Fault(status=429, retry_after="0"),
        Fault(ignore_range=True),
    ],
)
def test_what_a_bad_line_brought_is_kept(
    fault: Fault, large_header: Path, server: StandInHub, tmp_path: Path
) -> None:
    hub, files = served(server, tmp_path, large_header)
    hit: list[RequestRecord] = []
    server.fault = lambda r: fault if r.host == "cdn" and not hit and not hit.append(r) else None
    (path,) = header_files(hub, files)
    assert facts(read_meta(path)) == facts(read_meta(large_header))
    if fault.drop_after or fault.stall_after:
        start, end = ranges(server)[1]
        # a read that nothing more comes for is lost
        assert 0 <= 400_000 - start < (READ_BYTES if fault.stall_after else 1)
        assert end == 2**20


def test_a_file_swapped_between_steps_is_fetched_anew(
    large_header: Path, server: StandInHub, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    with open(large_header, "rb") as stream:
        content = bytearray(stream.read(2**24))
    place = content.index(b"general.name")
    content[place : place + 12] = b"general.NAME"
    other.write_bytes(content)
    os.truncate(other, large_header.stat().st_size)
    hub, files = served(server, tmp_path, large_header)

    def swap(record: RequestRecord) -> None:
        if record.host == "hub" and record.is_bytes and sent(server):
            server.replace(REPO, large_header.name, other, "5" * 64)

    server.fault = swap
    (path,) = header_files(hub, files)
    with open(path, "rb") as stream:
        kept = stream.read(2**20)
    assert kept == content[: 2**20]


def test_a_line_that_stays_bad_is_given_up(
    large_header: Path, server: StandInHub, tmp_path: Path
) -> None:
    hub, files = served(server, tmp_path, large_header)
    server.fault = lambda r: Fault(drop_after=1000) if r.host == "cdn" else None
    with pytest.raises(TransferFault):
        header_files(hub, files)
    assert len(sent(server)) == 4
    assert not list(hub.access.headers.rglob("*.gguf"))


def test_a_file_that_changed_is_refused(server: StandInHub, tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, "Q8_0")
    hub, files = served(server, tmp_path, path)
    server.replace(REPO, "m.gguf", path.read_bytes() + b"x")
    with pytest.raises(DownloadError, match=r"m\.gguf of org/name-GGUF has changed on the Hub"):
        header_files(hub, files)


def cut(content: bytes) -> bytes:
    return content[:-1000]


def safetensors(_: bytes) -> bytes:
    return (50).to_bytes(8, "little") + b'{"__metadata__":{}}' + bytes(100)


def cut_in_the_header(content: bytes) -> bytes:
    return content[:1000]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "m.gguf: cut short: the file has "),
        (cut_in_the_header, "m.gguf: "),
        (safetensors, "m.gguf: safetensors, not GGUF"),
        (lambda _: b"", "m.gguf: empty, 0 bytes"),
        (lambda _: bytes(2000), "m.gguf: empty at its beginning: an unfinished download"),
    ],
)
def test_what_would_not_run_is_refused_before_a_download(
    change: Callable[[bytes], bytes], message: str, server: StandInHub, tmp_path: Path
) -> None:
    (path,) = make_model(tmp_path / "m.gguf", replace(TINY, n_vocab=300), "Q8_0")
    path.write_bytes(change(path.read_bytes()))
    hub, files = served(server, tmp_path, path)
    with pytest.raises(ModelFileError) as caught:
        header_files(hub, files)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()
    assert server.bytes_sent() <= 2**20 + 100
    assert not list(hub.access.headers.rglob("*.gguf"))


@pytest.mark.parametrize("fault", [Fault(html=True), Fault(lfs_pointer=True)])
def test_pages_and_pointers_are_refused(fault: Fault, server: StandInHub, tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, "Q8_0")
    hub, files = served(server, tmp_path, path)
    server.fault = lambda _: fault
    with pytest.raises(DownloadError, match=r"came in place of m\.gguf"):
        header_files(hub, files)


def test_a_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    hub = hub_at("http://127.0.0.1:9", tmp_path)
    file = RemoteFile(REPO, "0" * 40, "../../m.gguf", 100, None)
    with pytest.raises(DownloadError, match="unsafe name"):
        header_files(hub, [file])


def test_offline_without_a_header(tmp_path: Path) -> None:
    hub = hub_at("http://127.0.0.1:9", tmp_path, offline=True)
    with pytest.raises(DownloadError, match="Hub is not asked offline"):
        header_files(hub, [RemoteFile(REPO, "0" * 40, "m.gguf", 100, None)])


def test_a_folder_that_cannot_be_written_to_is_said(server: StandInHub, tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, "Q8_0")
    (tmp_path / "headers").write_text("a file in its place")
    hub, files = served(server, tmp_path, path)
    with pytest.raises(DownloadError, match=r"The header of m\.gguf can't be kept in") as caught:
        header_files(hub, files)
    assert "LOCALMOE_STATE" in caught.value.hint


def test_headers_can_be_deleted_at_any_time(server: StandInHub, tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, "Q8_0")
    hub, files = served(server, tmp_path, path)
    header_files(hub, files)
    shutil.rmtree(hub.access.headers)
    assert header_files(hub, files)[0].is_file()
