"""Code in colour: the lines of a code block, each exactly as it was written."""

from __future__ import annotations

from rich.color import ColorSystem
from rich.style import Style
from rich.syntax import ANSI_DARK, ANSISyntaxTheme, Syntax

from .console import safe
from .spans import StyledLine, StyledText, paint

MAX_LINES = 200
"""Of longer code the last lines alone are looked at again for each new one."""
THEME = ANSISyntaxTheme(ANSI_DARK)
"""The terminal's own sixteen colours: they suit its background."""


class Highlighter:
    """Colours the lines of one code block as they come; without a lexer they stay as they are."""

    def __init__(self, language: str, colour: bool) -> None:
        self._lines: list[str] = []
        name = language.strip().split(" ")[0].lower()
        # a tab size of 0 keeps tabs as they are: a Makefile needs them
        self._lexer = Syntax("", name, tab_size=0).lexer if colour and name else None

    def line(self, text: str) -> StyledLine:
        """The next line of the code."""
        plain = paint([StyledText(text)])
        if self._lexer is None:
            return plain
        self._lines = [*self._lines[-MAX_LINES:], safe(text)]
        shown = self._last_line()
        return StyledLine(shown, plain.cells) if shown else plain

    def _last_line(self) -> str:
        """The last line in colour; "" where the lexer would change it."""
        assert self._lexer is not None
        painted, plain = [""], [""]
        for kind, token in self._lexer.get_tokens("\n".join(self._lines)):
            style = THEME.get_style_for_token(kind)
            for n, part in enumerate(token.split("\n")):
                if n:
                    painted.append("")
                    plain.append("")
                plain[-1] += part
                painted[-1] += coloured(part, style)
        last = len(self._lines) - 1
        is_same = len(plain) > last and plain[last] == self._lines[last]
        return painted[last] if is_same else ""


def coloured(text: str, style: Style) -> str:
    """Returns a text in the colours of a style."""
    if not text.strip() or style == Style.null():
        return text
    return style.render(text, color_system=ColorSystem.STANDARD)
