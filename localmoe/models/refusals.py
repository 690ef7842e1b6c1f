"""What the Hub's no means, in a sentence with the next command."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ..errors import DownloadError, LocalMoeError, UsageError
from .remote import RemoteFile
from .transport import TransferFault, retry_after_s

UNRESOLVED = "its name can't be resolved"
REFUSED = "connection refused"


def refusal_of(
    status: int,
    headers: Mapping[str, str],
    file: RemoteFile,
    has_token: bool,
    near: Callable[[], Sequence[str]],
) -> LocalMoeError:
    """The error for an answer of 4xx or 5xx to a request for `file`, or for its repository where
    it has no name. `headers` are asked in lower case; `near` gives repositories with a name like
    it. Source: hf_raise_for_status (huggingface_hub/utils/_http.py)."""
    code, said = headers.get("x-error-code"), headers.get("x-error-message", "")
    repo = file.repo
    if code == "GatedRepo":
        hint = f"Open https://huggingface.co/{repo}, accept its terms, then: hf auth login"
        return DownloadError(f"{repo} is gated: its owner wants its terms accepted.", hint)
    if said.startswith("Invalid credentials") or (status == 401 and has_token):
        what = "The Hub refuses the token: it is wrong or has expired."
        return DownloadError(what, "Try: hf auth login, or unset HF_TOKEN")
    if code == "RevisionNotFound":
        what = f"{repo} has no revision {file.commit}."
        return UsageError(what, "Leave the revision out for the newest files.")
    if code == "EntryNotFound" or status == 416:
        what = f"{file.name or 'A file'} of {repo} has changed on the Hub or is gone."
        return DownloadError(what, "Pull it again.")
    if code == "RepoNotFound" or status in (401, 404):
        return no_such_repo(repo, has_token, near())
    if status in (408, 429) or status >= 500:
        wait_s = retry_after_s(headers)
        when = f"Try again in {wait_s:.0f} s." if wait_s else "Try again later."
        return TransferFault("busy", f"The Hub is busy (HTTP {status}).", wait_s, when)
    what = f"The Hub refuses access to {repo} (HTTP {status})."
    return DownloadError(what, "Does the token allow it? See: hf auth whoami")


def no_such_repo(repo: str, has_token: bool, near: Sequence[str]) -> UsageError:
    """It doesn't exist, or is private: the Hub doesn't say which."""
    hint = f"Did you mean {' or '.join(near)}?" if near else "Check the name on the Hub."
    if not has_token:
        hint += " For a private one: hf auth login"
    return UsageError(f"The Hub has no model {repo} that you may see.", hint)


def no_hub(host: str) -> DownloadError:
    """Something answers, but not with what the Hub would say."""
    what = f"What answers at {host} is not the Hub: a sign-in page of the network?"
    return DownloadError(what, "Open a web page in the browser, then try again.")


def is_no_network(fault: TransferFault) -> bool:
    """Whether nobody is there at all, which a few seconds won't change."""
    return fault.kind == "dropped" and (UNRESOLVED in fault.message or REFUSED in fault.message)


def reason_for_silence(error: BaseException, patience_s: float) -> str:
    """Why a request of huggingface_hub got no answer, without its addresses."""
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"no answer within {patience_s:.0f} s"
    text = re.sub(r"^\[.*?\]\s*", "", str(error)).split("\n")[0].lower()
    if "name" in text and ("resol" in text or "known" in text):
        return f"{UNRESOLVED}: no network?"
    if "refused" in text:
        return REFUSED
    return "the proxy refuses" if "Proxy" in kind else "the connection broke off"
