"""The Hub: facts, bytes, refusals and the cache, against a real server with the real client."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import close_session
from standin_hub import TOKEN, Fault, StandInHub

from localmoe.errors import DownloadError, LocalMoeError, UsageError
from localmoe.hub.client import Hub, check_name, check_repo, file_of
from localmoe.hub.http import RemoteBytes, TransferFault, retry_after_s
from localmoe.hub.types import HubAccess, RemoteFile, RemoteRepo

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
def no_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield
    close_session()  # its proxies are those of when it was made


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


def test_importing_the_hub_is_quick() -> None:
    code = "import sys, localmoe.hub.remote_header; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
    buffer, n_read = memoryview(bytearray(7_000)), 0
    with pytest.raises(TransferFault) as caught, hub.open(file, 0, None) as remote:  # noqa: PT012
        while n := remote.read_into(buffer):
            n_read += n
    assert caught.value.kind == kind
    assert n_bytes in (None, n_read)
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
    hub = hub_at(tls_server.endpoint, tmp_path)
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


def test_a_certificate_that_nobody_trusts(tls_server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(tls_server.endpoint, tmp_path, token=TOKEN)
    file = RemoteFile(REPO, "0" * 40, "name.Q4_K_M.gguf", 1, None)
    for error in (refused(hub.repository, REPO), refused(hub.open, file, 0, 1)):
        assert type(error) is DownloadError
        assert error.message == "The certificate of 127.0.0.1 can't be verified."
        assert "SSL_CERT_FILE" in error.hint
    assert tls_server.requests == []


# --- proxies


def test_the_usual_proxy_is_used(
    server: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_session()
    monkeypatch.setenv("http_proxy", server.endpoint.replace("//", "//me:se%40cret@"))
    hub = hub_at("http://hub.invalid", tmp_path, token=TOKEN)
    assert all_of(hub.open(the_file(hub), 0, 10)) == CONTENT[:10]
    ours = server.requests[-1]
    assert ours.path.startswith(f"http://hub.invalid/{REPO}/resolve/")
    assert ours.headers["host"] == "hub.invalid"
    assert ours.headers["proxy-authorization"] == "Basic bWU6c2VAY3JldA=="
    close_session()
    monkeypatch.setenv("no_proxy", "hub.invalid")
    hub = hub_at("http://hub.invalid", tmp_path)
    assert "can't be reached" in refused(hub.repository, REPO).message


def test_a_proxy_that_refuses_and_one_of_another_kind(
    server: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = the_file(hub_at(server.endpoint, tmp_path))
    hub = hub_at("https://hub.invalid", tmp_path)
    monkeypatch.setenv("https_proxy", server.endpoint)  # it knows no CONNECT
    assert "the proxy refuses: HTTP 501" in refused(hub.open, file, 0, 1).message
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    assert "Only proxies of the form http://" in refused(hub.open, file, 0, 1).message


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


def test_linking_never_downloads(server: StandInHub, tmp_path: Path) -> None:
    hub = hub_at(server.endpoint, tmp_path)
    file = the_file(hub)
    assert "is not here yet" in refused(hub.link, file).message
    pulled(hub)
    server.replace(REPO, file.name, CONTENT[::-1])
    assert "has changed on the Hub since it was pulled" in refused(hub.link, file).message
    assert server.bytes_sent() == 0


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
    hub = hub_at(server.endpoint, tmp_path)
    file = pulled(hub)
    gone = hub_at("http://127.0.0.1:9", tmp_path)
    error = refused(gone.link, file)
    assert isinstance(error, TransferFault)
    assert hub.link(file).read_bytes() == CONTENT


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
        assert "offline was asked for" in error.message
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
