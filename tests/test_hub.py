"""The Hub: facts, bytes, refusals and the cache, against a real server with the real client."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from standin_hub import TOKEN, Fault, StandInHub
from standin_proxy import StandInProxy

from localmoe import __version__
from localmoe.config.environment import hub_access, proxy_settings
from localmoe.errors import DownloadError, LocalMoeError, UsageError
from localmoe.hub.client import Hub, check_name, check_repo, file_of, link_to_blob
from localmoe.hub.download import download
from localmoe.hub.http import RemoteBytes, bypasses_proxy
from localmoe.hub.types import HubAccess, RemoteFile, RemoteRepo, TransferFault, retry_after_s

REPO = "org/name-GGUF"
CONTENT = b"GGUF" + os.urandom(300_000)
FILES = {"name.Q4_K_M.gguf": CONTENT, "deep/name.Q8_0.gguf": b"GGUF" + bytes(range(256))}
EVIL = [
    "../x.gguf",
    "/etc/x.gguf",
    "a/../../x.gguf",
    "a\\x.gguf",
    "C:x.gguf",
    "a//x.gguf",
    "x\x1b[2J",
    "x\u3000y.gguf",
]


@pytest.fixture(autouse=True)
def no_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[StandInHub]:
    with StandInHub() as server:
        server.add_repo(REPO, FILES)
        yield server


@pytest.fixture
def cdn_server() -> Iterator[StandInHub]:
    with StandInHub(cdn=True) as server:
        server.add_repo(REPO, FILES)
        yield server


def hub_at(endpoint: str, folder: Path, *, token: str | None = None, offline: bool = False) -> Hub:
    access = HubAccess(
        endpoint, folder / "hub", folder / "headers", folder / "stamps", token, offline
    )
    return Hub(access, stall_s=0.3, pauses_s=(0.01,))


def the_file(hub: Hub) -> RemoteFile:
    return file_of(hub.repository(REPO), "name.Q4_K_M.gguf")


def all_of(remote: RemoteBytes) -> bytes:
    buffer, read = memoryview(bytearray(7_000)), bytearray()
    with remote:
        while n := remote.read_into(buffer):
            read += buffer[:n]
    return bytes(read)


def refused(call: object, *arguments: object) -> LocalMoeError:
    """The refusal of a call: one line that can be shown."""
    with pytest.raises(LocalMoeError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 250
    return caught.value


# --- facts


def test_a_repository_has_its_files_with_size_and_hash(server: StandInHub, tmp_path: Path) -> None:
    repo = hub_at(server.endpoint, tmp_path).repository(REPO)
    commit = server.repos[REPO].refs["main"]
    assert repo == RemoteRepo(
        REPO,
        commit,
        tuple(
            RemoteFile(REPO, commit, name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in FILES.items()
        ),
    )
    assert repo.files[1].base_name == "name.Q8_0.gguf"


def test_a_file_of_git_itself_has_no_hash(server: StandInHub, tmp_path: Path) -> None:
    server.add_repo("org/small", {"README.md": b"hello"}, lfs=False)
    hub = hub_at(server.endpoint, tmp_path)
    (file,) = hub.repository("org/small").files
    assert (file.n_bytes, file.sha256) == (5, None)
    assert "can't be verified" in refused(hub.blob_path, file).message


def test_a_commit_takes_one_request(server: StandInHub, tmp_path: Path) -> None:
    old = server.repos[REPO].refs["main"]
    new = server.add_repo(REPO, {"other.gguf": b"GGUF"})
    hub = hub_at(server.endpoint, tmp_path)
    assert [file.name for file in hub.repository(REPO, old).files] == list(FILES)
    assert len(server.requests) == 1
    assert hub.repository(REPO).commit == new


def test_a_repository_that_moved_is_found(server: StandInHub, tmp_path: Path) -> None:
    server.moved["org/old"] = REPO
    hub = hub_at(server.endpoint, tmp_path, token=TOKEN)
    file = file_of(hub.repository("org/old"), "name.Q4_K_M.gguf")
    assert all_of(hub.open(file, 0, None)) == CONTENT
    assert {r.headers.get("authorization") for r in server.requests} == {f"Bearer {TOKEN}"}


def test_http_is_imported_for_the_first_request() -> None:
    """What is installed is found without; urllib3 and huggingface_hub take a while."""
    heavy = "{'urllib3', 'http.client', 'ssl', 'httpx', 'httpx2', 'huggingface_hub'}"
    used = "localmoe.hub.remote_header, localmoe.hub.installed, localmoe.config.environment"
    code = f"import sys, {used}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_client_says_who_it_is(cdn_server: StandInHub, tmp_path: Path) -> None:
    """And it asks for what is needed alone, and for nothing of its own."""
    hub = hub_at(cdn_server.endpoint, tmp_path)
    assert all_of(hub.open(the_file(hub), 0, 10)) == CONTENT[:10]
    said = {r.headers["user-agent"] for r in cdn_server.requests}
    assert said == {f"localmoe/{__version__}"}
    paths = [r.path.split("?")[0].split("/")[1] for r in cdn_server.requests]
    assert paths == ["api", "org", "blobs"]


# --- bytes


@pytest.mark.parametrize("at", ["server", "cdn_server"])
def test_ranges_are_the_bytes_asked_for(
    at: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: StandInHub = request.getfixturevalue(at)
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    with hub.open(file, 1000, 250_000) as remote:
        assert (remote.status, remote.start, remote.total_bytes) == (206, 1000, len(CONTENT))
        etag = remote.etag
        assert all_of(remote) == CONTENT[1000:250_000]
    assert all_of(hub.open(file, 299_000, None, etag=etag)) == CONTENT[299_000:]
    assert all_of(hub.open(file, 299_000, 999_999, etag=etag)) == CONTENT[299_000:]
    assert all_of(hub.open(file, 0, 1)) == b"G"


def test_parts_come_at_once(cdn_server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(cdn_server.endpoint, tmp_path)
    file = the_file(hub)
    starts = range(0, len(CONTENT), 20_000)
    with ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda start: all_of(hub.open(file, start, start + 20_000)), starts)
    assert b"".join(parts) == CONTENT


@pytest.mark.parametrize("at", ["server", "cdn_server"])
def test_a_swapped_file_comes_whole(
    at: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: StandInHub = request.getfixturevalue(at)
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    with hub.open(file, 0, 10) as remote:
        etag = remote.etag
    server.replace(REPO, file.name, b"GGUF other")
    with hub.open(file, 6, 10, etag=etag) as remote:
        assert (remote.status, remote.start, remote.total_bytes) == (200, 0, 10)
        assert remote.etag != etag
        assert all_of(remote) == b"GGUF other"


def test_a_server_without_ranges_sends_all(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.fault = lambda _: Fault(ignore_range=True)
    with hub.open(file, 1000, 2000) as remote:
        assert (remote.status, remote.start) == (200, 0)
        assert all_of(remote) == CONTENT


@pytest.mark.parametrize(
    ("fault", "kind", "n_bytes"),
    [
        (Fault(drop_after=0), "dropped", 0),
        (Fault(drop_after=100_000), "dropped", 100_000),
        (Fault(drop_after=100_000, reset=True), "dropped", None),
        (Fault(stall_after=100_000, stall_s=20), "stalled", 100_000),
    ],
)
def test_a_line_that_fails_is_told(
    fault: Fault, kind: str, n_bytes: int | None, server: StandInHub, tmp_path: Path
) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.fault = lambda _: fault
    buffer, n_read = memoryview(bytearray(1_000)), 0
    with pytest.raises(TransferFault) as caught, hub.open(file, 0, None) as remote:  # noqa: PT012
        while n := remote.read_into(buffer):
            n_read += n
    assert caught.value.kind == kind
    if n_bytes is not None:  # a read that nothing more comes for is lost
        assert 0 <= n_bytes - n_read < (1_000 if kind == "stalled" else 1)
    server.fault = None
    assert all_of(hub.open(file, n_read, None)) == CONTENT[n_read:]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_told(status: int, server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.fault = lambda _: Fault(status=status, retry_after="7")
    error = refused(hub.open, file, 0, None)
    assert isinstance(error, TransferFault)
    assert (error.kind, error.retry_after_s) == ("busy", 7.0)


def test_how_long_to_wait() -> None:
    assert retry_after_s({}) is None
    assert retry_after_s({"retry-after": "soon"}) is None
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after_s({"ratelimit": '"api";r=0;t=55'}) == 55


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(html=True), "A web page came in place of name.Q4_K_M.gguf"),
        (Fault(html=True, html_type="application/octet-stream"), "A web page came in place of"),
        (Fault(lfs_pointer=True), "A Git LFS pointer came in place of name.Q4_K_M.gguf."),
    ],
)
def test_what_is_no_model_is_recognised(
    fault: Fault, message: str, server: StandInHub, tmp_path: Path
) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.fault = lambda _: fault
    error = refused(hub.open, file, 0, 100)
    assert type(error) is DownloadError
    assert message in error.message


def test_a_connection_that_was_closed_while_idle_is_made_again(
    server: StandInHub, tmp_path: Path
) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    for _ in range(3):
        assert all_of(hub.open(file, 0, 10)) == CONTENT[:10]
        server.close_connections()


@pytest.mark.parametrize("by", ["no proxy", "proxy"])
def test_a_connection_that_ends_as_it_is_used_again_is_made_again(
    by: str, server: StandInHub, tmp_path: Path
) -> None:
    """The server closed it, and its word of that had not come yet."""
    variables = {"http_proxy": server.endpoint} if by == "proxy" else {}
    hub = hub_by(variables, server.endpoint, tmp_path)
    file = the_file(hub)
    server.fault = lambda r: Fault(hang_up=True) if r is server.requests[1] else None
    assert all_of(hub.open(file, 0, 10)) == CONTENT[:10]
    assert len(server.requests) == 3
    server.fault = lambda _: Fault(hang_up=True)
    error = refused(hub.open, file, 0, 10)
    assert isinstance(error, TransferFault)
    assert error.kind == "dropped"
    assert len(server.requests) == 5


def test_closing_wakes_the_reader(server: StandInHub, tmp_path: Path) -> None:
    hub = Hub(hub_at(server.endpoint, tmp_path).access)
    file = the_file(hub)
    server.fault = lambda _: Fault(stall_after=64, stall_s=20)
    remote = hub.open(file, 0, None)
    buffer = memoryview(bytearray(64))
    assert remote.read_into(buffer) == 64
    closing = threading.Timer(0.1, remote.close)
    closing.start()
    with pytest.raises(TransferFault):
        remote.read_into(buffer)
    closing.join()
    with pytest.raises(TransferFault):
        remote.read_into(buffer)


# --- the token


def test_the_token_goes_to_the_hub_alone(cdn_server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(cdn_server.endpoint, tmp_path, token=TOKEN)
    assert all_of(hub.open(the_file(hub), 0, 10)) == CONTENT[:10]
    by_host = {(r.host, r.headers.get("authorization")) for r in cdn_server.requests}
    assert by_host == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}
    assert {r.status for r in cdn_server.requests} == {200, 206, 302}


def test_the_token_stays_home_on_another_port(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path, token=TOKEN)
    file = the_file(hub)
    with StandInHub() as other:
        server.redirect_to = f"{other.endpoint}/somewhere"
        refused(hub.open, file, 0, None)
        assert [r.headers.get("authorization") for r in other.requests] == [None]


def test_no_token_that_lies_about_is_taken(
    server: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = hub_at(server.endpoint, tmp_path)
    assert all_of(hub.open(the_file(hub), 0, 10)) == CONTENT[:10]
    assert {r.headers.get("authorization") for r in server.requests} == {None}


def test_no_error_shows_the_token(server: StandInHub, tmp_path: Path) -> None:
    server.add_repo("org/gated", FILES, gated=True)
    hub = hub_at(server.endpoint, tmp_path, token=TOKEN)
    wrong = hub_at(server.endpoint, tmp_path, token="hf_wrongToken")
    file = file_of(hub.repository("org/gated"), "name.Q4_K_M.gguf")
    errors = [refused(hub.open, file, 0, 1), refused(wrong.repository, REPO)]
    server.fault = lambda _: Fault(status=500)
    errors += [refused(hub.open, file, 0, 1), refused(hub.repository, REPO)]
    for error in errors:
        assert "Token" not in f"{error} {error!r} {error.__cause__!r}"


@pytest.mark.parametrize("token", ["hf_sécretToken", "hf_a\nToken", "hf_a Token"])
def test_what_is_no_token_is_not_sent(token: str, server: StandInHub, tmp_path: Path) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_at(server.endpoint, tmp_path, token=token)
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert type(error) is DownloadError
        assert token[-5:] not in f"{error!r}"
    assert len(server.requests) == 1


# --- refusals


def test_a_wrong_token(server: StandInHub, tmp_path: Path) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_at(server.endpoint, tmp_path, token="hf_wrong")
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert type(error) is DownloadError
        assert error.message == "The Hub refuses the token: it is wrong or has expired."
        assert "hf auth login" in error.hint


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository(token: str | None, server: StandInHub, tmp_path: Path) -> None:
    server.add_repo("org/gated", FILES, gated=True)
    hub = hub_at(server.endpoint, tmp_path, token=token)
    file = file_of(hub.repository("org/gated"), "name.Q4_K_M.gguf")
    error = refused(hub.open, file, 0, 1)
    assert type(error) is DownloadError
    assert error.message.startswith("org/gated is gated")
    assert error.hint.startswith("Open https://huggingface.co/org/gated, accept")
    assert error.hint.endswith("hf auth login")


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("asked", ["org/nmae-GGUF", "organ/name-GGUF"])
def test_an_unknown_repository(
    asked: str, token: str | None, server: StandInHub, tmp_path: Path
) -> None:
    error = refused(hub_at(server.endpoint, tmp_path, token=token).repository, asked)
    assert type(error) is UsageError
    assert error.message == f"The Hub has no model {asked} that you may see."
    assert error.hint.startswith(f"Did you mean {REPO}?")
    assert ("hf auth login" in error.hint) is (token is None)


def test_the_names_that_are_near_are_others(server: StandInHub, tmp_path: Path) -> None:
    """A private one may be found by the search and not be shown."""
    server.add_repo("org/name-GGUF2", FILES, private=True)
    error = refused(hub_at(server.endpoint, tmp_path).repository, "org/name-GGUF2")
    assert "Did you mean org/name-GGUF?" in error.hint


def test_an_unknown_repository_without_a_search(server: StandInHub, tmp_path: Path) -> None:
    server.fault = lambda r: Fault(status=500) if "search" in r.path else None
    error = refused(hub_at(server.endpoint, tmp_path, token=TOKEN).repository, "no/such")
    assert error.hint == "Check the name on the Hub."


def test_a_private_repository_is_seen_with_the_token(server: StandInHub, tmp_path: Path) -> None:
    server.add_repo("org/private", FILES, private=True)
    assert hub_at(server.endpoint, tmp_path, token=TOKEN).repository("org/private").files
    assert (
        "hf auth login" in refused(hub_at(server.endpoint, tmp_path).repository, "org/private").hint
    )


def test_an_unknown_revision(server: StandInHub, tmp_path: Path) -> None:
    error = refused(hub_at(server.endpoint, tmp_path).repository, REPO, "v9")
    assert type(error) is UsageError
    assert error.message == f"{REPO} has no revision v9."


def test_an_unknown_file_and_those_near(server: StandInHub, tmp_path: Path) -> None:
    repo = hub_at(server.endpoint, tmp_path).repository(REPO)
    error = refused(file_of, repo, "name.q4_k_s.gguf")
    assert type(error) is UsageError
    assert error.hint.startswith("Did you mean name.Q4_K_M.gguf")
    assert refused(file_of, repo, "zzz").hint == f"See: localmoe show {REPO}"


def test_a_file_that_is_gone(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.repos[REPO].commits[file.commit] = {}
    assert refused(hub.open, file, 0, 1).message.endswith("has changed on the Hub or is gone.")


def test_a_file_that_became_shorter(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.replace(REPO, file.name, b"GGUF")
    assert refused(hub.open, file, 100, 200).message.endswith("has changed on the Hub or is gone.")


@pytest.mark.parametrize("name", EVIL)
def test_a_name_that_leads_out_is_left_out(name: str, server: StandInHub, tmp_path: Path) -> None:
    server.add_repo("org/evil", {name: b"GGUF", "good.gguf": b"GGUF"})
    files = hub_at(server.endpoint, tmp_path).repository("org/evil").files
    assert [file.name for file in files] == ["good.gguf"]
    assert type(refused(check_name, "org/evil", name)) is DownloadError


def test_usual_names_are_allowed() -> None:
    for name in ("a.gguf", "Q4_K_M/a-00001-of-00002.gguf", ".gitattributes", "模型..v1 (2).gguf"):
        check_name(REPO, name)


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "../b", "a/..", "a/b--c", "a/b.git", "a/\x1b", ""]
)
def test_what_is_no_repository_is_refused(repo: str) -> None:
    assert type(refused(check_repo, repo)) is UsageError


@pytest.mark.parametrize("revision", ["../../x", "a\nb", "/x", ""])
def test_what_is_no_revision_is_refused(revision: str, tmp_path: Path) -> None:
    hub = hub_at("http://127.0.0.1:9", tmp_path, offline=True)
    assert type(refused(hub.repository, REPO, revision)) is UsageError


def test_no_server(server: StandInHub, tmp_path: Path) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_at("http://127.0.0.1:9", tmp_path)  # the port of `discard`
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert isinstance(error, TransferFault)
        assert error.message == "The Hub can't be reached (127.0.0.1: connection refused)."
        assert "localmoe list --installed" in error.hint


def test_no_name_resolution(server: StandInHub, tmp_path: Path) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_at("http://hub.invalid", tmp_path)
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert error.message.startswith("The Hub can't be reached (hub.invalid: its name can't be")
        assert error.exit_code == 4


def test_a_page_in_place_of_the_api(server: StandInHub, tmp_path: Path) -> None:
    server.fault = lambda _: Fault(html=True)
    error = refused(hub_at(server.endpoint, tmp_path).repository, REPO)
    assert error.message.endswith("is not the Hub: a sign-in page of the network?")


def test_where_nobody_is_there_no_time_is_spent_on_further_tries(tmp_path: Path) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://hub.invalid"):
        hub = hub_at(endpoint, tmp_path)
        tries: list[int] = []

        def attempt(hub: Hub = hub, tries: list[int] = tries) -> None:
            tries.append(1)
            hub.open(RemoteFile(REPO, "0" * 40, "a.gguf", 100, None), 0, 1)

        with pytest.raises(TransferFault):
            hub.retried(attempt)
        assert len(tries) == 1


def test_a_busy_api_is_asked_again(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    server.fault = lambda r: Fault(status=503) if r is server.requests[0] else None
    assert hub.repository(REPO).files
    server.fault = lambda _: Fault(status=429, retry_after="40")
    error = refused(hub.repository, REPO)
    assert (error.message, error.hint) == ("The Hub is busy (HTTP 429).", "Try again in 40 s.")


def test_an_expired_link_is_worth_another_try(cdn_server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(cdn_server.endpoint, tmp_path)
    file = the_file(hub)
    cdn_server.fault = lambda r: Fault(status=403) if r.host == "cdn" else None
    error = refused(hub.open, file, 0, 1)
    assert isinstance(error, TransferFault)
    assert error.kind == "busy"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://a/b", "//", "http://a:b/"])
def test_a_redirect_to_elsewhere_is_refused(
    target: str, server: StandInHub, tmp_path: Path
) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.redirect_to = target
    assert isinstance(refused(hub.open, file, 0, 1), DownloadError)


def test_redirects_end(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    server.redirect_to = f"/{REPO}/resolve/main/{file.name}"
    assert refused(hub.open, file, 0, 1).message == "The Hub redirects more than 5 times."


# --- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that nobody trusts, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def tls_server(tls: tuple[Path, Path]) -> Iterator[StandInHub]:
    with StandInHub(tls=tls) as server:
        server.add_repo(REPO, FILES)
        yield server


def test_an_authority_of_ones_own_is_trusted(
    tls_server: StandInHub,
    tls: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
    monkeypatch.setenv("HF_ENDPOINT", tls_server.endpoint)
    hub = Hub(hub_access())
    file = the_file(hub)
    assert all_of(hub.open(file, 1000, 250_000)) == CONTENT[1000:250_000]
    tls_server.moved["org/old"] = REPO
    old = RemoteFile("org/old", file.commit, file.name, file.n_bytes, file.sha256)
    assert all_of(hub.open(old, 0, 10)) == CONTENT[:10]
    with StandInHub() as plain:
        tls_server.redirect_to = f"{plain.endpoint}/x"
        error = refused(hub.open, file, 0, 1)
        assert error.message == "The Hub redirects from https to http: refused."
        assert plain.requests == []


def test_authorities_that_cannot_be_read(tls_server: StandInHub, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    hub = hub_by({}, tls_server.endpoint, tmp_path, ca_file=missing)
    error = refused(hub.repository, REPO)
    assert error.message == f"No certificate authorities can be read from {missing}."
    assert "SSL_CERT_FILE" in error.hint


def test_a_certificate_that_nobody_trusts(tls_server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(tls_server.endpoint, tmp_path, token=TOKEN)
    file = RemoteFile(REPO, "0" * 40, "name.Q4_K_M.gguf", 1, None)
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert type(error) is DownloadError
        assert error.message == "The certificate of 127.0.0.1 can't be verified."
        assert "SSL_CERT_FILE" in error.hint
    assert tls_server.requests == []


# --- proxies


def hub_by(proxies: dict[str, str], endpoint: str, folder: Path, **more: object) -> Hub:
    """A hub reached as these variables say."""
    access = HubAccess(
        endpoint, folder / "hub", folder / "headers", folder / "stamps",
        proxies=proxy_settings(proxies), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return Hub(access, stall_s=0.3, pauses_s=(0.01,))


@pytest.mark.parametrize("kind", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("login", ["", "me:se@cret"])
def test_questions_and_bytes_go_by_the_proxy(
    kind: str, login: str, server: StandInHub, tmp_path: Path
) -> None:
    name = "127.0.0.1" if kind == "socks5" else "hub.invalid"  # names are resolved here or there
    port = urlsplit(server.endpoint).port or 0
    with StandInProxy(kind.removesuffix("h"), login=login, hosts={"hub.invalid": port}) as proxy:
        named = login.replace("@", "%40") + "@" if login else ""
        url = f"{kind}://{named}{proxy.address}"
        hub = hub_by({"http_proxy": url}, f"http://{name}:{port}", tmp_path, token=TOKEN)
        assert all_of(hub.open(the_file(hub), 0, None)) == CONTENT
        assert set(proxy.targets) == {(name, port)}
    assert {r.headers["authorization"] for r in server.requests} == {f"Bearer {TOKEN}"}
    assert not any("proxy-authorization" in r.headers for r in server.requests)


@pytest.mark.parametrize("kind", ["http", "socks5", "https"])
def test_tls_goes_through_the_proxy(
    kind: str, tls_server: StandInHub, tls: tuple[Path, Path], tmp_path: Path
) -> None:
    with StandInProxy(kind.removesuffix("s") if kind == "https" else kind,
                      tls=tls if kind == "https" else None) as proxy:  # fmt: skip
        hub = hub_by({"ALL_PROXY": proxy.url}, tls_server.endpoint, tmp_path, ca_file=tls[0])
        assert all_of(hub.open(the_file(hub), 1000, None)) == CONTENT[1000:]
        assert set(proxy.targets) == {("127.0.0.1", urlsplit(tls_server.endpoint).port)}
        assert proxy.url.startswith(kind)


@pytest.mark.parametrize("kind", ["http", "socks5", "https"])
def test_closing_wakes_the_reader_behind_a_proxy(
    kind: str, tls_server: StandInHub, tls: tuple[Path, Path], tmp_path: Path
) -> None:
    """TLS within a proxy's TLS is no socket, and has no shutdown."""
    with StandInProxy("socks5" if kind == "socks5" else "http",
                      tls=tls if kind == "https" else None) as proxy:  # fmt: skip
        variables = {"https_proxy": proxy.url}
        access = hub_by(variables, tls_server.endpoint, tmp_path, ca_file=tls[0]).access
        hub = Hub(access, stall_s=20)
        file = the_file(hub)
        tls_server.fault = lambda _: Fault(stall_after=64, stall_s=20)
        remote = hub.open(file, 0, None)
        buffer = memoryview(bytearray(64))
        assert remote.read_into(buffer) == 64
        closing = threading.Timer(0.1, remote.close)
        closing.start()
        with pytest.raises(TransferFault) as caught:
            remote.read_into(buffer)
        assert caught.value.kind == "dropped"  # and not stalled: it was woken
        closing.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "127.0.0.1:9"])
