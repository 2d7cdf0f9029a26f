"""What one member may have at once and over time, reserved before admission.

Theory of operation. Tokens per minute and per day are token buckets: a bucket holds at most its
limit and refills evenly, so there is no window edge to wait for and the time until a request fits
is exact. A request takes its estimate when it is admitted and gives back or pays the difference
when it ends; a bucket may therefore be in debt. Times are monotonic seconds, so a clock that jumps
changes nothing.

A request is open from its admission to its end, and queued while it waits for a slot: the one limit
bounds both kinds together, the other those that wait.

Invariants: 0 <= queued <= open; a bucket's level never exceeds its limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anser.core.errors import LimitReached
from anser.core.members import Limits

__all__ = ["Allowance", "Bucket"]

MINUTE_S = 60.0
DAY_S = 86_400.0


@dataclass(slots=True)
class Bucket:
    """A token bucket of `limit` tokens that refills in `period_s` seconds."""

    limit: int
    period_s: float
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = float(self.limit)

    def available(self, now: float) -> float:
        """Tokens that may be taken at `now`; negative while in debt."""
        if now > self.at:
            refilled = self.level + (now - self.at) * self.limit / self.period_s
            self.level, self.at = min(float(self.limit), refilled), now
        return self.level

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until `tokens` can be taken; 0.0 if they can be now."""
        missing = min(tokens, self.limit) - self.available(now)
        return max(0.0, missing * self.period_s / self.limit)

    def take(self, tokens: int, now: float) -> None:
        """Take `tokens`, or give them back if negative; the level may become negative."""
        self.level = min(float(self.limit), self.available(now) - tokens)


@dataclass(slots=True)
class Allowance:
    """One member's open requests and token buckets."""

    limits: Limits
    open: int = 0
    queued: int = 0
    minute: Bucket | None = field(init=False)
    day: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        self.minute = _bucket(self.limits.tokens_per_minute, MINUTE_S)
        self.day = _bucket(self.limits.tokens_per_day, DAY_S)

    def __repr__(self) -> str:
        return f"<Allowance open={self.open} queued={self.queued} {self.minute} {self.day}>"

    def validate(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.queued <= self.open, self
        for bucket in self._buckets():
            assert bucket.level <= bucket.limit, self

    def check(self, member: str, *, tokens: int, now: float) -> None:
        """Raise LimitReached if one more request of `tokens` may not be admitted now."""
        limits = self.limits
        if limits.in_flight_max is not None and self.open >= limits.in_flight_max:
            raise LimitReached(
                f"{member} has {self.open} requests in flight, waiting or running,"
                " the most that it may.",
                retry_after_s=1.0,
            )
        if limits.queued_max is not None and self.queued >= limits.queued_max:
            raise LimitReached(
                f"{member} has {self.queued} requests waiting, the most that it may.",
                retry_after_s=1.0,
            )
        for bucket, period in ((self.minute, "minute"), (self.day, "day")):
            if bucket is not None:
                _check_bucket(bucket, period, member, tokens, now)

    def take(self, tokens: int, now: float) -> None:
        """Admit one request of `tokens`; `check` has passed just before."""
        self.open += 1
        self.queued += 1
        self.adjust(tokens, now)

    def adjust(self, tokens: int, now: float) -> None:
        """Take `tokens` more, or give them back if negative."""
        if self.minute is not None:
            self.minute.take(tokens, now)
        if self.day is not None:
            self.day.take(tokens, now)

    def change(self, limits: Limits, now: float) -> None:
        """Other limits from now on; what is open and what was used stays counted."""
        self.limits = limits
        self.minute = _changed(self.minute, limits.tokens_per_minute, MINUTE_S, now)
        self.day = _changed(self.day, limits.tokens_per_day, DAY_S, now)

    def _buckets(self) -> list[Bucket]:
        return [bucket for bucket in (self.minute, self.day) if bucket is not None]


def _bucket(limit: int | None, period_s: float) -> Bucket | None:
    return Bucket(limit, period_s) if limit else None


def _changed(
    before: Bucket | None, limit: int | None, period_s: float, now: float
) -> Bucket | None:
    after = _bucket(limit, period_s)
    if before is not None and after is not None:
        after.at = now
        after.level -= before.limit - before.available(now)
    return after


def _check_bucket(bucket: Bucket, period: str, member: str, tokens: int, now: float) -> None:
    wait_s = bucket.wait_s(tokens, now)
    if wait_s > 0:
        raise LimitReached(
            f"{member} may use {bucket.limit} tokens per {period}; this request of about {tokens}"
            f" fits in {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )
