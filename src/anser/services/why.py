"""Why a request waited, and why it went to the node that it went to: kept for a while, to be told.

Theory of operation. Each request that the scheduler was told of has a trail: when it came and what
was waiting then, each lease that it was given with the rule and the keys that decided it, and what
it was refused for, if it was. Nothing of a prompt is in it. Trails are in memory only; beyond
WHY_MAX the oldest one is forgotten.

Invariants: there are at most WHY_MAX trails; the steps of each are in the order of time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from anser.core.events import Lease, Request, Why
from anser.core.limits import WHY_MAX

__all__ = ["Step", "Trail", "Whys"]


@dataclass(slots=True, kw_only=True)
class Step:
    """One lease: how long it was waited for, why it was given, and what ended it too early."""

    lease: Lease
    waited_s: float
    why: Why
    hedge: bool = False  # it is the second of two at once
    error: str | None = None
    delivered_tokens: int = 0  # before that


@dataclass(slots=True, kw_only=True)
class Trail:
    """What became of one request, as far as the scheduler decided it. Times are monotonic."""

    request: Request
    came_ms: int  # Unix time
    queued: int  # requests that waited when it came,
    queued_own: int  # and those of its own member
    waits_since: float | None
    waited_before_s: float = 0.0
    steps: list[Step] = field(default_factory=list[Step])
    ended: str | None = None  # why it was given no lease, or no more: an error's code, "cancelled"
    retry_after_s: float | None = None

    def waited_s(self, now: float) -> float:
        """How long it has waited for slots, in all."""
        return self.waited_before_s + (0.0 if self.waits_since is None else now - self.waits_since)

    def began(self, lease: Lease, why: Why, now: float) -> None:
        """It was given a slot."""
        before_s = self.waited_before_s
        self._stop_waiting(now)
        hedge = lease.request != self.request.id and lease.attempt == 1
        waited_s = self.waited_before_s - before_s
        self.steps.append(Step(lease=lease, waited_s=waited_s, why=why, hedge=hedge))

    def waits_again(self, lease: str, error: str, now: float, *, delivered_tokens: int = 0) -> None:
        """The node of this lease has failed, after so many tokens that have reached the client."""
        self.lost(lease, error, delivered_tokens=delivered_tokens)
        self.waits_since = now

    def lost(self, lease: str, error: str, *, delivered_tokens: int = 0) -> None:
        """This lease has ended too early; it may have another one."""
        for step in self.steps:
            if step.lease.id == lease:
                step.error, step.delivered_tokens = error, delivered_tokens

    def withdraw(self, lease: str) -> None:
        """This lease was given back before anything came of it."""
        self.steps = [step for step in self.steps if step.lease.id != lease]

    def end(self, code: str, now: float, *, retry_after_s: float | None = None) -> None:
        """It gets no slot any more; told once, the first reason counts."""
        if self.ended is None:
            self.ended, self.retry_after_s = code, retry_after_s
            self._stop_waiting(now)

    def _stop_waiting(self, now: float) -> None:
        self.waited_before_s, self.waits_since = self.waited_s(now), None


@dataclass(slots=True)
class Whys:
    """The trails of the newest requests, by request."""

    most: int = WHY_MAX
    _trails: OrderedDict[str, Trail] = field(default_factory=OrderedDict[str, Trail])

    def __repr__(self) -> str:
        return f"<Whys {len(self._trails)}/{self.most}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert len(self._trails) <= self.most, self
        for trail in self._trails.values():
            attempts = [step.lease.attempt for step in trail.steps]
            assert attempts == sorted(attempts), trail

    def add(self, trail: Trail) -> None:
        """A request has come."""
        name = trail.request.id
        self._trails[name] = trail
        self._trails.move_to_end(name)
        if len(self._trails) > self.most:
            self._trails.popitem(last=False)

    def find(self, request: str) -> Trail | None:
        """The trail of this request, if it is still kept."""
        return self._trails.get(request)
