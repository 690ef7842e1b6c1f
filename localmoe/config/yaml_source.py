"""A YAML file that people write -> plain values, and the line on which each stands.

Only what such a file needs is read: mappings, lists and plain values. Anything that could grow
beyond the file's own size (aliases, deep nesting) is refused, and so is a name that comes twice,
of which YAML's own loader would silently take the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ..errors import LocalMoeError, printable
from ..files import open_regular

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 8

Place: TypeAlias = "tuple[str | int, ...]"
"""Where a value stands: from the outermost name inwards; items of a list by number, from 0."""


class YamlSource:
    """A file, read: `values` are its outermost names. Raises LocalMoeError naming file and line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {(): 1}
        self.values = self._read(self._bytes())

    def refuse(self, place: Place, reason: str, hint: str = "") -> LocalMoeError:
        """The error for what stands at `place`, on its line or else on that of what holds it."""
        while place not in self.lines:
            place = place[:-1]
        return self._refuse_line(self.lines[place], reason, hint)

    def _refuse_line(self, line: int, reason: str, hint: str = "") -> LocalMoeError:
        shown = printable(reason).rstrip(".")
        stop = "" if shown.endswith("?") else "."
        return LocalMoeError(f"{self.path}:{line}: {shown}{stop}", hint)

    def _bytes(self) -> bytes:
        try:
            with open_regular(self.path) as stream:
                raw = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise LocalMoeError(f"{self.path} can't be read: {error.strerror}.") from None
        if len(raw) > MAX_FILE_BYTES:
            raise self._refuse_line(1, f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        return raw

    def _read(self, raw: bytes) -> dict[str, Any]:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise self._refuse_line(line, "this is not UTF-8 text") from None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            values = self._plain(loader, node, ()) if node else {}
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise self._refuse_line(line, "a control character") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise self._refuse_line(line, error.problem or "this is not YAML") from None
        if not isinstance(values, dict):
            raise self.refuse((), "no names; begin each entry with NAME:")
        return values

    def _plain(self, loader: _Loader, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(loader, node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._plain(loader, item, (*place, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise _marked(node.start_mark, f"{node.tag[:40]} is not read here")
        try:
            return loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):
            # a date that there isn't, a number of 5,000 digits, !!bool before what is none
            raise _marked(node.start_mark, "this is no value; put text in quotes") from None

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise _marked(name_node.start_mark, "a name must be plain text")
            name: str = name_node.value
            if name in values:
                raise _marked(name_node.start_mark, f"{name[:80]} comes twice")
            inside = (*place, name)
            self.lines[inside] = name_node.start_mark.line + 1
            values[name] = self._plain(loader, value_node, inside)
        return values


class _Loader(yaml.SafeLoader):
    """Builds nodes, which know their lines."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _marked(event.start_mark, "aliases (*name) are not read; write it out")
        if self.depth == MAX_DEPTH:
            raise _marked(event.start_mark, "this is nested too deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _marked(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