def test_a_proxy_that_is_not_there_is_named_at_once(
    url: str, server: StandInHub, tmp_path: Path
) -> None:
    """The port of `discard`: nobody listens there."""
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_by({"ALL_PROXY": url}, server.endpoint, tmp_path)
    for call, *arguments in ((hub.repository, REPO), (hub.open, file, 0, 1)):
        error = refused(call, *arguments)
        assert isinstance(error, TransferFault)
        assert error.kind == "proxy"
        reason = "127.0.0.1 by the proxy 127.0.0.1:9: connection refused"
        assert error.message == f"The Hub can't be reached ({reason})."
        assert "NO_PROXY" in error.hint
    with pytest.raises(DownloadError, match="by the proxy 127.0.0.1:9: connection refused") as got:
        download(hub, [file])  # with the patience that a line is given, it would take 2 minutes
    assert "Gave up" not in got.value.message


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("http", 403, "the proxy refuses: HTTP 403"),
        ("http", 503, "the proxy refuses: HTTP 503"),
        ("socks5", 5, "the proxy refuses: 0x05: Connection refused"),
    ],
)
def test_a_proxy_that_refuses(
    kind: str, status: int, said: str, tmp_path: Path, server: StandInHub
) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    with StandInProxy(kind, refuses_with=status) as proxy:
        hub = hub_by({"https_proxy": proxy.url}, "https://127.0.0.1:9", tmp_path)
        assert said in refused(hub.open, file, 0, 1).message


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_login(scheme: str, server: StandInHub, tmp_path: Path) -> None:
    with StandInProxy(login="me:secret") as proxy:
        url = proxy.url.replace("//", "//me:wrong@")
        hub = hub_by({f"{scheme}_proxy": url}, f"{scheme}://127.0.0.1:9", tmp_path)
        error = refused(hub.repository, REPO)
        assert "the proxy wants a name and a password" in error.message
        assert "wrong" not in f"{error} {hub.access!r}"


@pytest.mark.parametrize("url", ["ftp://proxy:21", "http://", "socks6://proxy:1080", "http://a:b"])
def test_what_is_no_proxy_is_one_sentence(url: str, tmp_path: Path) -> None:
    hub = hub_by({"ALL_PROXY": url}, "http://hub.invalid", tmp_path)
    error = refused(hub.repository, REPO)
    assert error.message.startswith("A proxy is http://HOST:PORT, https://HOST:PORT or socks5://")


def test_socks_without_its_package_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own that can't find PySocks."""
    program = (
        "import sys; sys.modules['socks'] = None\n"
        "from localmoe.hub.http import Origin, proxy_for\n"
        "from localmoe.hub.types import ProxySettings\n"
        "settings = ProxySettings({'all': 'socks5://me:secret@127.0.0.1:9'}, '10.0.0.0/8')\n"
        "assert proxy_for(settings, Origin('https', '10.1.2.3', 443)) is None\n"
        "assert proxy_for(ProxySettings({**settings.urls, 'https': 'http://p:3128'}),"
        " Origin('https', 'hub', 443)).port == 3128\n"
        "proxy_for(settings, Origin('https', 'hub', 443))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert said == (
        "localmoe.errors.DownloadError: The proxy 127.0.0.1:9 speaks SOCKS, which needs PySocks. "
        "Try: pip install 'localmoe[socks]', or see NO_PROXY."
    )


@pytest.mark.parametrize(
    ("no_proxy", "bypassed", "proxied"),
    [
        ("", [], ["a.com", "127.0.0.1"]),
        ("*", ["a.com", "10.0.0.1", "::1"], []),
        ("a.com", ["a.com", "A.com", "a.com.", "x.a.com"], ["ba.com", "a.com.b", "a.co"]),
        (".a.com", ["a.com", "x.a.com"], ["ba.com"]),
        ("*.a.com", ["x.a.com", "y.x.a.com"], ["ba.com"]),
        (" b.com , a.com", ["a.com", "b.com"], ["c.com"]),
        ("b.com a.com", ["a.com", "b.com"], ["c.com"]),
        ("a.com:443", ["a.com", "x.a.com"], []),
        ("a.com:8080", [], ["a.com"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "localhost"]),
        ("0.0.1", [], ["127.0.0.1"]),
        ("127.0.0.1:443", ["127.0.0.1"], []),
        ("127.0.0.1:80", [], ["127.0.0.1"]),
        ("127.0.0.0/8", ["127.0.0.1", "127.255.0.1"], ["128.0.0.1", "localhost", "::1"]),
        ("10.1.2.3/8", ["10.0.0.1"], ["11.0.0.1"]),
        ("10.0.0.0/99,a/b,/", [], ["10.0.0.1", "a", "a.b"]),
        ("::1", ["::1", "[::1]", "0:0:0:0:0:0:0:1"], ["::2", "127.0.0.1"]),
        ("[::1]", ["::1"], ["::2"]),
        ("[::1]:443", ["::1"], []),
        ("[::1]:80", [], ["::1"]),
        ("fd00::/8", ["fd12::1"], ["fe80::1", "10.0.0.1"]),
        (",, ,.", [], ["a.com", ""]),
    ],
)
def test_what_no_proxy_leaves_out(no_proxy: str, bypassed: list[str], proxied: list[str]) -> None:
    assert [h for h in [*bypassed, *proxied] if bypasses_proxy(no_proxy, h, 443)] == bypassed


def test_no_proxy_holds_for_questions_and_bytes(server: StandInHub, tmp_path: Path) -> None:
    dead = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.0/8"}
    hub = hub_by(dead, server.endpoint, tmp_path)
    assert all_of(hub.open(the_file(hub), 0, 10)) == CONTENT[:10]


def test_variables_of_proxies() -> None:
    def urls(**variables: str) -> dict[str, str]:
        return {name: url for name, url in proxy_settings(variables).urls.items() if url}

    assert urls(http_proxy="http://a", HTTP_PROXY="http://b") == {"http": "http://a"}
    assert urls(HTTPS_PROXY="http://b", ALL_PROXY="c") == {"https": "http://b", "all": "c"}
    assert urls(https_proxy="", HTTPS_PROXY="http://b", no_proxy="*") == {}
    # in a CGI program that one is a header of whoever asks it
    assert urls(HTTP_PROXY="http://evil", REQUEST_METHOD="GET", ALL_PROXY="c") == {"all": "c"}
    assert proxy_settings({"NO_PROXY": "a", "no_proxy": "b"}).no_proxy == "b"
    assert "secret" not in repr(proxy_settings({"all_proxy": "http://me:secret@a"}))


# --- the cache


def pulled(hub: Hub) -> RemoteFile:
    """The file with its blob in place, as a download leaves it before it is linked."""
    file = the_file(hub)
    blob = hub.blob_path(file)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    return file


