"""What is printed: nothing that others wrote may drive the terminal, and errors are one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.cli.output import print_error, print_json, print_table, safe
from anser.core.errors import InvalidField


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("天气 é 👩‍💻", "天气 é 👩‍💻"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08\x00", "a\\rb\\x08\\x00"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("abc\u202edef", "abc\\u202edef"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    """Escape sequences, line ends, bidirectional marks and surrogates are written as escapes."""
    assert safe(text) == shown


def test_lines_may_be_kept() -> None:
    """An answer keeps its line ends and tabs, and nothing else that is not printable."""
    assert safe("a\n\tb\r\x1b]0;title\x07", lines=True) == "a\n\tb\\r\\x1b]0;title\\x07"


@given(st.text())
def test_whatever_comes_is_harmless(text: str) -> None:
    """No control character and nothing that cannot be encoded is left, whatever the text."""
    shown = safe(text)
    shown.encode()
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    assert safe(shown) == shown


def test_a_table_shows_foreign_text_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    """Cells are escaped and taken literally: neither control characters nor markup act."""
    print_table(("name", "n"), [("[red]\x1b[2J", 1), ("\N{BELL}", None)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "name          n",
        "[red]\\x1b[2J  1",
        "🔔            -",
    ]


def test_a_long_row_stays_on_its_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the output is no terminal nothing is wrapped or cut: lines can be searched."""
    print_table(("name",), [("x" * 300,)])
    assert "x" * 300 in capsys.readouterr().out.splitlines()


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON needs no terminal's mercy: every control character and letter is an escape."""
    value = {"a": "\x1b[31m\u202e天"}
    print_json(value)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed) == value


def test_an_error_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure is one line, whatever its message holds."""
    print_error(InvalidField("bad\nthing\x1b[0m"), as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "anser: bad\\nthing\\x1b[0m\n"


def test_an_error_for_programs_is_the_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json an error is the API's envelope on standard output."""
    print_error(InvalidField("bad", param="x"), as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    kind = "invalid_request_error"
    detail = {"message": "bad", "type": kind, "code": "invalid_value", "param": "x"}
    assert json.loads(out) == {"error": detail}
