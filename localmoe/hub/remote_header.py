"""The header of a model that is not here: its first bytes, kept as a sparse file of full length.

Whatever reads a header (read_meta, a probe of memory, the vocabulary) takes such a stand-in for
the model. It holds no weights, and lies in a folder of its own so that nobody runs it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ..errors import DownloadError
from ..files import atomic_file, make_private_folder
from ..gguf.reader import HeaderIncomplete, read_header
from .client import Hub, check_name, check_repo
from .types import RemoteFile

# Mixtral's header takes 0.7 MB, those of models with large vocabularies 4 to 16 MB: what is here
# is doubled each time, in few steps and without much that is not needed.
FIRST_BYTES = 2**20
READ_BYTES = 2**16


def header_files(hub: Hub, files: Sequence[RemoteFile]) -> tuple[Path, ...]:
    """The header of each of a model's GGUFs (its shards in order), as local sparse files.

    Fetches what is not here yet, a MiB or a few for each. Raises ModelFileError for what is no
    GGUF or can't be whole, DownloadError where the Hub can't give it or the disk can't keep it.
    """
    return tuple(_header_file(hub, file) for file in files)


def _header_file(hub: Hub, file: RemoteFile) -> Path:
    check_repo(file.repo)
    check_name(file.repo, file.name)
    path = hub.access.headers / file.repo / file.commit / file.name
    try:
        if not (path.is_file() and path.stat().st_size == file.n_bytes):
            _write(path, _fetched(hub, file), file.n_bytes)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        what = f"The header of {file.base_name} can't be kept in {hub.access.headers}: {reason}."
        hint = "Free some room there, or set LOCALMOE_STATE to a folder that can be written to."
        raise DownloadError(what, hint) from error
    return path


def _fetched(hub: Hub, file: RemoteFile) -> bytes:
    """Just the header's bytes, by ranges that go on where the last one ended."""
    beginning = _Beginning(hub, file)
    while True:
        beginning.extend(max(FIRST_BYTES, 2 * len(beginning.here)))
        try:
            header = read_header(io.BytesIO(beginning.here), file.n_bytes, file.base_name)
            return bytes(beginning.here[: header.data_offset])
        except HeaderIncomplete:
            if len(beginning.here) == file.n_bytes:
                raise


class _Beginning:
    """The first bytes of a remote file, growing."""

    def __init__(self, hub: Hub, file: RemoteFile) -> None:
        self.here = bytearray()
        self._hub, self._file = hub, file
        self._etag: str | None = None

    def extend(self, n_bytes: int) -> None:
        """Fetch what is missing of `n_bytes`; further tries go on where a line broke off."""
        end = min(n_bytes, self._file.n_bytes)
        self._hub.retried(lambda: self._fetch(end))

    def _fetch(self, end: int) -> None:
        if len(self.here) >= end:
            return
        with self._hub.open(self._file, len(self.here), end, etag=self._etag) as remote:
            if remote.total_bytes != self._file.n_bytes:
                what = f"{self._file.base_name} of {self._file.repo} has changed on the Hub."
                raise DownloadError(what, "Try again.")
            self._etag = remote.etag
            del self.here[remote.start :]  # all of it where the server begins anew
            buffer = memoryview(bytearray(READ_BYTES))
            while n := remote.read_into(buffer[: end - len(self.here)]):
                self.here += buffer[:n]


def _write(path: Path, header: bytes, n_bytes: int) -> None:
    """Keeps a header as a sparse file of the model's full length."""
    make_private_folder(path.parent)
    with atomic_file(path, durable=True, mode=0o600) as file:
        file.write(header)
        file.truncate(n_bytes)
