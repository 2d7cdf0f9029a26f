"""tools/check.py: what ./test does with its arguments."""

from __future__ import annotations

import sys

import pytest
from tools.check import CheckError, Row, Run, name_browser_tests


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tests/browser"], True),
        (["-x", "tests/browser/test_chat.py::test_x"], True),
        (["tests"], True),
        (["tests/unit"], False),
        (["-k", "chat"], False),
        (["tests/unit", "::"], False),
    ],
)
def test_a_browser_is_installed_where_its_tests_are_named(
    arguments: list[str], named: bool
) -> None:
    """Chromium is fetched for whoever names its tests, and for nobody else's daily work."""
    assert name_browser_tests(arguments) is named


def row(label: str, *codes: str) -> Row:
    """A row of little programs."""
    return Row(label=label, commands=[[sys.executable, "-c", code] for code in codes], env={})


def test_rows_run_side_by_side_and_each_line_says_whose_it_is(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is printed can be told apart; a row's commands run one after the other."""
    run = Run()
    run.together("both", row("a", "print(1)", "print(2)"), row("b", "print(3)"))
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("a|")] == ["a| 1", "a| 2"]
    assert "b| 3" in lines
    assert run.passed == 1


def test_a_row_that_fails_says_how_to_run_it_again() -> None:
    """The others run to their end; what failed is named, and nothing after it in its row runs."""
    run = Run()
    with pytest.raises(CheckError, match=r"a \(exit 3\); again: .*exit\(3\)") as failure:
        run.together("both", row("a", "exit(3)", "exit(4)"), row("b", "print()"))
    assert "exit(4)" not in str(failure.value)
    assert run.passed == 0
