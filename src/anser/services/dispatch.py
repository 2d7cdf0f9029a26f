"""The requests in flight, and what the scheduler decides for them.

Theory of operation. Whatever happens to a request is told to the scheduler here, and nowhere else
(`tell`): each of its decisions wakes the request's own task, by the future that it waits for. So
a request that waits learns within one call that it has a slot, or that it will never have one.

Invariants: the scheduler knows no request that is not in flight here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from anser.core.errors import AnserError, DeadlineUnreachable, EngineError, Overloaded
from anser.core.events import (
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    Lease,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.ledger import Usage
from anser.core.scheduler import Scheduler
from anser.ports import Clock
from anser.services.fairness import Fairness
from anser.services.run import Run, come_back_s
from anser.services.why import Trail, Whys

__all__ = ["Dispatch"]


@dataclass(slots=True, kw_only=True)
class Dispatch:
    """The scheduler's voice: what it decides reaches the request that it is about."""

    scheduler: Scheduler
    clock: Clock
    hopeless: Callable[[str], AnserError | None]  # why a model will not be served soon, if so
    weight_of: Callable[[str], int]  # a member's, in thousandths
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    runs: dict[str, Run] = field(default_factory=dict[str, Run])
    whys: Whys = field(default_factory=Whys)
    fairness: Fairness = field(init=False)

    def __post_init__(self) -> None:
        self.empty.set()
        self.fairness = Fairness(self.scheduler, self.weight_of)

    def __repr__(self) -> str:
        return f"<Dispatch runs={len(self.runs)} {self.scheduler!r}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        self.scheduler.validate()
        self.whys.validate()
        self.fairness.validate()
        assert self.scheduler.queued + self.scheduler.running <= len(self.runs), self
        assert self.empty.is_set() == (not self.runs), self

    def submit(self, run: Run, request: Request) -> None:
        """Let `run` start or wait. Raises what it is refused for at once: it was never here."""
        self.add(run)
        trail = Trail(
            request=request,
            came_ms=run.queued_ms,
            queued=self.scheduler.queued,
            queued_own=self.scheduler.queued_of(request.member),
            waits_since=self.clock.now(),
        )
        self.whys.add(trail)
        self.tell(Submitted(request=request))
        if run.ready.done() and (refusal := run.ready.exception()) is not None:
            self.remove(run)
            raise refusal

    def add(self, run: Run) -> None:
        """It is about to be told to the scheduler."""
        self.runs[run.job] = run
        self.empty.clear()

    def withdraw(self, shadow: Run, event: Cancelled | Failed) -> None:
        """By this event a second lease ends, or is wanted no more, before anything came of it."""
        trail = self.whys.find(shadow.demand.id)
        if trail is not None and shadow.lease is not None:
            trail.withdraw(shadow.lease.id)
        self.tell(event)
        self.remove(shadow)

    def swap(self, run: Run, shadow: Run) -> None:
        """The second lease becomes the request's own, and the first one its shadow's."""
        run.swap(shadow)
        self.runs[run.job], self.runs[shadow.job] = run, shadow

    def ended_early(self, run: Run, lease: Lease, code: str) -> None:
        """One of its two leases has failed, or was slower than the other."""
        trail = self.whys.find(run.demand.id)
        if trail is not None:
            trail.lost(lease.id, code)

    def lost(self, run: Run, lease: Lease, error: EngineError, *, delivered: Usage) -> bool:
        """Its node has failed, having delivered that: returns whether it waits or runs again."""
        trail = self.whys.find(run.demand.id)
        if trail is not None:
            tokens = delivered.completion_tokens
            trail.waits_again(lease.id, error.code, self.clock.now(), delivered_tokens=tokens)
        refusals = self.tell(Failed(lease=lease.id, delivered=delivered, retry=True))
        return all(refused.request != run.job for refused in refusals)

    def left(self, run: Run, code: str | None) -> None:
        """It waits no longer: it has failed by this code, or its client has left."""
        self._ended(run.demand.id, code or "cancelled")
        self.tell(Cancelled(request=run.job))

    def remove(self, run: Run) -> None:
        """It has ended."""
        del self.runs[run.job]
        if run.ready.done():
            run.ready.exception()  # a client that has just left does not ask for it any more
        if not self.runs:
            self.empty.set()

    def tell(self, event: Event) -> list[Refused]:
        """Give the scheduler an event and act on all of its decisions; returns its refusals."""
        refusals: list[Refused] = []
        now = self.clock.now()
        match event:
            case Progressed(lease=lease, tokens=tokens):
                self.fairness.progressed(lease, tokens, now)
            case Finished(lease=lease, usage=usage) | Failed(lease=lease, delivered=usage):
                self.fairness.ended(lease, usage, now)
            case _:
                pass
        for decision in self.scheduler.handle(event, now):
            self._act(decision, refusals)
        return refusals

    def weighed(self, member: str, weight: int) -> None:
        """A member's weight among its siblings, from now on."""
        self.tell(Weighed(member=member, weight=weight))

    def fleet_changed(self, event: NodeChanged | NodeGone) -> None:
        """What a node lends has changed; whoever waits for what will not come is told so."""
        self.tell(event)
        for run in self.runs.values():
            if run.lease is None and not run.ready.done():
                hopeless = self.hopeless(run.demand.model)
                if hopeless is not None:
                    run.ready.set_exception(hopeless)

    def wall_ms(self) -> int:
        """Unix time in milliseconds."""
        return int(self.clock.wall() * 1_000)

    def _act(self, decision: Decision, refusals: list[Refused]) -> None:
        match decision:
            case Start(lease=lease):
                self.fairness.began(decision, self.clock.now())
                run = self.runs[lease.request]
                trail = self.whys.find(run.demand.id)
                if trail is not None:
                    trail.began(lease, decision.why, self.clock.now())
                run.lease, run.lease_started_ms = lease, run.moment(self.wall_ms())
                run.rule, run.told = decision.why.rule, 0
                if not run.ready.done():  # else its client has just left
                    run.ready.set_result(lease)
            case Refused(code="overloaded" | "deadline"):
                error = _refusal(decision)
                run = self.runs[decision.request]
                self._ended(run.demand.id, error.code, retry_after_s=error.retry_after_s)
                if not run.ready.done():  # else its client has just left
                    run.ready.set_exception(error)
            case Refused():
                self._ended(self.runs[decision.request].demand.id, decision.code)
                refusals.append(decision)
            case _:  # Abort: the request's own task stops its engine
                pass

    def _ended(self, request: str, code: str, *, retry_after_s: float | None = None) -> None:
        trail = self.whys.find(request)
        if trail is not None:
            trail.end(code, self.clock.now(), retry_after_s=retry_after_s)


def _refusal(refused: Refused) -> AnserError:
    retry_after_s = come_back_s(refused.retry_after_s)
    if refused.code == "overloaded":
        message = "This platform has as many requests waiting as it takes."
        return Overloaded(message, retry_after_s=retry_after_s)
    message = "No slot is expected to become free by the request's deadline."
    return DeadlineUnreachable(message, retry_after_s=retry_after_s)
