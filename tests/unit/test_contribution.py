"""Contribution: what earns it, how it fades, and that it never buys everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.core.contribution import (
    HALF_LIFE_S,
    PLATFORM,
    Contributions,
    Credit,
    added_weight,
    credit_of,
)
from anser.core.ledger import INTEGER_MAX, Outcome, Receipt, Usage
from tests.receipts import by_node_of, make_receipt, receipts

MEMBERS = ("a", "b", "c", "d")
amounts = st.dictionaries(st.sampled_from((*MEMBERS, PLATFORM)), st.integers(0, 10**15))
weights = st.dictionaries(st.sampled_from(MEMBERS), st.integers(1, 10**9), min_size=1)


def earned_by(owner: str, micro_credits: int, at: float) -> Credit:
    """So much, at this second."""
    return Credit(owner=owner, micro_credits=micro_credits, at_ms=round(at * 1_000))


def given_by(amounts: dict[str, int]) -> Contributions:
    """Contributions of these owners, now."""
    contributions = Contributions()
    for owner, amount in amounts.items():
        contributions.add(earned_by(owner, amount, 0.0))
    contributions.validate()
    return contributions


def raised(awake: dict[str, int], parts: dict[str, float], public: float) -> dict[str, int]:
    """The weights that apply among these."""
    whole = sum(awake.values())
    return {
        member: weight + added_weight(parts.get(member, 0.0), awake=whole, public_share=public)
        for member, weight in awake.items()
    }


def test_serving_others_is_credited_as_it_is_priced() -> None:
    """The owner of a node earns the price of what reached others: fresh 1, cached 0.1, output 4."""
    usage = Usage(prompt_tokens=30, cached_tokens=10, completion_tokens=5)
    earned = credit_of(by_node_of("uni", make_receipt(1, member="lab/ocean", usage=usage)))
    assert earned is not None
    assert (earned.owner, earned.micro_credits) == ("uni", 41_000_000)
    assert earned.at_ms == make_receipt(1).ended_ms
    cancelled = by_node_of("", make_receipt(1, outcome=Outcome.CANCELLED, usage=usage))
    earned = credit_of(cancelled)
    assert earned is not None
    assert (earned.owner, earned.micro_credits) == (PLATFORM, 41_000_000)


def test_who_goes_on_with_an_answer_earns_the_rest() -> None:
    """What a node that has died had written of it is nobody's credit."""
    usage = Usage(prompt_tokens=30, cached_tokens=10, completion_tokens=5)
    whole = by_node_of("uni", make_receipt(1, member="lab/ocean", usage=usage))
    died = replace(whole.leases[0], completion_tokens=3, error="engine_broken")
    last = replace(whole.leases[0], completion_tokens=2)
    earned = credit_of(replace(whole, leases=(died, last)))
    assert earned is not None
    assert earned.micro_credits == 29_000_000
    odd = replace(whole, leases=(replace(died, completion_tokens=9), last))
    earned = credit_of(odd)
    assert earned is not None
    assert earned.micro_credits == 21_000_000, "an engine that claims fewer than came"


@pytest.mark.parametrize("member", ["uni", "uni/ai", "uni/ai/li"])
def test_work_for_oneself_earns_nothing(member: str) -> None:
    """Nor does work for anything below; a name that only begins alike is another's."""
    assert credit_of(by_node_of("uni", make_receipt(1, member=member))) is None
    assert credit_of(by_node_of("uni", make_receipt(1, member="uni-b/ai"))) is not None


def test_what_was_broken_off_or_is_too_old_earns_nothing() -> None:
    """A node that fails in its answer earns nothing, nor does one of which no owner was noted."""
    assert credit_of(by_node_of("uni", make_receipt(1, outcome=Outcome.FAILED))) is None
    assert credit_of(by_node_of(None, make_receipt(1))) is None
    assert credit_of(by_node_of("uni", make_receipt(1, usage=Usage()))) is None


@given(receipt=receipts)
def test_no_receipt_earns_too_much(receipt: Receipt) -> None:
    """Whatever a receipt says, its credit is a positive number that JSON and stores carry."""
    earned = credit_of(receipt)
    assert earned is None or 0 < earned.micro_credits <= INTEGER_MAX


def test_it_fades_by_half_in_seven_days() -> None:
    """What was contributed long ago counts little, however much it was."""
    contributions = Contributions()
    assert contributions.amount("a", 0.0) == 0.0
    contributions.add(earned_by("a", 1_000, 0.0))
    assert contributions.amount("a", HALF_LIFE_S) == pytest.approx(500)
    contributions.add(earned_by("a", 1_000, HALF_LIFE_S))
    assert contributions.amount("a", 2 * HALF_LIFE_S) == pytest.approx(750)


