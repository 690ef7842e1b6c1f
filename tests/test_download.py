"""Downloads from a stand-in Hub that fails in every way: right in the end, or no file at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from soak.download import BUDGET_BYTES, Soak
from standin_hub import Fault, RequestRecord, StandInHub

from localmoe.callbacks import DownloadProgress
from localmoe.errors import DownloadError
from localmoe.hub.client import Hub
from localmoe.hub.download import download, repair
from localmoe.hub.partial_file import JOURNAL_SUFFIX, PARTIAL_SUFFIX, Partial
from localmoe.hub.transfer import THREAD_NAME, RetryPolicy
from localmoe.hub.types import HubAccess, RemoteFile
from localmoe.hub.verify import PIECE_BYTES, Stamps, pieces_path, read_pieces

REPO, NAME = "org/tiny-GGUF", "tiny.Q4_K_M.gguf"
CONTENT = b"GGUF" + random.Random(1).randbytes(20 * PIECE_BYTES + 4321)
OTHER = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
QUICK = RetryPolicy(tries=4, first_wait_s=0.01, longest_wait_s=0.03)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("content") / NAME
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def server(content: Path) -> Iterator[StandInHub]:
    with StandInHub() as server:
        server.add_repo(REPO, {NAME: content})
        yield server


@pytest.fixture
def access(server: StandInHub, tmp_path: Path) -> HubAccess:
    folders = (tmp_path / name for name in ("hub", "headers", "stamps"))
    return HubAccess(server.endpoint, *folders)


@pytest.fixture
def hub(access: HubAccess) -> Hub:
    return Hub(access, stall_s=0.4, pauses_s=(0.01,))


@pytest.fixture
def file(hub: Hub) -> RemoteFile:
    (file,) = hub.repository(REPO).files
    return file


def pull(hub: Hub, file: RemoteFile, said: list[str] | None = None, **more: object) -> Path:
    notice = None if said is None else said.append
    (path,) = download(hub, [file], on_notice=notice, patience=QUICK, **more)  # type: ignore[arg-type]
    return path


def in_blobs(hub: Hub, file: RemoteFile) -> list[str]:
    folder = hub.blob_path(file).parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def leave_unfinished(hub: Hub, file: RemoteFile, n_pieces: int, etag: str | None = None) -> None:
    """What a run leaves that was killed after so many pieces."""
    partial = Partial(hub.blob_path(file), file)
    partial.agree(etag or f'"{file.sha256}"')
    for i in range(n_pieces):
        partial.write(i, memoryview(CONTENT)[i * PIECE_BYTES : (i + 1) * PIECE_BYTES])
    partial.close()


def threads_left() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == THREAD_NAME]


def first(n: int, fault: Fault) -> Callable[[RequestRecord], Fault | None]:
    """`fault` for the first n requests for bytes."""
    left = iter(range(n))
    return lambda r: fault if r.is_bytes and next(left, None) is not None else None


def every(fault: Fault) -> Callable[[RequestRecord], Fault | None]:
    return lambda request: fault if request.is_bytes else None


def test_a_file_arrives_once_and_where_other_tools_look(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    from huggingface_hub import try_to_load_from_cache

    path = pull(hub, file)
    assert path.read_bytes() == CONTENT
    assert server.bytes_sent() == len(CONTENT)
    assert in_blobs(hub, file) == [file.sha256]
    assert try_to_load_from_cache(REPO, NAME, cache_dir=hub.access.cache) == str(path)
    assert Stamps(hub.access.stamps).holds(path, file.sha256)
    assert read_pieces(hub.access.stamps, file.sha256 or "", len(CONTENT))
    assert pull(hub, file) == path
    assert server.bytes_sent() == len(CONTENT)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after=0),
        Fault(drop_after=1_500_000),
        Fault(drop_after=1_500_000, reset=True),
        Fault(stall_after=1_500_000, stall_s=2),
        Fault(stall_after=0, stall_s=2),
        Fault(status=429, retry_after="0"),
        Fault(status=500),
        Fault(status=503),
    ],
)
def test_a_bad_line_costs_next_to_nothing(
    server: StandInHub, hub: Hub, file: RemoteFile, fault: Fault
) -> None:
    server.fault = first(4, fault)
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() <= len(CONTENT) + (8 << 20)
    assert in_blobs(hub, file) == [file.sha256]


def test_what_a_server_asks_to_wait_is_waited() -> None:
    patience = RetryPolicy(first_wait_s=1, longest_wait_s=8, longest_obeyed_s=100)
    assert 0.5 <= patience.wait_s(1, None) <= 1
    assert 4 <= patience.wait_s(9, None) <= 8
    assert patience.wait_s(1, 30) == 30
    assert patience.wait_s(1, 1e9) == 100


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    server.fault = first(1, Fault(status=429, retry_after="1"))
    pull(hub, file, connections=1)
    refused, *others = [request.at for request in server.requests if request.is_bytes]
    assert others[0] - refused >= 1


def test_bytes_from_another_host(content: Path, tmp_path: Path) -> None:
    with StandInHub(cdn=True) as server:
        server.add_repo(REPO, {NAME: content})
        folders = (tmp_path / name for name in ("hub", "headers", "stamps"))
        hub = Hub(HubAccess(server.endpoint, *folders))
        (file,) = hub.repository(REPO).files
        server.fault = first(3, Fault(drop_after=2_000_000))
        assert pull(hub, file).read_bytes() == CONTENT


@pytest.mark.parametrize("n_drops", [0, 2])
def test_a_server_without_ranges_sends_it_in_one_stream(
    server: StandInHub, hub: Hub, file: RemoteFile, n_drops: int
) -> None:
    leave_unfinished(hub, file, 3)
    drops = first(n_drops, Fault(ignore_range=True, drop_after=9_000_000))
    server.fault = lambda r: drops(r) or every(Fault(ignore_range=True))(r)
    assert pull(hub, file).read_bytes() == CONTENT
    assert in_blobs(hub, file) == [file.sha256]


def test_a_server_without_ranges_that_always_drops_is_given_up(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    server.fault = every(Fault(ignore_range=True, drop_after=5_000_000))
    with pytest.raises(DownloadError, match=r"Gave up after 4 tries; 4\.0 MiB of 20\.0 MiB"):
        pull(hub, file)


def test_patience_ends_in_a_sentence_and_the_next_call_goes_on(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    leave_unfinished(hub, file, 12)
    seen: list[DownloadProgress] = []
    server.fault = every(Fault(status=503))
    slower = RetryPolicy(tries=4, first_wait_s=0.1)
    with pytest.raises(DownloadError) as refused:
        download(hub, [file], on_progress=seen.append, patience=slower)
    assert seen[-1].trouble == "The Hub is busy (HTTP 503)."
    assert "Gave up after 4 tries; 12.0 MiB of 20.0 MiB" in refused.value.message
    assert "same command goes on" in refused.value.hint
    server.fault = None
    before = server.bytes_sent()
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() - before < len(CONTENT) - 12 * PIECE_BYTES + 100  # a late "503"


def test_fewer_connections_do_where_a_server_takes_no_more(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    """Each connection would try four times: at most three of them can use these up."""
    turns = iter([None, *[Fault(status=429)] * 12])
    server.fault = lambda r: next(turns, None) if r.is_bytes else None
    assert pull(hub, file).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "said"),
    [(Fault(html=True), "web page"), (Fault(lfs_pointer=True), "Git LFS pointer")],
)
def test_what_is_not_the_file_is_refused(
    server: StandInHub, hub: Hub, file: RemoteFile, fault: Fault, said: str
) -> None:
    leave_unfinished(hub, file, 2)
    server.fault = every(fault)
    with pytest.raises(DownloadError, match=said) as refused:
        pull(hub, file)
    assert refused.value.exit_code == 4
    server.fault = None
    assert pull(hub, file).read_bytes() == CONTENT


def test_wrong_bytes_are_never_taken(server: StandInHub, hub: Hub, file: RemoteFile) -> None:
    said: list[str] = []
    server.fault = every(Fault(wrong_bytes=True))
    with pytest.raises(DownloadError, match="arrived with the sha256"):
        pull(hub, file, said)
    assert in_blobs(hub, file) == []
    assert server.bytes_sent() == 2 * len(CONTENT)
    assert len(said) == 1


def test_bytes_that_were_wrong_once_are_fetched_again(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    said: list[str] = []
    server.fault = first(1, Fault(wrong_bytes=True))
    assert pull(hub, file, said).read_bytes() == CONTENT
    assert "starting over" in said[0]


def test_damage_to_a_partial_costs_its_piece(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    leave_unfinished(hub, file, 15)
    with (hub.blob_path(file).parent / f"{file.sha256}{PARTIAL_SUFFIX}").open("r+b") as partial:
        partial.seek(7 * PIECE_BYTES)
        partial.write(b"damage")
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() == len(CONTENT) - 14 * PIECE_BYTES


def test_a_file_that_was_swapped_is_refused_until_it_is_back(
    server: StandInHub, hub: Hub, file: RemoteFile, content: Path
) -> None:
    leave_unfinished(hub, file, 5)
    server.replace(REPO, NAME, OTHER)
    with pytest.raises(DownloadError, match="changed on the server"):
        pull(hub, file)
    server.replace(REPO, NAME, content)
    before = server.bytes_sent()
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() - before == len(CONTENT) - 5 * PIECE_BYTES


def test_an_etag_of_before_costs_one_start_over(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    said: list[str] = []
    leave_unfinished(hub, file, 5, etag='"of another server"')
    assert pull(hub, file, said).read_bytes() == CONTENT
    assert said == [f"{NAME} changed on the server while it was downloaded; starting over."]


def test_a_swap_in_the_middle_of_a_download(
    server: StandInHub, hub: Hub, file: RemoteFile, content: Path
) -> None:
    """Swapped while it runs, and back while the commit is asked: it starts over, once."""

    def fault(request: RequestRecord) -> Fault | None:
        if not request.is_bytes:
            server.replace(REPO, NAME, content)
        elif server.bytes_sent() > 4_000_000 and not swapped:
            swapped.append(True)
            server.replace(REPO, NAME, OTHER)
        return Fault(drop_after=3_000_000) if request.is_bytes and not swapped else None

    swapped: list[bool] = []
    said: list[str] = []
    server.fault = fault
    assert pull(hub, file, said).read_bytes() == CONTENT
    assert swapped
    assert "starting over" in said[0]


def test_an_interrupt_keeps_what_came_and_leaves_no_thread(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    def interrupt(progress: DownloadProgress) -> None:
        if progress.n_bytes_done > 4 * PIECE_BYTES:
            raise KeyboardInterrupt

    server.fault = every(Fault(bytes_per_s=10e6))
    with pytest.raises(KeyboardInterrupt):
        pull(hub, file, on_progress=interrupt)
    assert threads_left() == []
    assert in_blobs(hub, file) == [f"{file.sha256}{s}" for s in (JOURNAL_SUFFIX, PARTIAL_SUFFIX)]
    server.fault = None
    sent = server.bytes_sent()
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() - sent <= len(CONTENT) - 4 * PIECE_BYTES


def test_an_interrupt_does_not_wait_for_a_line_that_stalls(
    server: StandInHub, access: HubAccess, file: RemoteFile
) -> None:
    def interrupt(progress: DownloadProgress) -> None:
        if server.bytes_sent() >= 4_000_000:
            raise KeyboardInterrupt

    server.fault = every(Fault(stall_after=1_000_000, stall_s=600))
    with pytest.raises(KeyboardInterrupt):
        pull(Hub(access), file, on_progress=interrupt)
    assert threads_left() == []


def test_progress_counts_what_was_here_before(hub: Hub, file: RemoteFile) -> None:
    seen: list[DownloadProgress] = []
    leave_unfinished(hub, file, 10)
    pull(hub, file, on_progress=seen.append)
    assert seen[0].n_bytes_done >= 10 * PIECE_BYTES
    last = seen[-1]
    assert (last.n_bytes_done, last.n_bytes_total) == (len(CONTENT), len(CONTENT))
    assert (last.n_files_done, last.n_files, last.seconds_left) == (1, 1, 0.0)


# --- what is there already


def test_another_tools_file_is_read_and_used(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    blob = hub.blob_path(file)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    leave_unfinished(hub, file, 3)
    path = pull(hub, file)
    assert path.read_bytes() == CONTENT
    assert server.bytes_sent() == 0
    assert in_blobs(hub, file) == [file.sha256]
    assert Stamps(hub.access.stamps).holds(path, file.sha256)


def test_another_tools_damaged_file_is_replaced(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    said: list[str] = []
    blob = hub.blob_path(file)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(OTHER)
    assert pull(hub, file, said).read_bytes() == CONTENT
    assert said[0].endswith("Fetching 20.0 MiB again.")
    assert server.bytes_sent() == len(CONTENT)


def test_offline_a_file_is_used_or_missed(hub: Hub, file: RemoteFile) -> None:
    offline = Hub(replace(hub.access, offline=True))
    with pytest.raises(DownloadError, match="offline"):
        pull(offline, file)
    path = pull(hub, file)
    assert pull(offline, file) == path


def test_partials_of_what_stood_under_the_name_before_go(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    older = replace(file, sha256="1" * 64)
    another = replace(file, sha256="2" * 64, name="other.gguf")
    leave_unfinished(hub, older, 2)
    leave_unfinished(hub, another, 2)
    foreign = hub.blob_path(file).with_name(f"{'3' * 64}.0a1b2c3d.incomplete")
    foreign.write_bytes(b"of huggingface_hub")
    pull(hub, file)
    kept = [f"{another.sha256}{s}" for s in (JOURNAL_SUFFIX, PARTIAL_SUFFIX)]
    assert in_blobs(hub, file) == sorted([str(file.sha256), *kept, foreign.name])


# --- repair


def test_repair_fetches_the_damaged_pieces_alone(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    path = pull(hub, file)
    with path.open("r+b") as damaged:
        for at in (3 * PIECE_BYTES + 5, 9 * PIECE_BYTES - 1):
            damaged.seek(at)
            damaged.write(bytes([CONTENT[at] ^ 1]))
    with path.open("rb") as mapped:
        before = server.bytes_sent()
        assert repair(hub, file, patience=QUICK) == path
        assert server.bytes_sent() - before == 2 * PIECE_BYTES
        assert mapped.read() != CONTENT  # who had it open keeps it as it was
    assert path.read_bytes() == CONTENT
    assert in_blobs(hub, file) == [file.sha256]


def test_repair_of_a_file_that_lost_its_end(server: StandInHub, hub: Hub, file: RemoteFile) -> None:
    path = pull(hub, file)
    os.truncate(path, 18 * PIECE_BYTES)
    before = server.bytes_sent()
    assert repair(hub, file, patience=QUICK).read_bytes() == CONTENT
    assert server.bytes_sent() - before == len(CONTENT) - 18 * PIECE_BYTES


def test_repair_without_checksums_fetches_all(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    path = pull(hub, file)
    pieces_path(hub.access.stamps, file.sha256 or "").unlink()
    path.resolve().write_bytes(OTHER)
    assert repair(hub, file, patience=QUICK).read_bytes() == CONTENT
    assert server.bytes_sent() == 2 * len(CONTENT)


def test_repair_of_what_is_right_fetches_nothing(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    path = pull(hub, file)
    before = server.bytes_sent()
    assert repair(hub, file, patience=QUICK) == path
    assert server.bytes_sent() == before


# --- the disk


def test_no_room_is_said_before_anything_is_fetched(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    with pytest.raises(
        DownloadError, match=r"needs 1073741824\.0 GiB of disk; [\d.]+ GiB are free"
    ):
        pull(hub, replace(file, n_bytes=2**60))
    assert server.bytes_sent() == 0


CHILD = """
import json, resource, sys
from pathlib import Path
from localmoe.errors import DownloadError
from localmoe.hub.transfer import RetryPolicy
from localmoe.hub.download import download
from localmoe.hub.client import Hub
from localmoe.hub.types import HubAccess, RemoteFile

