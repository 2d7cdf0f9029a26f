"""tools/check.py: what ./test does with its arguments."""

from __future__ import annotations

import pytest
from tools.check import name_browser_tests


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