def test_a_blob_is_linked_without_its_bytes(cdn_server: StandInHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hub = hub_at(cdn_server.endpoint, tmp_path)
    file = pulled(hub)
    assert hub.cached_path(file) is None
    path = hub.link(file)
    assert path == hub.cached_path(file)
    assert path.resolve() == hub.blob_path(file).resolve()
    assert not any(request.is_bytes for request in cdn_server.requests)
    # and another tool finds it, by the branch and without a network
    found = hf_hub_download(REPO, file.name, cache_dir=hub.access.cache, local_files_only=True)
    assert Path(found) == path
    n_requests = len(cdn_server.requests)
    assert hub.link(file) == path
    assert len(cdn_server.requests) == n_requests


def test_linking_asks_nobody(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    assert "is not here yet" in refused(hub.link, file).message
    pulled(hub)
    n_requests = len(server.requests)
    assert hub.link(file).read_bytes() == CONTENT
    assert len(server.requests) == n_requests
    assert os.readlink(hub.link(file)) == f"../../blobs/{file.sha256}"


def test_without_symbolic_links_a_file_has_two_names(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_by({}, server.endpoint, tmp_path, has_symlinks=False)
    file = pulled(hub)
    path = hub.link(file)
    assert not path.is_symlink()
    assert path.samefile(hub.blob_path(file))
    assert path == hub.cached_path(file)
    assert os.listdir(path.parent) == [file.name]


def test_without_any_links_a_file_is_copied(tmp_path: Path) -> None:
    """As between two disks, where a file has no second name."""
    with tempfile.TemporaryDirectory(dir=other_disk(tmp_path)) as elsewhere:
        blob, path = Path(elsewhere) / "blob", tmp_path / "deep" / "name.gguf"
        blob.write_bytes(CONTENT)
        link_to_blob(path, blob, has_symlinks=False)
        assert path.read_bytes() == CONTENT
        assert not path.samefile(blob)
    assert os.listdir(path.parent) == [path.name]


def other_disk(folder: Path) -> Path:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == folder.stat().st_dev:
        pytest.skip("there is no second file system")
    return shared_memory


def test_a_link_to_other_content_is_made_anew(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = pulled(hub)
    path = hub.link(file)
    other = hub.blob_path(file).with_name(hashlib.sha256(b"other").hexdigest())
    other.write_bytes(CONTENT[::-1])
    path.unlink()
    path.symlink_to(other)
    assert hub.cached_path(file) is None
    assert hub.link(file).resolve() == hub.blob_path(file).resolve()


def test_linking_with_no_network_left(server: StandInHub, tmp_path: Path) -> None:
    file = pulled(hub_at(server.endpoint, tmp_path))
    for gone in (
        hub_at("http://127.0.0.1:9", tmp_path),
        hub_at(server.endpoint, tmp_path, offline=True),
    ):
        path = gone.link(file)
        assert path.read_bytes() == CONTENT
        path.unlink()


def test_offline_the_cache_answers(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = pulled(hub)
    path = hub.link(file)
    (path.parent / "README.md").write_text("hello")
    shutil.rmtree(hub.access.headers)  # what the Hub said of it
    n_requests = len(server.requests)
    offline = hub_at(server.endpoint, tmp_path, offline=True)
    readme = RemoteFile(REPO, file.commit, "README.md", 5, None)
    for revision in (None, "main", file.commit):
        assert offline.repository(REPO, revision).files == (readme, file)
    assert offline.cached_path(file) == path
    assert offline.link(file) == path
    (hub.blob_path(file).parent.parent / "refs" / "main").unlink()
    assert offline.repository(REPO).commit == file.commit
    for call, arguments in (
        (offline.repository, (REPO, "v1")),
        (offline.repository, (REPO, "0" * 40)),
        (offline.repository, ("org/other",)),
        (offline.open, (file, 0, 1)),
    ):
        error = refused(call, *arguments)
        assert type(error) is DownloadError
        assert "Hub is not asked offline" in error.message
    assert len(server.requests) == n_requests


def test_offline_the_hub_is_taken_at_its_last_word(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    listed = hub.repository(REPO)
    offline = hub_at(server.endpoint, tmp_path, offline=True)
    for revision in (None, "main", listed.commit):
        assert offline.repository(REPO, revision) == listed
    assert "is not in the cache" in refused(offline.repository, REPO, "v1").message
    for path in hub.access.headers.rglob("*.json"):
        path.write_text(path.read_text().replace(listed.files[0].sha256 or "", "../../x"))
    assert "is not in the cache" in refused(offline.repository, REPO).message


def test_a_revision_is_a_commit(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    old = pulled(hub).commit
    hub.link(the_file(hub))
    new = server.add_repo(REPO, {"other.gguf": b"GGUF"})
    offline = hub_at(server.endpoint, tmp_path, offline=True)
    gone = hub_at("http://127.0.0.1:9", tmp_path)
    assert hub.commit_of(REPO, "main") == new
    assert [h.commit_of(REPO, "main") for h in (offline, gone)] == [old, old]
    assert [h.commit_of(REPO, old[:7]) for h in (hub, offline, gone)] == [old, old, old]
    assert hub.commit_of(REPO, new) == new
    assert refused(hub.commit_of, REPO, "v9").message == f"{REPO} has no revision v9."
    assert isinstance(refused(gone.commit_of, REPO, "v9"), TransferFault)


def test_a_cut_file_is_not_taken_for_the_model(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = pulled(hub)
    hub.link(file)
    hub.blob_path(file).write_bytes(CONTENT[:-1])
    assert hub.cached_path(file) is None


def test_a_ref_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    refs = tmp_path / "hub" / "models--org--name-GGUF" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("../../..")
    offline = hub_at("http://127.0.0.1:9", tmp_path, offline=True)
    assert "is not in the cache" in refused(offline.repository, REPO).message
