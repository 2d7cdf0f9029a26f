"""The targets of fuzzing on what is kept of them, and on some hundred variations."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import CORPUS, TARGETS, check_of, kept
from tests.fuzz.__main__ import shortened

_CORPUS_BYTES_MAX = 300_000
_EXAMPLES = 150


@cache
def variations(name: str) -> st.SearchStrategy[bytes]:
    """Pieces of what is kept, put together anew, with something strange between."""
    seeds = kept(name)
    whole = st.sampled_from(seeds)
    ends = st.tuples(whole, st.integers(0, 2_000), st.integers(0, 400))
    piece = ends.map(lambda each: each[0][each[1] : each[1] + each[2]])
    return st.lists(whole | piece | st.binary(max_size=4), max_size=4).map(b"".join)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_stays_mended(name: str) -> None:
    """All that fuzzing has kept, each way that once was wrong among it, keeps every rule."""
    check = check_of(name)
    for data in kept(name):
        check(data)


@pytest.mark.parametrize("name", TARGETS)
def test_variations(name: str) -> None:
    """So do what the kept bytes can be turned into, and any bytes at all."""
    check = check_of(name)

    @settings(max_examples=_EXAMPLES)
    @given(variations(name) | st.binary(max_size=200))
    def run(data: bytes) -> None:
        check(data)

    run()


def test_the_corpus_is_small() -> None:
    """What is kept is small, each file of use to a target that exists."""
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < _CORPUS_BYTES_MAX


def test_what_breaks_a_rule_is_made_short() -> None:
    """Of bytes that break a rule only those are kept without which they would not."""

    def check(data: bytes) -> None:
        assert not (b"a" in data and b"z" in data)

    assert shortened(check, b"xxxxxxaxxxxxxxxxxxxzxxx") == b"az"


def test_an_unknown_target_is_refused() -> None:
    """The command names the targets that there are."""
    command = [sys.executable, "-m", "tests.fuzz", "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert all(name in ended.stderr for name in TARGETS)
