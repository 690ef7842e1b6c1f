"""Chats on disk: a folder of sessions, their names, and the one that is going on.

A session is a file of text (transcript.py), NAME.jsonl. Where a chat ended well, the state of the
model's cache lies beside it (engine/worker/state_files.py), NAME.state, which only saves time.
One process at a time has a session, behind a lock. Everything is for its owner alone: files 0600 in
a folder 0700.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ..config.environment import sessions_folder
from ..errors import LocalMoeError, UsageError
from ..files import APPENDING, append_durably, is_there, make_private_folder, sync_folder
from ..prompt.messages import Message
from .transcript import Transcript, changes, head, other_model, read_transcript

if TYPE_CHECKING:
    from .transcript import Transcript


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AUTOMATIC = re.compile(r"\d{4}(-\d\d){2}-\d{4}(-\d+)?")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever comes after a dot."""


def is_name(text: str) -> bool:
    """Whether a session may have this name: no path, and a file name on every system."""
    is_odd = text.endswith(".") or DEVICES.fullmatch(text)
    return bool(NAME.fullmatch(text)) and not is_odd


def is_automatic(name: str) -> bool:
    """Whether it is one of `names_for`."""
    return bool(AUTOMATIC.fullmatch(name))


def names_for(now: datetime) -> Iterator[str]:
    """Names for a session that begins now, without end."""
    first = now.strftime("%Y-%m-%d-%H%M")
    yield first
    n = 2
    while True:
        yield f"{first}-{n}"
        n += 1


TEXT, STATE = ".jsonl", ".state"


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a list says of a session. `changed` is in seconds since 1970; `created` is ISO 8601.

    `damaged` are the numbers of lines that can't be read; `problem` says why nothing could be.
    """

    name: str
    model: str
    title: str
    created: str
    changed: float
    n_messages: int
    text_bytes: int
    state_bytes: int
    damaged: tuple[int, ...] = ()
    problem: str = ""


class Sessions:
    """The sessions of a folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, name: str | None, model: str) -> Session:
        """Begin a session; without a name it gets one from date and time.

        Nothing is written before something is said. Raises UsageError where the name is taken.
        """
        if name is not None:
            self.check_free(name)
            return Session(self, name, model)
        for candidate in names_for(datetime.now()):
            if not self.has(candidate):
                with contextlib.suppress(SessionInUse):
                    return Session(self, candidate, model)
        raise AssertionError  # the names never end

    def open(self, name: str) -> Session:
        """Go on with a session. Raises LocalMoeError where there is none, or it is in use."""
        self.check_known(name)
        return Session(self, name)

    def open_or_new(self, name: str, model: str = "") -> Session:
        """Go on with a session of this name, or begin it; the model may be said later (use)."""
        return self.open(name) if self.has(name) else self.new(name, model)

    def latest(self) -> Session | None:
        """Go on with the one that was written last; None where there is none."""
        by_time = sorted(self.names(), key=lambda name: _changed(self.path(name)))
        return self.open(by_time[-1]) if by_time else None

    def read(self, name: str) -> Transcript:
        """A session to look at, as far as it can be read, also while it is in use."""
        self.check_known(name)
        try:
            return read_transcript(self.path(name))
        except OSError as error:
            raise _cannot_read(self.path(name), error) from None

    def all(self) -> list[SessionFacts]:
        """Every session, that which was written last first."""
        facts: list[SessionFacts] = []
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                facts.append(self._facts(name))
        return sorted(facts, key=lambda found: (-found.changed, found.name))

    def remove(self, name: str) -> int:
        """Delete a session with its state; gives the bytes that are free again."""
        self.check_known(name)
        lock = self.lock(name)
        paths = [self.path(name), self.state_path(name)]
        n_bytes = sum(map(n_bytes_of, paths))
        try:
            for path in paths:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise LocalMoeError(f"{path} can't be deleted: {error.strerror}.") from None
        finally:
            self.unlock(name, lock)
        return n_bytes

    def names(self) -> list[str]:
        """Of all sessions, in the order of their letters. Raises LocalMoeError."""
        try:
            files = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _cannot_read(self.folder, error) from None
        found = (file.removesuffix(TEXT) for file in files if file.endswith(TEXT))
        return sorted(name for name in found if is_name(name))

    def has(self, name: str) -> bool:
        """Whether there is a file of this session, whatever it is. Raises LocalMoeError."""
        path = self.path(name)
        try:
            return is_there(path)
        except OSError as error:
            raise _cannot_read(path, error) from None

    def path(self, name: str) -> Path:
        """Where a session's text lies. Raises UsageError for what can't be a name."""
        if not is_name(name):
            raise UsageError(
                f"{ascii(name)} can't be the name of a session.",
                "A name has letters, digits and . _ -, at most 64, and begins with one of the "
                "first two.",
            )
        return self.folder / f"{name}{TEXT}"

    def state_path(self, name: str) -> Path:
        """The file with the state of the KV cache for a session."""
        return self.path(name).with_name(f"{name}{STATE}")

    def lock(self, name: str) -> FileLock:
        """Keep every other process off a session, until `unlock`. Raises SessionInUse."""
        lock = FileLock(self._lock_path(name), mode=0o600)
        try:
            prepare_folder(self.folder)
            lock.acquire(blocking=False)
        except Timeout:
            raise SessionInUse(
                f"The session {name} is open in another chat.", "Close it there, or choose another."
            ) from None
        except OSError as error:
            raise LocalMoeError(
                f"{self.folder} can't be written: {error.strerror}.", "Chat with --no-save."
            ) from None
        return lock

    def unlock(self, name: str, lock: FileLock) -> None:
        """Let others have a session; where there is none of this name, leave nothing of it."""
        try:
            if not os.path.lexists(self.path(name)):
                with contextlib.suppress(OSError):  # Windows deletes no file that is open
                    self._lock_path(name).unlink()  # while it is held: nobody else's by then
        finally:
            lock.release()

    def _lock_path(self, name: str) -> Path:
        return self.path(name).with_name(f".{name}.lock")

    def _facts(self, name: str) -> SessionFacts:
        path = self.path(name)
        found, problem = Transcript(), ""
        try:
            found = read_transcript(path)
        except LocalMoeError as error:  # a later format: still to be seen, and removed
            problem = error.message
        except OSError as error:
            if not self.has(name):
                raise
            problem = f"It can't be read: {error.strerror}."
        return SessionFacts(
            name=name,
            model=found.model,
            title=found.title,
            created=found.created,
            changed=_changed(path),
            n_messages=sum(m.role != "system" for m in found.messages),
            text_bytes=n_bytes_of(path),
            state_bytes=n_bytes_of(self.state_path(name)),
            damaged=tuple(found.damaged),
            problem=problem,
        )

    def check_known(self, name: str) -> None:
        """Raises UsageError where there is no session of this name."""
        if self.has(name):
            return
        near = difflib.get_close_matches(name, self.names(), 1, 0.5)
        hint = f"Did you mean {near[0]}?" if near else "See: localmoe sessions list"
        raise UsageError(f"There is no session {name}.", hint)

    def check_free(self, name: str) -> None:
        """Raises UsageError where there is a session of this name, or can't be one."""
        if self.has(name):
            raise UsageError(
                f"There is a session {name} already.",
                f"Go on with it: localmoe chat --session {name}",
            )


