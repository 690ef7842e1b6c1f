"""An input in UTF-16, or a table in CSV, rewritten as lines of JSON in UTF-8.

PowerShell's `>` writes UTF-16, and spreadsheets write CSV, whose rows may have line ends in them. A
batch reads lines of bytes, so such an input is rewritten into a temporary file first.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, BinaryIO

from ..errors import UsageError
from ..files import MAX_LINE_BYTES, utf16_codec
from .parameters import is_parameter

TABLES = (".csv", ".tsv")
DELIMITERS = ",;\t"
PIECE_BYTES = 1 << 20
PLACE = re.compile(r"\{([^{}]*)\}")
CONTENTS = ("prompt", "messages")


def is_table(name: str, template: str | None) -> bool:
    """Whether an input is a table: by its name, or because its columns are to be put in a text."""
    return template is not None or PurePath(name).suffix.lower() in TABLES


def write_utf8(source: BinaryIO, target: BinaryIO) -> bool:
    """Writes a stream in UTF-16 as UTF-8; returns whether it was in UTF-16, and rewinds both.

    What is no text stays none, so that its line is an error of its own.
    """
    codec = utf16_codec(source.read(4))
    source.seek(0)
    if codec is None:
        return False
    decoder = codecs.getincrementaldecoder(codec)("surrogatepass")
    while piece := source.read(PIECE_BYTES):
        target.write(decoder.decode(piece).encode("utf-8", "surrogatepass"))
    if decoder.getstate()[0]:
        target.write(b"\xff")
    source.seek(0)
    target.seek(0)
    return True


def write_rows(source: BinaryIO, target: BinaryIO, name: str, template: str | None) -> None:
    """Writes each row of a table as a line of JSON, and rewinds the target.

    Its columns are those of a plain line; with a `template`, the prompt is that, with columns in
    the place of their names in braces. Raises UsageError where it is no such table.
    """
    text = io.TextIOWrapper(source, "utf-8-sig", newline="")
    try:
        for row in _rows(text, name, template):
            target.write(json.dumps(row).encode() + b"\n" if row else b"\n")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text.", 'Save it as "CSV UTF-8".') from None
    except csv.Error as error:
        raise UsageError(f"{name} is not a valid CSV file: {error}.") from None
    finally:
        text.detach()
    source.seek(0)
    target.seek(0)


def _rows(text: io.TextIOWrapper, name: str, template: str | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    first = text.readline()
    text.seek(0)
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = [column.strip() for column in next(reader, [])]
    _check_header(header, name, template)
    for number, fields in enumerate(reader, 1):
        if len(fields) > len(header):
            raise UsageError(
                f"Row {number} of {name} has {len(fields)} fields; its header names {len(header)} "
                "columns.",
                "Put texts with commas in quotes.",
            )
        yield _request(dict(zip(header, fields, strict=False)), template)


def _check_header(header: list[str], name: str, template: str | None) -> None:
    """Raises UsageError where the columns aren't what prompts can be made of."""
    if len(set(header)) < len(header):
        raise UsageError(f"The header of {name} names a column twice.", "Rename one.")
    shown = ascii(", ".join(header))[1:-1][:80]
    if template is None:
        if not any(column in header for column in CONTENTS):
            example = next((column for column in header if column), "column")
            raise UsageError(
                f"{name} has no column prompt; it has {shown or 'none'}.",
                f"Say what to ask with --template, like '{{{ascii(example)[1:-1][:40]}}}'.",
            )
        return
    missing = [column for column in PLACE.findall(template) if column not in header]
    if missing:
        raise UsageError(
            f"--template names {{{missing[0]}}}; the columns of {name} are {shown or 'none'}."
        )
    if not PLACE.search(template):
        raise UsageError("--template names no column.", "Put one in braces, like '{question}'.")


def _request(row: Mapping[str, str], template: str | None) -> dict[str, Any]:
    """A row as a plain line; empty fields say nothing."""
    said = {column: field for column, field in row.items() if field}
    if not said:
        return {}
    line: dict[str, Any] = {
        column: _value(field) if is_parameter(column) or column == "messages" else field
        for column, field in said.items()
    }
    if template is not None:
        line = {column: value for column, value in line.items() if column not in CONTENTS}
        line["prompt"] = PLACE.sub(lambda place: row.get(place[1], ""), template)
    return line


def _value(field: str) -> Any:
    """A parameter's value: JSON where it is that, else text."""
    try:
        return json.loads(field)
    except (ValueError, RecursionError):
        return field
