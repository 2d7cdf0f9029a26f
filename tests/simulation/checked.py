"""The real scheduler, each of its decisions held against the rules.

By weighted fair queueing alone (`STRICT`) the oracle says what must be decided. With the other
rules on, that no decision leaves the window, that no idle node is left beside who waits for it, and
that nobody is passed over for ever. In both, that charges are exact (`books`) and that nobody comes
further ahead than the bound (`siblings`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from anser.core.events import (
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Start,
    Submitted,
    Weighed,
    Why,
)
from anser.core.job import Job
from anser.core.rules import STRICT, Rules
from anser.core.scheduler import Scheduler
from anser.core.slots import Lane, NodeSlots
from tests.property.oracle import Oracle
from tests.simulation.books import Books
from tests.simulation.siblings import Siblings

__all__ = ["RETRIES_MAX", "CheckedScheduler"]

RETRIES_MAX = 3


class CheckedScheduler(Scheduler):
    """`handle` and check; `limits_of(job)` is for `Books`.

    `audit` judges what a lease is said to have been when it ends; `tell` takes the story.
    """

    def __init__(
        self,
        queued_max: int,
        rules: Rules,
        *,
        limits_of: Callable[[Job], tuple[int, int]],
        audit: Callable[[Job, Finished | Failed], None],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(queued_max, RETRIES_MAX, rules)
        self._oracle: Oracle | None = None
        if rules is STRICT:
            self._oracle = Oracle(queued_max=queued_max, retries_max=RETRIES_MAX)
        self._audit, self._tell = audit, tell
        self.books = Books(self, limits_of)
        self.siblings = Siblings(self._shares._root, self.books, rules.window)
        self.events = 0
        self.broken: AssertionError | None = None  # the first; what follows comes of it
        self._passed: Counter[str] = Counter()  # requests, by how many of their member's others
        self.out_of_tries: set[str] = set()
        self.pushed_out: set[str] = set()  # of a full queue, by others

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Handle and check."""
        self.events += 1
        try:
            return self._handle(event, now)
        except AssertionError as error:
            self.broken = self.broken or error
            raise

    def _handle(self, event: Event, now: float) -> list[Decision]:
        job = self._note(event)
        decisions = super().handle(event, now)
        if self._oracle is not None:
            self._oracle.check(event, decisions, now)
            self._oracle.compare(self)
        if job is not None:
            self.books.compare(job)
        self._note_all(decisions, event)
        self._check_idle()
        self.siblings.look(regrouped=isinstance(event, NodeChanged | NodeGone))
        return decisions

    def _note(self, event: Event) -> Job | None:
        """Write down what an event charges, before anything follows from it."""
        if isinstance(event, Weighed):
            self.books.weighed(event)
        if not isinstance(event, Progressed | Finished | Failed):
            return None
        job = self.books.told(event)
        if job is not None:
            self.siblings.charged(job)
            if not isinstance(event, Progressed):
                self._tell(f"{event.lease} {'is over' if isinstance(event, Finished) else 'fails'}")
                self._audit(job, event)
        return job

    def _note_all(self, decisions: list[Decision], event: Event) -> None:
        own = event.request.id if isinstance(event, Submitted) else None
        for decision in decisions:
            match decision:
                case Start(lease=lease, why=why):
                    self._tell(f"{lease.node} takes {lease.id}: {why.rule.value}")
                    self.books.compare(self._leases[lease.id])
                case Refused(request=request, code=code):
                    self._tell(f"{request} is refused: {code}")
                    if code == "retries_exhausted":
                        self.out_of_tries.add(request)
                    elif code == "overloaded" and request != own:
                        self.pushed_out.add(request)
                case _:
                    pass

    def _start(self, job: Job, node: NodeSlots, why: Why) -> Start:
        lanes = [lane for lane in self._slots.waiting_for(node) if lane.pool is job.lane.pool]
        self.check_decision(job, lanes)
        self.siblings.started(job, lanes)
        start = super()._start(job, node, why)
        self.books.started(job)
        self.siblings.charged(job)
        return start

    def check_decision(self, job: Job, lanes: list[Lane]) -> None:
        """Assert that `job` may have a slot for which those in `lanes` wait."""
        pool = job.lane.pool
        for account, parent in job.account.path:
            least = parent.least(lanes)
            if least is not None:
                ahead = account.key_in(pool) - least.key_in(pool)
                assert ahead <= self.rules.window, f"{account.member} is {ahead} ahead"
        self._check_turn(job, lanes)

    def _check_turn(self, job: Job, lanes: list[Lane]) -> None:
        """The oldest of a member's requests is not passed over for ever by its others."""
        rules, waited_in = self.rules, [lane for lane in lanes if lane in job.account.lanes]
        oldest = job.account.oldest(waited_in) if waited_in else job
        if oldest.key < job.key:
            self._passed[oldest.id] += 1
            passed, waited_s = self._passed[oldest.id], self._now - oldest.since
            long = waited_s >= rules.patience_s and passed > rules.passed_max
            assert not long, f"{oldest.id} has waited {waited_s} s, and {passed} have passed it"

    def _check_idle(self) -> None:
        """A node with nothing to do takes what waits for it, unless that waits for another."""
        if not self.queued:
            return
        for node in self._slots.nodes():
            if node.slots and not node.taken and self._slots.waiting_for(node):
                waiting = [job for job in self._jobs.values() if job.node is None]
                holding = (job.hold_until for job in waiting if job.hold_until is not None)
                assert any(until > self._now for until in holding), f"{node.id} has nothing to do"
