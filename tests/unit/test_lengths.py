"""How long prompts are, learnt from what engines count."""

from __future__ import annotations

import pytest

from anser.core.limits import LENGTHS_MAX
from anser.services.lengths import Lengths


def test_a_quarter_of_a_token_per_byte_until_something_is_known() -> None:
    """Rounded up, so that nothing is free."""
    assert Lengths().tokens("m", 1_001) == 251
    assert Lengths().tokens("m", 1) == 1


def test_it_is_learnt_for_each_model() -> None:
    """One model's tokenizer says nothing of another's."""
    lengths = Lengths()
    for _ in range(20):
        lengths.observe("dense", tokens=500, size_bytes=1_000)
    assert lengths.tokens("dense", 1_000) == pytest.approx(500, abs=2)
    assert lengths.tokens("other", 1_000) == 250


@pytest.mark.parametrize(("tokens", "size_bytes"), [(30, 100), (0, 1_000)])
def test_what_says_little_teaches_nothing(tokens: int, size_bytes: int) -> None:
    """A short prompt measures the template; none at all is no count."""
    lengths = Lengths()
    lengths.observe("m", tokens=tokens, size_bytes=size_bytes)
    assert lengths.tokens("m", 1_000) == 250


def test_no_engine_makes_a_prompt_absurd() -> None:
    """However an engine counts, a token is a byte at least and sixteen at most."""
    lengths = Lengths()
    lengths.observe("huge", tokens=10**9, size_bytes=1_000)
    lengths.observe("tiny", tokens=1, size_bytes=10**6)
    assert lengths.tokens("huge", 1_600) == 1_600
    assert lengths.tokens("tiny", 1_600) == 100


def test_a_bounded_number_of_models_is_remembered() -> None:
    """At the limit the one that was not asked for longest is forgotten."""
    lengths = Lengths()
    for number in range(LENGTHS_MAX):
        lengths.observe(f"m{number}", tokens=500, size_bytes=1_000)
    lengths.observe("m0", tokens=500, size_bytes=1_000)
    lengths.observe("new", tokens=500, size_bytes=1_000)
    assert repr(lengths) == f"<Lengths of {LENGTHS_MAX} models>"
    assert lengths.tokens("m1", 1_000) == 250
    assert lengths.tokens("m0", 1_000) == 500
