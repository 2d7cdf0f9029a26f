"""The scheduler's rules once more, as plainly as they can be said: no heaps, no counters, no haste.

The oracle is told each event together with the decisions that the real scheduler took, and asserts
that the rules allow them. Where the rules leave a choice (equal keys, equally free nodes, when an
account is forgotten) it follows the real one; everything else it computes by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from anser.core.account import Branch, Node
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
from anser.core.ledger import Usage
from anser.core.members import ancestry
from anser.core.scheduler import Scheduler
from anser.core.virtual import Virtual
from tests.property.pools import Cell, Moved, Pools

__all__ = ["Job", "Oracle", "Path"]

Path = tuple[str, ...]


@dataclass
class Job:
    """A request that waits or runs."""

    request: Request
    turn: int
    cell: Cell
    retried: bool = False
    attempt: int = 0
    node: str | None = None
    excluded: set[str] = field(default_factory=set)
    charged: int = 0
    cancelled: bool = False
    path: Path = field(init=False)  # its accounts from the top; who is no person has its own leaf

    def __post_init__(self) -> None:
        names = ancestry(self.request.member)
        self.path = names if len(names) == 3 else (*names, f"{names[-1]} itself")

    @property
    def lease(self) -> str:
        """The present lease."""
        return f"{self.request.id}.{self.attempt}"


@dataclass
class Books:
    """One account. In each pool its key is what it was served, per share, and where it came in."""

    weight: int
    carried: int = 0
    paid: int = 0
    service: int = 0
    bases: dict[int, int] = field(default_factory=dict)
    ceilings: dict[int, int] = field(default_factory=dict)

    @property
    def measure(self) -> int:
        """Micro-credits per share."""
        return self.carried + self.paid * 1_000 // self.weight

    def key(self, pool: int) -> int:
        """Its key in a pool."""
        return self.bases[pool] + self.measure

    def lift(self, pool: int, level: int) -> None:
        """Its key is at least this from now on."""
        self.bases[pool] = max(self.bases.get(pool, level - self.measure), level - self.measure)

    def leave(self, pool: int) -> None:
        """It has no key there."""
        del self.bases[pool], self.ceilings[pool]


class Oracle:
    """What the scheduler must know, and whether its decisions follow from it."""

    def __init__(self, *, queued_max: int, retries_max: int) -> None:
        self.queued_max, self.retries_max = queued_max, retries_max
        self.slots: dict[str, int] = {}
        self.models: dict[str, frozenset[str]] = {}
        self.jobs: dict[str, Job] = {}
        self.books: dict[Path, Books] = {}
        self.virtual: dict[tuple[Path, int], Virtual] = {}
        self.pools = Pools()
        self.now = 0.0
        self.weights: dict[str, int] = {}
        self.service = 0
        self.turns = 0
        self.dropped = 0

    def check(self, event: Event, decisions: list[Decision], now: float) -> None:
        """Assert that the rules allow these decisions after this event."""
        rest = iter(decisions)
        self.now = now
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
        self._regroup()
        self._filled(rest)
        self._regroup()

    def compare(self, scheduler: Scheduler) -> None:
        """Assert that the real books are these; what it has forgotten is forgotten here too."""
        real = dict(_accounts(scheduler))
        self._forget(self.books.keys() - real.keys())
        assert real.keys() == self.books.keys()
        queued = Counter(
            job.path[:depth] for job in self.waiting() for depth in range(1, len(job.path) + 1)
        )
        for path, account in real.items():
            books = self.books[path]
            assert account.measure == books.measure
            self._compare_keys(scheduler, path, account)
            assert account.weight == books.weight
            assert account.service == books.service
            assert account.queued == queued[path]
        assert scheduler.service == self.service
        assert scheduler.dropped == self.dropped

    def _compare_keys(self, scheduler: Scheduler, path: Path, account: Node) -> None:
        """Assert that the keys in all pools are these; where it is not ahead, none is needed."""
        books = self.books[path]
        supplies = scheduler._slots._supplies.items()
        names = {supply.pool: self.pools.cells[model].pool for model, supply in supplies}
        real = {names[pool]: account.key_in(pool) for pool in account.stands}
        for pool in books.bases.keys() - real.keys():
            assert not self.waits(path, pool)
            assert books.key(pool) <= self.level(path[:-1], pool)
            books.leave(pool)
        assert real == {pool: books.key(pool) for pool in books.bases}

    # Events

    def _submitted(self, request: Request, rest: Iterator[Decision]) -> None:
        if request.id in self.jobs:
            self.dropped += 1
            return
        self.turns += 1
        job = Job(request, self.turns, self.pools.cell(request.model))
        nodes = self._most_free(job)
        self._lifted(job)
        self._arrive(job, nodes, rest)
        if job.node is None and len(self.waiting()) > self.queued_max:
            longest = self._longest(job)
            newest = max(
                (other for other in self.waiting() if other.path == longest),
                key=lambda other: (not other.retried, other.turn),
            )
            _assert_refused(next(rest), newest.request.id, "overloaded")
            del self.jobs[newest.request.id]

    def _longest(self, job: Job) -> Path:
        """Who has most waiting, level by level, for its weight; between equals who comes."""
        path: Path = ()
        while children := [child for child in self.books if child[:-1] == path]:
            path = max(
                children,
                key=lambda child: (
                    self.queued(child) / self.books[child].weight,
                    job.path[: len(child)] == child,
                ),
            )
        return path

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
                    _assert_refused(next(rest), job.request.id, "retries_exhausted")
                else:
                    self._retried(job, rest)

    def _retried(self, job: Job, rest: Iterator[Decision]) -> None:
        assert job.node is not None
        job.excluded.add(job.node)
        job.retried = True
        nodes = self._most_free(job)  # its own slot is not given back yet
        del self.jobs[job.request.id]
        job.node, job.cell = None, self.pools.cell(job.request.model)
        self._lifted(job)
        self._arrive(job, nodes, rest)

    def _weighed(self, member: str, weight: int) -> None:
        self.weights[member] = weight
        if books := self.books.get(ancestry(member)):
            books.carried, books.paid, books.weight = books.measure, 0, weight

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

    def level(self, parent: Path, pool: int) -> int:
        """Rule 5: the least key of the children that wait, else the pool's virtual time."""
        depth = len(parent)
        waiting = [job for job in self.waiting() if job.cell.pool == pool]
        paths = {job.path[: depth + 1] for job in waiting if job.path[:depth] == parent}
        keys = (self.books[path].key(pool) for path in paths)
        return min(keys, default=self._virtual(parent, pool).now)

    def waits(self, path: Path, pool: int) -> bool:
        """Whether anything at or below this account waits for a slot of this pool."""
        jobs = (job for job in self.waiting() if job.cell.pool == pool)
        return any(job.path[: len(path)] == path for job in jobs)

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
            books = self.books[path]
            ahead = [p for p in books.bases if books.key(p) > self.level(path[:-1], p)]
            assert path[:-1] in paths or not ahead
            del self.books[path]
            for known in [known for known in self.virtual if known[0] == path]:
                del self.virtual[known]

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
        self.jobs[job.request.id] = job
        if nodes:
            decision = next(rest)
            assert isinstance(decision, Start)
            assert decision.lease.node in nodes
            self._start(job, decision)

    def _lifted(self, job: Job) -> None:
        for depth in range(1, len(job.path) + 1):
            path = job.path[:depth]
            books = self._open(path)
            if not self.waits(path, job.cell.pool):
                self._lift(books, path[:-1], job.cell.pool)

    def _lift(self, books: Books, parent: Path, pool: int) -> None:
        books.lift(pool, self.level(parent, pool))
        books.ceilings[pool] = max(books.key(pool), self._virtual(parent, pool).reach)

    def _virtual(self, parent: Path, pool: int) -> Virtual:
        return self.virtual.get((parent, pool)) or Virtual()

    def _regroup(self) -> None:
        """Rule 12: keys are of a pool; where pools become one, each is as far ahead as it was."""
        waiting = {job.request.model for job in self.waiting()}
        serving = [models for node, models in self.models.items() if self.slots[node]]
        for moved in self.pools.regroup(waiting, serving):
            for parent in ((), *self.books):
                self._join(parent, moved)
        for path, pool in [known for known in self.virtual if known[1] not in self.pools.alive()]:
            del self.virtual[path, pool]
        for books in self.books.values():
            for pool in books.bases.keys() - self.pools.alive():
                books.leave(pool)

    def _join(self, parent: Path, moved: Moved) -> None:
        virtuals = {old: self._virtual(parent, old) for old in moved.former}
        joint = self.virtual[parent, moved.pool] = Virtual.joint(virtuals.values())
        for path, books in self.books.items():
            shifts = {
                old: joint.now - virtuals[old].now for old in moved.former if old in books.bases
            }
            if path[:-1] == parent and shifts:
                keys = [books.key(old) + shift for old, shift in shifts.items()]
                ceilings = [books.ceilings[old] + shift for old, shift in shifts.items()]
                books.bases[moved.pool] = max(keys) - books.measure
                books.ceilings[moved.pool] = max(ceilings)

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
            pool = job.cell.pool
            least = min(self.books[other.path[:depth]].key(pool) for other in siblings)
            assert self.books[job.path[:depth]].key(pool) == least
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
            books, pool = self.books[job.path[:depth]], job.cell.pool
            virtual = self.virtual.setdefault((job.path[: depth - 1], pool), Virtual())
            virtual.advance(books.key(pool), self.now)
            books.ceilings[pool] = max(books.key(pool), virtual.reach)

    def _charge(self, job: Job, amount: int) -> None:
        job.charged += amount
        self.service += amount
        for depth in range(1, len(job.path) + 1):
            books = self.books[job.path[:depth]]
            keys = {pool: books.key(pool) for pool in books.bases}
            books.paid += amount
            books.service += amount
            for pool in keys.keys() - {job.cell.pool}:
                # What other pools do moves a key only as long as it is below its ceiling.
                ceiling = books.ceilings[pool]
                key = keys[pool] if keys[pool] >= ceiling else min(books.key(pool), ceiling)
                books.bases[pool] = key - books.measure


def _assert_refused(decision: Decision, request: str, code: str) -> None:
    assert isinstance(decision, Refused)
    assert (decision.request, decision.code) == (request, code)


def price(usage: Usage, job: Job) -> int:
    """Rule 2: 1 credit per fresh prompt token, 0.1 per cached one, 4 per output token."""
    fresh = usage.prompt_tokens - usage.cached_tokens
    credits = fresh + Fraction(1, 10) * usage.cached_tokens + 4 * usage.completion_tokens
    exact = credits * Fraction(job.request.factor_milli, 1_000) * 1_000_000
    assert exact.denominator == 1
    return int(exact)


def _accounts(scheduler: Scheduler) -> list[tuple[Path, Node]]:
    """All accounts with their paths, as the oracle names them."""
    found: list[tuple[Path, Node]] = []

    def walk(branch: Branch, path: Path) -> None:
        for name, child in branch.children.items():
            below = (*path, name or f"{path[-1]} itself")
            found.append((below, child))
            if isinstance(child, Branch):
                walk(child, below)

    walk(scheduler._shares._root, ())
    return found