job = json.loads(sys.argv[1])
if job["limit"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
access = HubAccess(job["endpoint"], *(Path(folder) for folder in job["folders"]))
quick = RetryPolicy(tries=4, first_wait_s=0.01, longest_wait_s=0.03)
try:
    download(Hub(access), [RemoteFile(**job["file"])], on_notice=print, patience=quick)
except DownloadError as error:
    print(error)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_child(hub: Hub, file: RemoteFile, limit: int = 0) -> subprocess.Popen[str]:
    access = hub.access
    names = ("repo", "commit", "name", "n_bytes", "sha256")
    job = {
        "endpoint": access.endpoint,
        "folders": [str(folder) for folder in (access.cache, access.headers, access.stamps)],
        "file": {name: getattr(file, name) for name in names},
        "limit": limit,
    }
    command = [sys.executable, "-c", CHILD, json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_file_system_that_takes_no_such_file(hub: Hub, file: RemoteFile) -> None:
    child = start_child(hub, file, limit=12 * PIECE_BYTES)
    said = child.communicate()[0]
    assert child.returncode == 4
    assert f"takes no file as large as {NAME} (20.0 MiB)" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_came(
    server: StandInHub, access: HubAccess, file: RemoteFile, small_disk: Path
) -> None:
    def fill_up(progress: DownloadProgress) -> None:
        if progress.n_bytes_done > 4 * PIECE_BYTES and not ballast.exists():
            with suppress(OSError), ballast.open("wb", buffering=0) as full:
                while full.write(bytes(1 << 16)):
                    pass

    ballast = small_disk / "ballast"
    hub = Hub(replace(access, cache=small_disk / "hub"))
    server.fault = every(Fault(bytes_per_s=10e6))
    with pytest.raises(DownloadError, match=r"disk is full; [\d.]+ MiB of 20\.0 MiB of") as refused:
        pull(hub, file, on_progress=fill_up)
    assert "localmoe rm" in refused.value.hint
    assert threads_left() == []
    ballast.unlink()
    server.fault = None
    before = server.bytes_sent()
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() - before <= len(CONTENT) - 4 * PIECE_BYTES


def test_a_cache_that_may_not_be_written_to(hub: Hub, file: RemoteFile, tmp_path: Path) -> None:
    hub.access.cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="can't be written to") as refused:
        pull(hub, file)
    assert refused.value.exit_code == 4


def test_ctrl_c_and_kill_leave_what_the_next_one_takes(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    server.fault = every(Fault(bytes_per_s=20e6))
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        goal = server.bytes_sent() + 7 * PIECE_BYTES
        child = start_child(hub, file)
        while server.bytes_sent() < goal:
            time.sleep(0.005)
        child.send_signal(number)
        child.communicate(timeout=10)
        assert child.returncode == code
    server.fault = None
    assert pull(hub, file).read_bytes() == CONTENT
    assert server.bytes_sent() <= len(CONTENT) + 2 * BUDGET_BYTES


def test_of_two_at_once_one_works_and_one_waits(
    server: StandInHub, hub: Hub, file: RemoteFile
) -> None:
    server.fault = every(Fault(bytes_per_s=20e6))
    children = [start_child(hub, file) for _ in range(2)]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(said) == ["", f"Another program is downloading {NAME}; waiting for it.\n"]
    assert server.bytes_sent() == len(CONTENT)
    assert hub.blob_path(file).read_bytes() == CONTENT


def test_interruptions_at_random_moments(tmp_path: Path) -> None:
    """A short one of scripts/soak/download.py."""
    report = Soak(tmp_path, 40_000_000, seed=1, bytes_per_s=100e6).run(20)
    assert sum(report.interruptions.values()) == 20
    assert report.n_finished > 0
    assert report.n_wrong == 0
    assert report.orphans == []
    assert max(report.again_bytes) <= BUDGET_BYTES
