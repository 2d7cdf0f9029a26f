"""The bound of fairness, held against every two siblings that wait for the same slots.

Theory of operation. Two siblings *meet* while both wait in one pool. From then on, what they were
served may differ by no more than their bound (`bench.bound`), at each level of the tree. It is
promised for those who wait for the same slots and are served by nothing else, so a meeting ends
when one of them is given a slot that the other could not have had (it waits only for what failed
there, or for another model), or is charged for another pool's work; they are *apart* then, as far
as that put them, and meet again once their keys are back within the band. So are those whom a
third one that is apart has drawn along, as who comes is lifted to the least key of all, and those
whose pools have become one.

Everybody else must come into a meeting within the band, behind the other by no more than Q, what
that one runs, and what may be taken back; if not of the two, then of a third one, to whose level
they came (`Pair.drawn`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from anser.core.account import Branch, Node
from anser.core.job import Job
from anser.core.slots import Lane
from anser.core.virtual import Pool
from bench.bound import Pair
from tests.simulation.books import Books

__all__ = ["Siblings"]

_ROUNDING = 1e-9  # of sums of floats


@dataclass(slots=True, eq=False)
class _Meeting:
    pool: Pool
    one: Node
    other: Node
    pair: Pair | None = None  # while they meet
    apart: bool = False

    def part(self) -> None:
        """They cannot be compared for now."""
        self.pair, self.apart = None, True

    @property
    def lasts(self) -> bool:
        """Whether both still have a place in the pool."""
        return all(self.pool in account.stands for account in (self.one, self.other))


class Siblings:
    """All meetings in one tree of accounts."""

    def __init__(self, root: Branch, books: Books, window: int) -> None:
        self._root, self._books, self._window = root, books, window
        self._meetings: dict[tuple[Pool, frozenset[Node]], _Meeting] = {}
        self._pools: set[Pool] = set()
        self.worst = 0.0  # part of its bound that any pair has come to
        self.met = 0

    def started(self, job: Job, lanes: Collection[Lane]) -> None:
        """`job` is given a slot that was open to these lanes, as they were without it."""
        pool = job.lane.pool
        for account, parent in job.account.path:
            for other in _waiting(parent, pool):
                if other is not account and not any(lane in other.lanes for lane in lanes):
                    self._meeting(pool, account, other).part()

    def charged(self, job: Job) -> None:
        """`job` was charged, which moves its accounts' keys in all of their pools."""
        if all(len(account.stands) == 1 for account, _ in job.account.path):
            return
        accounts = {account for account, _ in job.account.path}
        for meeting in self._meetings.values():
            if meeting.pool is not job.lane.pool and accounts & {meeting.one, meeting.other}:
                meeting.part()

    def look(self, *, regrouped: bool) -> None:
        """Compare all who wait now; `regrouped`: nodes have changed, and pools with them."""
        pools = {pool for account in self._root.children.values() for pool in account.stands}
        joined = pools - self._pools if regrouped else frozenset[Pool]()
        self._pools |= pools
        together: set[_Meeting] = set()
        for parent in _parents(self._root):
            for pool in {lane.pool for lane in parent.lanes}:
                pairs = combinations(_waiting(parent, pool), 2)
                meetings = [self._meeting(pool, one, other) for one, other in pairs]
                together.update(meetings)
                self._compare(meetings, parent, excused=pool in joined)
        for key, meeting in list(self._meetings.items()):
            if meeting not in together:
                meeting.pair = None
                if not meeting.lasts:
                    del self._meetings[key]

    def _compare(self, meetings: Sequence[_Meeting], parent: Branch, *, excused: bool) -> None:
        for meeting in meetings:
            if meeting.pair is not None:
                part = meeting.pair.part(self._window)
                self.worst = max(self.worst, part)
                who = f"{meeting.one.member} and {meeting.other.member}"
                assert part <= 1.0 + _ROUNDING, f"{who} are {part:.3f} of their bound apart"
                continue
            drawn, most = self._out_of_band(meeting)
            if drawn <= most:
                self.met += 1
                one, other = self._books.entry(meeting.one), self._books.entry(meeting.other)
                meeting.pair, meeting.apart = Pair(one.side, other.side, drawn=drawn), False
            else:
                assert excused or self._drawn(meeting, parent), _described(meeting)
                meeting.apart = True

    def _drawn(self, meeting: _Meeting, parent: Branch) -> bool:
        """Whether it, or another meeting of these siblings that may have drawn them, is apart."""
        return meeting.apart or any(
            other.apart and other.pool is meeting.pool and other.one.parent is parent
            for other in self._meetings.values()
        )

    def _out_of_band(self, meeting: _Meeting) -> tuple[float, float]:
        """How far their keys are out of their own band, and how far a third may have drawn them."""
        pool = meeting.pool
        behind, ahead = sorted(
            (meeting.one, meeting.other), key=lambda account: account.key_in(pool)
        )
        assert behind.parent is not None
        reserved = self._books.entry(behind).side.reserved
        band = self._window + self._books.entry(ahead).side.slack + reserved
        gap = ahead.key_in(pool) - behind.key_in(pool)
        return max(0.0, gap - band), self._books.reserved(behind.parent)

    def _meeting(self, pool: Pool, one: Node, other: Node) -> _Meeting:
        key = (pool, frozenset((one, other)))
        meeting = self._meetings.get(key)
        if meeting is None:
            meeting = self._meetings[key] = _Meeting(pool, one, other)
        return meeting


def _waiting(parent: Branch, pool: Pool) -> list[Node]:
    return [child for child in parent.children.values() if child.waits_in(pool)]


def _parents(branch: Branch) -> Iterator[Branch]:
    """All accounts below which two or more may wait."""
    if len(branch.children) > 1:
        yield branch
    for child in branch.children.values():
        if isinstance(child, Branch):
            yield from _parents(child)


def _described(meeting: _Meeting) -> str:
    one, other, pool = meeting.one, meeting.other, meeting.pool
    keys = f"{one.member} at {one.key_in(pool)}, {other.member} at {other.key_in(pool)}"
    return f"who comes is not at the level of who waits: {keys}"
