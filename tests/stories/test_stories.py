"""Stories of scheduling: read them in review, they are the scheduler's behaviour in words.

`ANSER_REWRITE=1 pytest tests/stories` writes what the scheduler does now into them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.stories.teller import retell

_STORIES = sorted(Path(__file__).parent.glob("*.txt"))
_REWRITE = "ANSER_REWRITE" in os.environ


def test_there_are_stories() -> None:
    """The stories are found: an empty folder would pass everything."""
    assert _STORIES


@pytest.mark.parametrize("path", _STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    """The scheduler does what the story tells."""
    text = path.read_text()
    told = retell(text)
    if _REWRITE:
        path.write_text(told)
    else:
        assert told == text
