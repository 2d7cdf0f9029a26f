"""One member's account: what it has had, what waits below it, and what of that fits a node best.

Theory of operation. An account's key is `base + floor(1,000 x paid / weight)`: micro-credits per
share. Its children wait in one heap for each lane in which anything below them waits; in a leaf the
requests themselves do. A leaf also keeps its requests by the nodes that have the beginning of their
prompts in their caches, so that a node can be given the one that gains most there, wherever in the
queue it stands. `fairness` owns the tree and its rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from anser.core.heap import Heap
from anser.core.pace import Smooth
from anser.core.slots import Lane

__all__ = ["Account", "Place"]

_WEIGHT = 1_000  # one share
_OUTPUT_TOKENS = 256.0  # of an answer, until a member has had one

_key = attrgetter("key")


@dataclass(slots=True, eq=False, kw_only=True)
class Place:
    """A waiting request's place among its account's own: `key` is its turn, least first."""

    id: str
    account: Account
    lane: Lane
    key: int
    homes: int = 0  # a bit for each node that has its beginning; 0: nobody has
    hit: int = 0  # how much of it they have, in tokens
    since: float = 0.0  # when it began to wait


def _nobody() -> Heap[Account]:
    return Heap()  # annotated here, because Heap["Account"]() costs a microsecond each time


def _output() -> Smooth:
    return Smooth(_OUTPUT_TOKENS)


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Account:
    """What one member has had, and what waits below it."""

    member: str
    name: str  # among its siblings
    parent: Account | None
    weight: int
    key: int = 0
    base: int = 0  # of the key: what lifts and former weights have made of it
    paid: int = 0  # micro-credits since `base` was set
    service: int = 0  # micro-credits since the account was opened
    service_forgotten: int = 0  # of it, for children that were forgotten
    virtual: int = 0  # largest key of a child ever dispatched
    queued: int = 0
    running: int = 0
    path: tuple[tuple[Account, Account], ...] = ()  # (account, parent), from the organisation on
    children: dict[str, Account] = field(default_factory=dict[str, "Account"])
    lanes: dict[Lane, Heap[Account | Place]] = field(
        default_factory=dict[Lane, "Heap[Account | Place]"]
    )
    idle: Heap[Account] = field(default_factory=_nobody)
    awake: bool = False  # waits, runs, or did so a moment ago
    awake_weight: int = 0  # of the children that are awake
    homes: dict[Lane, dict[int, Heap[Place]]] = field(
        default_factory=dict[Lane, "dict[int, Heap[Place]]"]
    )  # of a leaf: what waits, by the nodes that have its beginning
    output: Smooth = field(default_factory=_output)  # of a leaf: tokens of its answers

    def least(self, lanes: Iterable[Lane]) -> Account | Place | None:
        """The child or, in a leaf, the request of least key that waits in one of `lanes`."""
        found: Account | Place | None = None
        for lane in lanes:
            heap = self.lanes.get(lane)
            item = heap.least() if heap else None
            if item is not None and (found is None or item.key < found.key):
                found = item
        return found

    def near(self, lanes: Sequence[Lane], *, window: int, most: int) -> list[Account]:
        """Children that wait in one of `lanes` with keys up to `window` above the least one's.

        At most `most`, the least first. O(most x lanes).
        """
        least = self.least(lanes)
        if least is None or most == 1:
            return [] if least is None else [_account(least)]
        found: dict[Account | Place, None] = {least: None}
        for lane in lanes:
            heap = self.lanes.get(lane)
            if heap is not None:
                found.update(dict.fromkeys(heap.upto(least.key + window, most)))
        return [_account(item) for item in sorted(found, key=_key)[:most]]

    def choice(
        self, lanes: Sequence[Lane], bit: int, *, waited_since: float
    ) -> tuple[Place, int]:
        """Of a leaf: the request that gains most on the node of this bit, and what it gains.

        The oldest of those whose beginning is there, else of those whose beginning is nowhere, else
        of all; the gain is in cached tokens, and negative where they lie elsewhere. The oldest of
        all goes first where it has failed before, or waits since `waited_since` or longer.
        """
        oldest = self.oldest(lanes)
        own: Place | None = None
        fresh: Place | None = None
        if oldest.key > 0 and oldest.since > waited_since:
            for lane in lanes:
                for homes, heap in self.homes.get(lane, _NO_HOMES).items():
                    place = heap.least()
                    assert place is not None
                    if homes & bit and (own is None or place.key < own.key):
                        own = place
                    elif not homes and (fresh is None or place.key < fresh.key):
                        fresh = place
        chosen = own or fresh or oldest
        if not chosen.homes:
            return chosen, 0
        return chosen, chosen.hit if chosen.homes & bit else -chosen.hit

    def oldest(self, lanes: Iterable[Lane]) -> Place:
        """Of a leaf: the request that has its turn first."""
        place = self.least(lanes)
        assert isinstance(place, Place)
        return place

    def level(self) -> int:
        """The key to which a child is lifted that begins to wait."""
        if self.lanes:
            least = self.least(self.lanes)
            assert least is not None
            return least.key
        return self.virtual

    def lift(self, level: int) -> None:
        """Raise the key to `level`; a key above it stays."""
        if level > self.key:
            self.base += level - self.key
            self.key = level

    def pay(self, micro_credits: int) -> None:
        """Add to the key what this service costs; a negative amount is a refund."""
        self.service += micro_credits
        self.paid += micro_credits
        former, self.key = self.key, self.base + self.paid * _WEIGHT // self.weight
        if self.key < former and self.parent is not None:
            for lane in self.lanes:
                self.parent.lanes[lane].add(self)

    def weigh(self, weight: int) -> None:
        """Let what comes be paid by another weight; what was paid stays paid."""
        if self.awake and self.parent is not None:
            self.parent.awake_weight += weight - self.weight
        self.base, self.paid, self.weight = self.key, 0, weight

    def wake(self, parent: Account) -> None:
        """It has something to do; its weight counts among its siblings from now on."""
        if not self.awake:
            self.awake = True
            parent.awake_weight += self.weight

    def sleep(self, parent: Account) -> None:
        """It has had nothing to do for a while."""
        self.awake = False
        parent.awake_weight -= self.weight

    def __repr__(self) -> str:
        return f"<Account {self.member} key={self.key} {self.queued} queued {self.running} running>"


_NO_HOMES: dict[int, Heap[Place]] = {}


def _account(item: Account | Place) -> Account:
    assert isinstance(item, Account)
    return item
