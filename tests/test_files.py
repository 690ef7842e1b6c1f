"""Files: what is opened to be read is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from localmoe.errors import UsageError
from localmoe.files import open_regular, read_regular, read_text

posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")


@posix
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zeros", tmp_path):
        with pytest.raises(OSError, match="Not a regular file|Is a directory"):
            open_regular(path)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="Larger than"):
        read_regular(path, 4)


@posix
def test_a_text_that_never_ends_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 64 MiB"):
        read_text("/dev/zero")
