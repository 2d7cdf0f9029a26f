"""Printing: tables, JSON and errors, with nothing in them that could drive a terminal.

All text that came from others (members, models, nodes, answers) passes `safe` before it is
written. JSON is written as ASCII, so it needs no such care.
"""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from anser.cli.messages import tr

if TYPE_CHECKING:
    from rich.console import Console

    from anser.core.errors import AnserError

__all__ = ["STDERR", "console", "print_error", "print_json", "print_line", "print_table", "safe"]

_PIPE_COLUMNS = 1_000  # a pipe has no width: a row stays on its line
_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class _Stderr(io.TextIOBase):
    """Standard error whose reader or terminal may go away: then nothing is said any more."""

    def write(self, text: str, /) -> int:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return len(text)


STDERR = _Stderr()
"""Where a platform says things that it does not depend on."""


def safe(text: str, *, lines: bool = False) -> str:
    """`text` with all that could drive a terminal or reorder a line written as an escape.

    With `lines`, line ends and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter if _harmless(letter) or (lines and letter in "\n\t") else _escaped(letter)
        for letter in text
    )


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=True))


def print_line(text: str = "") -> None:
    """One line of our own words."""
    print(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table of texts; `None` is shown as a dash."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else safe(str(cell))) for cell in row))
    console().print(table)


def print_error(error: AnserError, *, as_json: bool) -> None:
    """One clear line on standard error, or the error's envelope on standard output."""
    if as_json:
        detail = {"message": error.message, "type": error.kind, "code": error.code}
        print_json({"error": {**detail, "param": error.param}})
    else:
        print(tr("error.line", message=safe(error.message)), file=sys.stderr)


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as it is: no markup, no highlighting."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def _harmless(letter: str) -> bool:
    kind = unicodedata.category(letter)
    return kind not in ("Cc", "Cs", "Zl", "Zp") and letter not in _BIDI


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
