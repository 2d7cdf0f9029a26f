"""Worlds are lived through without counting lines, which would take three times as long."""

from __future__ import annotations

from collections.abc import Iterator

import coverage
import pytest


@pytest.fixture(autouse=True, scope="package")
def uncounted() -> Iterator[None]:
    """Every line of the core has tests of its own."""
    counting = coverage.Coverage.current()
    if counting is None:
        yield
        return
    counting.stop()
    yield
    counting.start()