class SessionInUse(LocalMoeError):
    """Another process has the session."""


class Session:
    """A chat that is kept, by this process alone. Close it, or use it as a context manager.

    `messages` is the conversation so far, `unanswered` a question after it that a crash left
    without an answer. `model` is the name by which it was asked for, `file` stands for its file.
    `is_state_current` says that its state was restored and nothing was said since.
    """

    def __init__(self, sessions: Sessions, name: str, model: str = "") -> None:
        self.name = name
        self.path, self.state_path = sessions.path(name), sessions.state_path(name)
        self.is_state_current = False
        self._fd = -1
        self._identity: tuple[int, int, int] | None = None
        self._other_model = b""
        self._sessions, self._lock = sessions, sessions.lock(name)
        try:
            self._found = self._read(model)
        except BaseException:
            self._lock.release()
            raise
        self._written = self._found.messages
        self._left = list(self._written[len(self.messages) :])  # what `unanswered` was at first

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets other processes have the session."""
        self._close_file()
        if self._lock.is_locked:
            self._sessions.unlock(self.name, self._lock)

    @property
    def is_named(self) -> bool:
        """Whether a person gave it its name."""
        return not is_automatic(self.name)

    def rename(self, name: str) -> None:
        """Go on under another name, with text and state; nothing stays under this one.

        Raises UsageError where there is one of that name, LocalMoeError where it can't be done.
        """
        store = self._sessions
        path, state, lock = store.path(name), store.state_path(name), store.lock(name)
        try:
            store.check_free(name)
            self._close_file()  # Windows moves none that is open
            if is_there(self.path):
                self.path.rename(path)
        except OSError as error:
            store.unlock(name, lock)
            raise LocalMoeError(f"{self.path} can't be renamed: {error.strerror}.") from None
        except UsageError:
            store.unlock(name, lock)
            raise
        with contextlib.suppress(OSError):  # it only saves time
            self.state_path.rename(state)
        with contextlib.suppress(OSError):
            sync_folder(store.folder)
        store.unlock(self.name, self._lock)
        self.name, self.path, self.state_path, self._lock = name, path, state, lock

    @property
    def model(self) -> str:
        """The name of the model that the session was last with."""
        return self._found.model

    @property
    def file(self) -> str:
        """What tells that model's files from all others."""
        return self._found.file

    @property
    def messages(self) -> list[Message]:
        """The conversation, without a question that has no answer."""
        return self._written[: -1 if self.unanswered else None]

    @property
    def unanswered(self) -> str:
        """The last question, where it has no answer; else ""."""
        last = self._written[-1] if self._written else None
        return last.content if last and last.role == "user" else ""

    @property
    def n_dropped(self) -> int:
        """Messages at the beginning that a full context left out."""
        return self._found.n_dropped

    def use(self, model: str, file: str) -> None:
        """Say with which model it goes on; `file` stands for its file (states.file_key).

        Of another file the tokens of what was said mean nothing: then only the text counts.
        """
        if (model, file) == (self.model, self.file):
            return
        self._other_model = other_model(model, file)  # written once something is said to it
        if file != self.file:
            self._written = [replace(message, tokens=None) for message in self._written]
        self._found.model, self._found.file = model, file

    def sync(self, messages: Sequence[Message], n_dropped: int = 0) -> bool:
        """Have a conversation on disk when this returns: what is new, and what no longer counts.

        True where the file had been deleted: then it is written anew, whole. Of a chat in which
        nothing was asked there is no file. What was `unanswered` stays so until something else is
        asked. Raises LocalMoeError where it can't be written; then the file is as it was.
        """
        if self._left and asked(messages) == asked(self.messages):
            messages = [*messages, *self._left]
        else:
            self._left = []
        is_deleted = self._is_deleted()
        if is_deleted:
            self._begin_anew()
        self._write_changes(messages, n_dropped)
        return is_deleted

    def _write_changes(self, messages: Sequence[Message], n_dropped: int) -> None:
        if not self._found.end and not any(m.role == "user" for m in messages):
            return
        block = changes(self._written, messages, (self.n_dropped, n_dropped))
        if not self._found.end:
            block = head(self.model, self.file) + block
        elif block:
            block = b"\n" * self._found.lacks_line_end + self._other_model + block
        if block:
            self._append(block)
            self._found.lacks_line_end = False
            self._other_model = b""
            self.is_state_current = False
        self._written, self._found.n_dropped = list(messages), n_dropped

    def _read(self, model: str) -> Transcript:
        try:
            found = read_transcript(self.path)
            self._identity = self._identity_of_file()
        except OSError as error:
            if not self._sessions.has(self.name):
                return Transcript(model=model)
            raise _cannot_read(self.path, error) from None
        if found.damaged:
            raise LocalMoeError(
                f"Line {found.damaged[0]} of {self.path} is damaged{others(found.damaged)}.",
                "Mend it, or take it out of the file; "
                f"localmoe sessions export {self.name} saves what can be read.",
            )
        return found

    def _is_deleted(self) -> bool:
        """Whether the file is gone. Raises LocalMoeError where another program wrote to it."""
        if self._identity is None:
            return False
        try:
            now = self._identity_of_file()
        except FileNotFoundError:
            return True
        except OSError as error:
            raise self._not_kept(error) from None
        if now != self._identity:
            raise LocalMoeError(
                f"The chat can't be kept: another program changed {self.path} meanwhile.",
                f"Leave it; localmoe chat --session {self.name} goes on with what is there now.",
            )
        return False

    def _identity_of_file(self) -> tuple[int, int, int]:
        """What tells the file from one that another program puts in its place, or adds to."""
        found = self.path.stat()
        return found.st_dev, found.st_ino, found.st_size

    def _begin_anew(self) -> None:
        """Let nothing count as written; the lock may have gone with the folder."""
        self._close_file()
        self._lock.release()
        self._lock = self._sessions.lock(self.name)
        self._identity = None
        self._written, self._other_model = [], b""
        self._found.end = self._found.n_dropped = 0
        self._found.lacks_line_end = False

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, block: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            append_durably(self._fd, block, self._found.end)
            self._found.end += len(block)
            self._identity = self._identity_of_file()
        except OSError as error:
            self._remove_empty()
            raise self._not_kept(error) from None

    def _not_kept(self, error: OSError) -> LocalMoeError:
        return LocalMoeError(
            f"The chat can't be kept: {self.path} can't be written: {error.strerror}."
        )

    def _open(self) -> None:
        """Open for appending; the torn line that a crash left is cut off."""
        is_new = self._identity is None  # then what has the name by now is another's
        self._fd = os.open(self.path, APPENDING | (os.O_EXCL if is_new else 0), 0o600)
        os.ftruncate(self._fd, self._found.end)
        if is_new:
            with contextlib.suppress(OSError):
                sync_folder(self.path.parent)

    def _remove_empty(self) -> None:
        """Leave no file of a chat of which nothing could be written."""
        if self._identity is None and self._fd >= 0:
            self._close_file()
            with contextlib.suppress(OSError):
                self.path.unlink()


def others(damaged: Sequence[int]) -> str:
    """Returns how a sentence about the first damaged line goes on where there are more."""
    n_more = len(damaged) - 1
    if not n_more:
        return ""
    return ", and so is another" if n_more == 1 else f", and so are {n_more} others"


def asked(messages: Sequence[Message]) -> list[str]:
    """Returns the user's messages."""
    return [message.content for message in messages if message.role == "user"]


def prepare_folder(folder: Path) -> None:
    """Have a folder that only its owner can look into. Raises OSError."""
    make_private_folder(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def n_bytes_of(path: Path) -> int:
    """The size of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _cannot_read(path: Path, error: OSError) -> LocalMoeError:
    return LocalMoeError(f"{path} can't be read: {error.strerror}.")


def kept_sessions() -> Sessions:
    """Returns the sessions of this person."""
    return Sessions(sessions_folder())
