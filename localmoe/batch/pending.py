"""What a batch has still to ask, what is answered already, and whose name is whose.

Kept in a temporary database on disk that ends with the process, so that memory stays flat for
millions of lines. Nothing in it has to survive: all of it is made anew from the input and output.
"""

from __future__ import annotations

import contextlib
import sqlite3
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import TypeAdapter

from ..chat.chat import AnswerOptions
from ..errors import LocalMoeError
from ..files import digest

PAGE = 64
TABLES = """
CREATE TABLE names (name BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE done (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE keys (key BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE asks (line INTEGER PRIMARY KEY, name TEXT, key BLOB, chat INTEGER, tokens BLOB,
    options BLOB, n_cut INTEGER, is_begun INTEGER);
CREATE TABLE places (line INTEGER, offset INTEGER, n_bytes INTEGER, PRIMARY KEY (line, offset));
"""
_options: TypeAdapter[AnswerOptions] = TypeAdapter(AnswerOptions)


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that was checked and encoded. `key` stands for its name and its line's content.

    `n_cut` tokens were cut from the prompt to make it fit. Where `is_begun`, the prompt ends with
    the beginning of the answer.
    """

    line: int
    name: str
    key: bytes
    chat: bool
    tokens: tuple[int, ...]
    options: AnswerOptions
    n_cut: int = 0
    is_begun: bool = False


class PendingRequests:
    """Requests by line, keys of what is done, and names. Close it, or use it as a context."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("")  # a temporary file of SQLite's own, gone when closed
        self._rows.executescript(
            f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8192; {TABLES}"
        )

    def close(self) -> None:
        """Deletes the temporary database."""
        self._rows.close()

    def __enter__(self) -> PendingRequests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, statement: str, *values: object) -> int:
        try:
            return self._rows.execute(statement, values).rowcount
        except sqlite3.OperationalError as error:
            raise LocalMoeError(
                f"The batch's temporary file can't be written: {error}.",
                "Make room there, or set SQLITE_TMPDIR to a folder with room.",
            ) from None

    # ---- what is done ----

    def mark_done(self, key: bytes) -> bool:
        """Note an answer that is there; False where it was noted already."""
        return self._write("INSERT OR IGNORE INTO done VALUES (?)", key) == 1

    def is_done(self, key: bytes) -> bool:
        """Whether a request with this key has its answer."""
        return self._rows.execute("SELECT 1 FROM done WHERE key = ?", (key,)).fetchone() is not None

    # ---- what is asked ----

    def take_name(self, name: str, line: int) -> int:
        """Give a line its name; gives the line that has it, this one or an earlier one."""
        key = digest(name.encode("utf-8", "surrogatepass"))
        self._write("INSERT OR IGNORE INTO names VALUES (?, ?)", key, line)
        found = self._rows.execute("SELECT line FROM names WHERE name = ?", (key,)).fetchone()
        return int(found[0])

    def is_named(self, name: str) -> bool:
        """Whether a request has this custom_id."""
        key = digest(name.encode("utf-8", "surrogatepass"))
        found = self._rows.execute("SELECT 1 FROM names WHERE name = ?", (key,)).fetchone()
        return found is not None

    def take_key(self, key: bytes, line: int) -> None:
        """Note that a line of the input has this key, whatever became of it."""
        self._write("INSERT OR IGNORE INTO keys VALUES (?, ?)", key, line)

    def line_of(self, key: bytes) -> int | None:
        """The line of the input that has this key."""
        found = self._rows.execute("SELECT line FROM keys WHERE key = ?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def add(self, ask: PendingRequest) -> None:
        """Keeps a request that was checked and encoded."""
        self._write(
            "INSERT INTO asks VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            ask.line,
            ask.name,
            ask.key,
            ask.chat,
            array("i", ask.tokens).tobytes(),
            _options.dump_json(ask.options),
            ask.n_cut,
            ask.is_begun,
        )

    @property
    def n_asks(self) -> int:
        """How many requests there are to answer."""
        return int(self._rows.execute("SELECT count(*) FROM asks").fetchone()[0])

    def asks(self) -> Iterator[PendingRequest]:
        """What is to be asked, in the order of the input."""
        line = 0
        query = "SELECT * FROM asks WHERE line > ? ORDER BY line LIMIT ?"
        while rows := self._rows.execute(query, (line, PAGE)).fetchall():
            for line, name, key, chat, tokens, options, n_cut, is_begun in rows:
                ids = array("i")
                ids.frombytes(tokens)
                answer = _options.validate_json(options)
                yield PendingRequest(
                    line, name, key, bool(chat), tuple(ids), answer, n_cut, bool(is_begun)
                )

    # ---- the order of an output ----

    def place(self, line: int, offset: int, n_bytes: int) -> None:
        """Note where in the output the record of a line is."""
        self._write("INSERT INTO places VALUES (?, ?, ?)", line, offset, n_bytes)

    def places(self) -> Iterator[tuple[int, int]]:
        """Offset and length of every noted record, in the order of lines; then none is noted."""
        with contextlib.closing(self._rows.cursor()) as cursor:
            yield from cursor.execute("SELECT offset, n_bytes FROM places ORDER BY line, offset")
        self._write("DELETE FROM places")
