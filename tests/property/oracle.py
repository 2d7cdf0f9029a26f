"""The scheduler's rules once more, as plainly as they can be said: no heaps, no counters, no haste.

The oracle is told each event together with the decisions that the real scheduler took, and asserts
that the rules allow them. Where the rules leave a choice (equal keys, equally free nodes, when an
account is forgotten) it follows the real one; everything else it computes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from anser.core.events import (
    Abort,
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.account import Account
from anser.core.ledger import Usage
from anser.core.members import ancestry
from anser.core.scheduler import Scheduler

__all__ = ["Job", "Oracle", "Path"]

Path = tuple[str, ...]


@dataclass
class Job:
    """A request that waits or runs."""

    request: Request
    turn: int
    retried: bool = False
    attempt: int = 0
    node: str | None = None
    excluded: set[str] = field(default_factory=set)
    charged: int = 0
    cancelled: bool = False

    @property
    def lease(self) -> str:
        """The present lease."""
        return f"{self.request.id}.{self.attempt}"

    @property
    def path(self) -> Path:
        """Its accounts from the top, with a leaf of its own for who is no person."""
        names = ancestry(self.request.member)
        return names if len(names) == 3 else (*names, f"{names[-1]} itself")


@dataclass
class Books:
    """One account: `paid` at the present weight counts on top of `base`."""

    weight: int
    base: int = 0
    paid: int = 0
    service: int = 0

    @property
    def key(self) -> int:
        """Micro-credits per share."""
        return self.base + self.paid * 1_000 // self.weight


class Oracle:
    """What the scheduler must know, and whether its decisions follow from it."""

    def __init__(self, *, queued_max: int, retries_max: int) -> None:
        self.queued_max, self.retries_max = queued_max, retries_max
        self.slots: dict[str, int] = {}
        self.models: dict[str, frozenset[str]] = {}
        self.jobs: dict[str, Job] = {}
        self.books: dict[Path, Books] = {}
        self.virtual: dict[Path, int] = {}
        self.weights: dict[str, int] = {}
        self.service = 0
        self.turns = 0
        self.dropped = 0

    def check(self, event: Event, decisions: list[Decision]) -> None:
        """Assert that the rules allow these decisions after this event."""
        rest = iter(decisions)
        match event:
            case Submitted():
                self._submitted(event.request, rest)
            case Cancelled():
                self._cancelled(event.request, rest)
            case Progressed() | Finished() | Failed():
                self._leased(event, rest)
            case NodeChanged():
                self.slots[event.node], self.models[event.node] = event.slots, event.models
            case NodeGone():
                self.slots[event.node], self.models[event.node] = 0, frozenset()
            case Weighed():
                self._weighed(event.member, event.weight)
        self._filled(rest)

    def compare(self, scheduler: Scheduler) -> None:
        """Assert that the real books are these; what it has forgotten is forgotten here too."""
        real = dict(_accounts(scheduler))
        self._forget(self.books.keys() - real.keys())
        assert real.keys() == self.books.keys()
        for path, account in real.items():
            books = self.books[path]
            assert account.key == books.key
            assert account.weight == books.weight
            assert account.service == books.service
            assert account.queued == self.queued(path)
        assert scheduler.service == self.service
        assert scheduler.dropped == self.dropped

    # Events

    def _submitted(self, request: Request, rest: Iterator[Decision]) -> None:
        if request.id in self.jobs:
            self.dropped += 1
            return
        self.turns += 1
        job = Job(request, self.turns)
        nodes = self._most_free(job)
        if not nodes and len(self.waiting()) >= self.queued_max:
            assert next(rest) == Refused(request=request.id, code="overloaded")
            return
        self._arrive(job, nodes, rest)

    def _cancelled(self, request: str, rest: Iterator[Decision]) -> None:
        job = self.jobs.get(request)
        if job is None or job.cancelled:
            self.dropped += 1
        elif job.node is None:
            del self.jobs[request]
        else:
            job.cancelled = True
            assert next(rest) == Abort(lease=job.lease)

    def _leased(self, event: Progressed | Finished | Failed, rest: Iterator[Decision]) -> None:
        job = {job.lease: job for job in self.running()}.get(event.lease)
        if job is None:
            self.dropped += 1
            return
        match event:
            case Progressed():
                self._charge(job, price(Usage(completion_tokens=event.tokens), job))
            case Finished():
                self._charge(job, price(event.usage, job) - job.charged)
                del self.jobs[job.request.id]
            case Failed():
                self._charge(job, price(event.delivered, job) - job.charged)
                if not event.retry or job.cancelled:
                    del self.jobs[job.request.id]
                elif job.attempt >= self.retries_max:
                    del self.jobs[job.request.id]
                    refused = Refused(request=job.request.id, code="retries_exhausted")
                    assert next(rest) == refused
                else:
                    self._retried(job, rest)

    def _retried(self, job: Job, rest: Iterator[Decision]) -> None:
        assert job.node is not None
        job.excluded.add(job.node)
        job.retried = True
        nodes = self._most_free(job)  # its own slot is not given back yet
        del self.jobs[job.request.id]
        job.node = None
        self._arrive(job, nodes, rest)

    def _weighed(self, member: str, weight: int) -> None:
        self.weights[member] = weight
        if books := self.books.get(ancestry(member)):
            books.base, books.paid, books.weight = books.key, 0, weight

    # What the rules say

    def waiting(self) -> list[Job]:
        """All that wait."""
        return [job for job in self.jobs.values() if job.node is None]

    def running(self) -> list[Job]:
        """All that run."""
        return [job for job in self.jobs.values() if job.node is not None]

    def free(self, node: str) -> int:
        """Slots of this node that may be taken."""
        taken = sum(job.node == node for job in self.running())
        return max(0, self.slots.get(node, 0) - taken)

    def may_run(self, job: Job, node: str) -> bool:
        """Rule 8: not where it failed before, unless nobody else serves the model."""
        serving = {n for n, slots in self.slots.items() if slots and self._serves(n, job)}
        return node in serving and (node not in job.excluded or serving <= job.excluded)

    def level(self, parent: Path) -> int:
        """Rule 5: the least key of the children that wait, else the parent's virtual time."""
        depth = len(parent)
        paths = {job.path[: depth + 1] for job in self.waiting() if job.path[:depth] == parent}
        keys = (self.books[path].key for path in paths)
        return min(keys, default=self.virtual.get(parent, 0))

    def queued(self, path: Path) -> int:
        """Requests at and below this account that wait."""
        return sum(job.path[: len(path)] == path for job in self.waiting())

    def active(self, path: Path) -> bool:
        """Whether anything at or below this account waits or runs."""
        return any(job.path[: len(path)] == path for job in self.jobs.values())

    def _forget(self, paths: set[Path]) -> None:
        # Only what is idle, and not ahead of the others: alone, or as part of such a one.
        for path in sorted(paths, key=len, reverse=True):
            assert not self.active(path)
            assert path[:-1] in paths or self.books[path].key <= self.level(path[:-1])
            del self.books[path]
            self.virtual.pop(path, None)

    def _serves(self, node: str, job: Job) -> bool:
        return job.request.model in self.models[node]

    def _most_free(self, job: Job) -> list[str]:
        share = {
            node: -(-64 * self.free(node) // slots)
            for node, slots in self.slots.items()
            if slots and self.free(node) and self.may_run(job, node)
        }
        return [node for node in share if share[node] == max(share.values())]

    def _arrive(self, job: Job, nodes: list[str], rest: Iterator[Decision]) -> None:
        for depth in range(1, len(job.path) + 1):
            path = job.path[:depth]
            books = self._open(path)
            if not self.queued(path):
                books.base += max(0, self.level(path[:-1]) - books.key)
        self.jobs[job.request.id] = job
        if nodes:
            decision = next(rest)
            assert isinstance(decision, Start)
            assert decision.lease.node in nodes
            self._start(job, decision)

    def _open(self, path: Path) -> Books:
        weight = self.weights.get(path[-1], 1_000)
        return self.books.setdefault(path, Books(weight))

    def _filled(self, rest: Iterator[Decision]) -> None:
        for decision in rest:
            assert isinstance(decision, Start)
            node = decision.lease.node
            assert self.free(node)
            eligible = [job for job in self.waiting() if self.may_run(job, node)]
            job = self.jobs[decision.request.id]
            assert job in eligible
            self._assert_next(job, eligible)
            self._start(job, decision)
        for job in self.waiting():
            assert not self._most_free(job)

    def _assert_next(self, job: Job, eligible: list[Job]) -> None:
        for depth in range(1, len(job.path) + 1):
            siblings = [
                other for other in eligible if other.path[: depth - 1] == job.path[: depth - 1]
            ]
            least = min(self.books[other.path[:depth]].key for other in siblings)
            assert self.books[job.path[:depth]].key == least
        own = [other for other in eligible if other.path == job.path]
        assert job is min(own, key=lambda other: (not other.retried, other.turn))

    def _start(self, job: Job, decision: Start) -> None:
        job.node = decision.lease.node
        job.attempt += 1
        job.charged = 0
        assert decision.request == job.request
        assert decision.lease.id == job.lease
        assert decision.lease.attempt == job.attempt
        assert decision.lease.model == job.request.model
        self._charge(job, price(Usage(prompt_tokens=job.request.prompt_tokens), job))
        for depth in range(1, len(job.path) + 1):
            parent, key = job.path[: depth - 1], self.books[job.path[:depth]].key
            self.virtual[parent] = max(self.virtual.get(parent, 0), key)

    def _charge(self, job: Job, amount: int) -> None:
        job.charged += amount
        self.service += amount
        for depth in range(1, len(job.path) + 1):
            books = self.books[job.path[:depth]]
            books.paid += amount
            books.service += amount


def price(usage: Usage, job: Job) -> int:
    """Rule 2: 1 credit per fresh prompt token, 0.1 per cached one, 4 per output token."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    credits = fresh + Fraction(1, 10) * usage.cached_tokens + 4 * usage.completion_tokens
    exact = credits * Fraction(job.request.factor_milli, 1_000) * 1_000_000
    assert exact.denominator == 1
    return int(exact)


def _accounts(scheduler: Scheduler) -> list[tuple[Path, Account]]:
    """All accounts with their paths, as the oracle names them."""
    found: list[tuple[Path, Account]] = []

    def walk(account: Account, path: Path) -> None:
        for name, child in account.children.items():
            below = (*path, name or f"{path[-1]} itself")
            found.append((below, child))
            walk(child, below)

    walk(scheduler._shares._root, ())
    return found
