"""core.pattern: which regular expressions may be written out as a grammar."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anser.core import limits
from anser.core.pattern import PatternError, check_pattern
from tests.cost import measured

FINE = [
    "",
    "^$",
    "^[A-Z][a-z]*$",
    r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})$",
    "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$",
    r"^(\d{1,3}\.){3}\d{1,3}$",
    "^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$",
    r"^[^@\s]+@[\w.-]+\.\w{2,}$",
    "^(?:a|b|(c|d)*)+?$",
    "(?<year>[0-9]{4})(?=x)(?!y)(?<=z)(?<!z)",
    "^[]{9}[^]a]{2,3}\\]{2}$",
    "a{,3}b{2,}c{}d{,}e{x}{",
    "^(a*)*(b?)+$",
    "^a{1000}$",
    "\\(\\)\\[",
    "^(a{0,9}|b){1}$",
]
REFUSED = {
    "^a{3,1}$": "at most less often",
    "^a{1001}$": "more than 1000 parts",
    "^(a{0,1000}){0,1000}$": "may be empty",
    "^((a{1,50}){1,50}){1,50}$": "more than 1000 parts",
    "^(a?){2}$": "may be empty",
    "^(a|){0,3}$": "may be empty",
    "^(^){2}$": "may be empty",
    "^a{1000000}$": "too often",
    "^a{1,18446744073709551615}$": "too often",
    "^(a": "not closed",
    "^a)": "too many",
    "^a\\": "middle",
    "^[a": "middle",
    "(" * 100 + ")" * 100: "too deeply",
    "a" * 1_001: "more than 1000 parts",
}


@pytest.mark.parametrize("pattern", FINE)
def test_ordinary_patterns_pass(pattern: str) -> None:
    """What people write passes: dates, addresses, identifiers."""
    check_pattern(pattern)


@pytest.mark.parametrize(("pattern", "words"), REFUSED.items())
def test_exploding_patterns_are_refused(pattern: str, words: str) -> None:
    """What would be written out to millions of parts, or cannot be read, is refused."""
    with pytest.raises(PatternError, match=words):
        check_pattern(pattern)


@given(st.text(alphabet="ab(){}[]|*+?\\^$,0129:=<!", max_size=limits.SCHEMA_PATTERN_CHARS_MAX))
def test_any_pattern_is_read_at_once(pattern: str) -> None:
    """Whatever text comes is passed or refused, in bounded time."""
    with measured() as cost:
        assert refusal(pattern) != ""
    assert cost.million_steps < 100


ATOMS = st.sampled_from(["a", "[ab]", "\\d", "."])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_what_may_be_empty_is_known(expression: str) -> None:
    """Twice a part is refused exactly where the part matches the empty text."""
    assume(refusal(expression) is None)
    assert re.compile(expression)
    told = refusal(f"({expression}){{2}}")
    assert (told is not None) == (re.fullmatch(expression, "") is not None)
    assert told is None or "may be empty" in told


def refusal(pattern: str) -> str | None:
    try:
        check_pattern(pattern)
    except PatternError as error:
        return str(error)
    return None
