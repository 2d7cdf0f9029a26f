"""core.allowance: what one member may have at once and over time."""

from __future__ import annotations

import pytest

from anser.core.allowance import Allowance, Bucket
from anser.core.errors import LimitReached
from anser.core.members import Limits


def test_a_bucket_starts_full_and_refills_evenly() -> None:
    """A bucket holds its limit at first and gains limit/period each second."""
    bucket = Bucket(limit=60, period_s=60.0)
    bucket.take(60, now=0.0)
    assert bucket.available(0.0) == 0
    assert bucket.available(15.0) == pytest.approx(15)
    assert bucket.available(1_000.0) == 60


def test_a_bucket_never_refills_backwards() -> None:
    """A time before the last one changes nothing."""
    bucket = Bucket(limit=60, period_s=60.0)
    bucket.take(60, now=100.0)
    assert bucket.available(50.0) == 0


def test_a_bucket_may_be_in_debt_and_tells_the_exact_wait() -> None:
    """What an answer cost more than its estimate is owed, and waiting pays it."""
    bucket = Bucket(limit=60, period_s=60.0)
    bucket.take(90, now=0.0)
    assert bucket.available(0.0) == -30
    assert bucket.wait_s(10, now=0.0) == pytest.approx(40.0)
    assert bucket.wait_s(10, now=40.0) == 0.0


def test_a_request_larger_than_the_bucket_fits_when_it_is_full() -> None:
    """An estimate above the limit waits for a full bucket, not for ever."""
    bucket = Bucket(limit=60, period_s=60.0)
    assert bucket.wait_s(1_000, now=0.0) == 0.0


def test_giving_back_never_overfills() -> None:
    """A refund cannot lift a bucket above its limit."""
    bucket = Bucket(limit=60, period_s=60.0)
    bucket.take(-30, now=0.0)
    assert bucket.available(0.0) == 60


def test_other_limits_keep_what_was_used() -> None:
    """A changed limit holds at once, and renews nobody's minute or day."""
    allowance = Allowance(Limits(tokens_per_minute=100, tokens_per_day=1_000))
    allowance.take(80, now=0.0)
    allowance.change(Limits(tokens_per_minute=60, in_flight_max=1), now=0.0)
    allowance.validate()
    assert allowance.minute is not None
    assert allowance.minute.available(0.0) == pytest.approx(-20)
    assert allowance.day is None
    with pytest.raises(LimitReached, match="in flight"):
        allowance.check("a", tokens=1, now=0.0)
    allowance.change(Limits(tokens_per_day=5), now=0.0)
    assert (allowance.minute, allowance.open) == (None, 1)
    allowance.check("a", tokens=5, now=0.0)


@pytest.mark.parametrize("limit", [1, 3])
def test_in_flight_is_refused_at_the_limit(limit: int) -> None:
    """Exactly `in_flight_max` requests are open at once; the next is refused with a way out."""
    allowance = Allowance(Limits(in_flight_max=limit))
    for _ in range(limit):
        allowance.check("a", tokens=1, now=0.0)
        allowance.take(1, now=0.0)
    with pytest.raises(LimitReached, match="in flight") as refused:
        allowance.check("a", tokens=1, now=0.0)
    assert refused.value.retry_after_s is not None
    allowance.open -= 1
    allowance.queued -= 1
    allowance.check("a", tokens=1, now=0.0)
    allowance.validate()


def test_waiting_is_refused_at_the_limit() -> None:
    """Exactly `queued_max` requests wait; one that starts makes room."""
    allowance = Allowance(Limits(queued_max=1))
    allowance.take(1, now=0.0)
    with pytest.raises(LimitReached, match="waiting"):
        allowance.check("a", tokens=1, now=0.0)
    allowance.queued -= 1
    allowance.check("a", tokens=1, now=0.0)


@pytest.mark.parametrize(
    ("limits", "wait_s", "period"),
    [
        (Limits(tokens_per_minute=60), 30.0, "minute"),
        (Limits(tokens_per_day=86_400), 30.0, "day"),
    ],
)
def test_tokens_are_refused_with_the_time_until_they_fit(
    limits: Limits, wait_s: float, period: str
) -> None:
    """The refusal's retry_after_s is exact: a moment before it is refused, then it is admitted."""
    allowance = Allowance(limits)
    full = limits.tokens_per_minute or limits.tokens_per_day or 0
    allowance.take(full, now=0.0)
    with pytest.raises(LimitReached, match=f"per {period}") as refused:
        allowance.check("a", tokens=30, now=0.0)
    assert refused.value.retry_after_s == pytest.approx(wait_s)
    with pytest.raises(LimitReached):
        allowance.check("a", tokens=30, now=wait_s - 0.1)
    allowance.check("a", tokens=30, now=wait_s)


def test_no_limits_refuse_nothing_and_say_so() -> None:
    """`None` is no limit, and the representation shows the state."""
    allowance = Allowance(Limits())
    for _ in range(1_000):
        allowance.check("a", tokens=10**9, now=0.0)
        allowance.take(10**9, now=0.0)
    allowance.validate()
    assert "open=1000" in repr(allowance)


def test_a_broken_count_is_found() -> None:
    """validate() asserts that no more wait than are open, and that no bucket overflows."""
    allowance = Allowance(Limits(tokens_per_minute=5), queued=1)
    with pytest.raises(AssertionError):
        allowance.validate()
    allowance = Allowance(Limits(tokens_per_minute=5))
    assert allowance.minute is not None
    allowance.minute.level = 6
    with pytest.raises(AssertionError):
        allowance.validate()