@given(st.permutations([(0.0, "a"), (3.0, "b"), (9.9, "a"), (10.1, "b"), (19.0, "a"), (19.0, "b")]))
def test_the_order_in_which_it_is_told_is_no_matter(order: list[tuple[float, str]]) -> None:
    """Receipts give the same contribution in whatever order they are read."""
    contributions = Contributions()
    for half_lives, owner in order:
        contributions.add(earned_by(owner, 1_000_000, half_lives * HALF_LIFE_S))
    contributions.validate()
    expected = {"a": 1 + 2**-9.1 + 2**-19, "b": 1 + 2**-8.9 + 2**-16}
    for owner, amount in expected.items():
        found = contributions.amount(owner, 19.0 * HALF_LIFE_S)
        assert found == pytest.approx(1_000_000 * amount, abs=1.0)


@given(times=st.lists(st.floats(0.0, 1e13), max_size=8), now=st.floats(0.0, 1e13))
def test_no_clock_breaks_it(times: list[float], now: float) -> None:
    """Whatever the clock says, forwards or back, amounts stay finite and do not grow by waiting."""
    contributions = Contributions()
    for at in times:
        contributions.add(earned_by("a", INTEGER_MAX, at))
        contributions.validate()
    assert 0.0 <= contributions.amount("a", now) < 1e19 * max(1, len(times))
    assert all(0.0 <= part <= 1.0 for part in contributions.parts().values())


def test_a_clock_that_was_far_ahead_is_got_over() -> None:
    """What is contributed once it is right again counts as ever, beside what came before."""
    contributions = Contributions()
    century = 100 * 365 * 86_400.0
    for at in (0.0, century, 60.0, 120.0):
        contributions.add(earned_by("a" if at else "b", 1_000_000, at))
    contributions.validate()
    assert contributions.amount("a", 120.0) == pytest.approx(3_000_000, rel=0.001)


def test_the_old_is_forgotten() -> None:
    """After years nothing grows without end, and who has stopped long ago is not kept."""
    contributions = given_by({"old": 1_000_000})
    for week in range(1, 200):
        contributions.add(earned_by("a", 1_000_000, week * HALF_LIFE_S))
    contributions.validate()
    assert len(contributions) == 1
    assert contributions.amount("a", 199 * HALF_LIFE_S) == pytest.approx(2_000_000)
    assert repr(contributions) == "<Contributions of 1>"


def test_the_platforms_own_nodes_count_for_nobody() -> None:
    """Who gives a tenth of what the platform gives has an eleventh of all, not everything."""
    assert given_by({PLATFORM: 1_000, "a": 100}).parts() == {"a": pytest.approx(1 / 11)}
    assert given_by({PLATFORM: 1_000}).parts() == {}
    assert given_by({"a": 0}).parts() == {}


def test_a_contributor_among_others() -> None:
    """With a public share of 30 %, one that contributed everything gets 70 % and its base."""
    weights = raised({"a": 1_000, "b": 1_000}, given_by({"a": 500}).parts(), 0.3)
    assert weights["b"] == 1_000
    assert weights["a"] / sum(weights.values()) == pytest.approx(0.7 + 0.3 / 2, abs=0.001)


@given(amounts=amounts, awake=weights, public=st.sampled_from((0.01, 0.1, 0.3, 1.0)))
def test_the_guarantee(amounts: dict[str, int], awake: dict[str, int], public: float) -> None:
    """Whoever is there, a contributor has (1 - b) of its part of all contribution and its base.

    It never has more than 1 - b and its base; those without contribution keep b of what they had.
    """
    weights = raised(awake, given_by(amounts).parts(), public)
    total, base = sum(weights.values()), sum(awake.values())
    given = sum(amounts.values()) or 1
    rounding = len(awake) / total
    for member, own in awake.items():
        part = amounts.get(member, 0) / given
        share = weights[member] / total
        assert share >= public * own / base + (1 - public) * part - rounding
        assert share <= 1 - public + public * own / base + rounding
    others = [member for member in awake if not amounts.get(member)]
    kept = sum(weights[member] for member in others) / total
    assert kept >= public * sum(awake[member] for member in others) / base - rounding


def test_no_weight_is_beyond_what_json_carries() -> None:
    """Absurd weights add up to no number that a reader of JSON would change."""
    most = added_weight(1.0, awake=10**9 * 1_000_000, public_share=0.01)
    assert most + 10**9 < INTEGER_MAX
