"""What each account must have been charged, written down a second time from what was told.

Theory of operation. A lease pays its prompt when it starts, its tokens as they are told, and at its
end what it came to. Here the same is added up for every account above it, each amount by the weight
of its time, and the scheduler's accounts must say exactly that, after every event.

For the bound (`siblings`) each lease also has a most that it can come to. What it was served is
what is sure to stay: its tokens, less what its node may take back of them by its last word, and its
prompt once it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from anser.core.account import Branch, Node
from anser.core.events import Failed, Finished, Progressed, Weighed
from anser.core.fairness import price
from anser.core.job import Job
from anser.core.ledger import Usage
from anser.core.scheduler import Scheduler
from bench.bound import Side

__all__ = ["Books", "Entry"]

_WEIGHT = 1_000  # one share


@dataclass(slots=True, eq=False)
class _Lease:
    job: Job
    most: int  # micro-credits that it can come to
    unsure: int  # of what its tokens cost, what may be taken back
    charged: int = 0
    tokens: int = 0  # what they cost
    served: int = 0


@dataclass(slots=True, eq=False)
class Entry:
    """One account's page. Micro-credits; per share where it says so."""

    weight: int
    service: int = 0
    carried: int = 0  # per share, by former weights
    paid: int = 0  # by the present weight
    served: float = 0.0  # per share
    due: int = 0
    due_before: float = 0.0  # per share: what ran could come to when weights changed
    side: Side = field(default_factory=Side)

    @property
    def measure(self) -> int:
        """All that it was charged, per share."""
        return self.carried + self.paid * _WEIGHT // self.weight

    def charge(self, charged: int, served: int, due: int) -> None:
        """Add these, which may be negative but for what was served."""
        self.service += charged
        self.paid += charged
        self.served += served * _WEIGHT / self.weight
        self.due += due
        self._note()

    def weigh(self, weight: int) -> None:
        """What comes is by another weight; part of what runs was charged by the former one."""
        self.carried, self.paid, self.weight = self.measure, 0, weight
        self.due_before = self.side.due_most
        self._note()

    def _note(self) -> None:
        due = self.due_before + self.due * _WEIGHT / self.weight
        self.side.note(served=self.served, due=due, charged=self.measure)


class Books:
    """The pages of all accounts.

    `limits_of(job)` is the most that a job can come to on its node, and what may be taken back
    of what its tokens cost.
    """

    def __init__(self, scheduler: Scheduler, limits_of: Callable[[Job], tuple[int, int]]) -> None:
        self._scheduler = scheduler
        self._limits_of = limits_of
        self._entries: dict[Node, Entry] = {}
        self._leases: dict[str, _Lease] = {}
        self.service = 0

    def entry(self, account: Node) -> Entry:
        """The page of this account."""
        entry = self._entries.get(account)
        if entry is None:
            entry = self._entries[account] = Entry(account.weight)
        return entry

    def reserved(self, parent: Branch) -> float:
        """The most that was taken back of any account below `parent`, also of forgotten ones."""
        entries = self._entries.items()
        return max(entry.side.reserved for account, entry in entries if account.parent is parent)

    def started(self, job: Job) -> None:
        """It has been given a slot, and pays its prompt as far as that is not cached."""
        prompt, cached = job.request.prompt_tokens, job.cached
        assert 0 <= cached <= prompt
        lease = self._leases[job.lease] = _Lease(job, *self._limits_of(job))
        charged = job.price(Usage(prompt_tokens=prompt, cached_tokens=cached))
        self._charge(lease, charged, served=0, due=lease.most)

    def told(self, event: Progressed | Finished | Failed) -> Job | None:
        """A lease has gone on or ended; returns whose it was, if anybody's."""
        lease = self._leases.get(event.lease)
        if lease is None:
            return None
        match event:
            case Progressed(tokens=tokens):
                cost = price(output=tokens, factor_milli=lease.job.factor_milli)
                lease.tokens += cost
                served = max(0, lease.tokens - lease.unsure) - lease.served
                self._charge(lease, cost, served=served, due=-served)
            case Finished(usage=usage) | Failed(delivered=usage):
                self._end(event.lease, lease, lease.job.price(usage))
        return lease.job

    def weighed(self, event: Weighed) -> None:
        """A member's weight changes."""
        account = self._scheduler._shares.find(event.member)
        if account is not None and account in self._entries:
            self._entries[account].weigh(event.weight)

    def compare(self, job: Job) -> None:
        """Assert that the scheduler has charged this, to the micro-credit."""
        assert self._scheduler.service == self.service, "what was charged in all"
        for account, _ in job.account.path:
            entry = self.entry(account)
            assert account.service == entry.service, f"what {account!r} was charged"
            assert account.measure == entry.measure, f"what {account!r} was charged per share"
            assert account.weight == entry.weight, f"what {account!r} weighs"

    def _end(self, id: str, lease: _Lease, cost: int) -> None:
        del self._leases[id]
        assert cost <= lease.most, f"{id} came to {cost}, more than its most, {lease.most}"
        assert cost >= lease.served, f"{id} came to {cost}, less than it was served"
        left = lease.most - lease.served
        self._charge(lease, cost - lease.charged, served=cost - lease.served, due=-left)

    def _charge(self, lease: _Lease, charged: int, *, served: int, due: int) -> None:
        lease.charged += charged
        lease.served += served
        self.service += charged
        for account, _ in lease.job.account.path:
            self.entry(account).charge(charged, served, due)
