"""One member's account: what it has had, what waits below it, and what of that fits a node best.

Theory of operation. What an account was served is measured in micro-credits per share, `measure`.
In each pool in which it has anything to do it has a key there: the measure and a base, which says
where it stood when it came. So whatever it is served anywhere counts wherever it waits; only that
what other pools serve it never puts it further ahead than `ceilings` (`pay`), or it would wait in a
slow pool for as long as a fast one serves it.

Its children wait in one heap for each lane in which anything below them waits; in a leaf the
requests themselves do. A leaf also keeps its requests by the nodes that have the beginning of their
prompts in their caches, so that a node can be given the one that gains most there, wherever in the
queue it stands. `fairness` owns the tree and its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from anser.core.heap import Heap
from anser.core.pace import Smooth
from anser.core.slots import Lane
from anser.core.virtual import Pool, Virtual

__all__ = ["Account", "Place"]

_WEIGHT = 1_000  # one share
_OUTPUT_TOKENS = 256.0  # of an answer, until a member has had one


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
    passed: int = 0  # how many of its member's others went before it while it was the oldest

    def key_in(self, _: Pool, /) -> int:
        """Its turn, whatever the pool."""
        return self.key


def _output() -> Smooth:
    return Smooth(_OUTPUT_TOKENS)


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Account:
    """What one member has had, and what waits below it."""

    member: str
    name: str  # among its siblings
    parent: Account | None
    weight: int
    measure: int = 0  # micro-credits per share: all service, each by the weight of its time
    carried: int = 0  # of it, by former weights
    paid: int = 0  # micro-credits by the present weight
    service: int = 0  # micro-credits since the account was opened
    service_forgotten: int = 0  # of it, for children that were forgotten
    bases: dict[Pool, int] = field(default_factory=dict[Pool, int])
    ceilings: dict[Pool, int] = field(default_factory=dict[Pool, int])
    virtual: dict[Pool, Virtual] = field(default_factory=dict[Pool, Virtual])  # of its children
    queued: int = 0
    running: int = 0
    path: tuple[tuple[Account, Account], ...] = ()  # (account, parent), from the organisation on
    children: dict[str, Account] = field(default_factory=dict[str, "Account"])
    lanes: dict[Lane, Heap[Account | Place]] = field(
        default_factory=dict[Lane, "Heap[Account | Place]"]
    )
    idle: dict[Pool, Heap[Account]] = field(default_factory=dict[Pool, "Heap[Account]"])
    awake: bool = False  # waits, runs, or did so a moment ago
    awake_weight: int = 0  # of the children that are awake
    homes: dict[Lane, dict[int, Heap[Place]]] = field(
        default_factory=dict[Lane, "dict[int, Heap[Place]]"]
    )  # of a leaf: what waits, by the nodes that have its beginning
    output: Smooth = field(default_factory=_output)  # of a leaf: tokens of its answers

    def key_in(self, pool: Pool, /) -> int:
        """Where it stands among its siblings in a pool in which it has something to do."""
        return self.bases[pool] + self.measure

    def least(self, lanes: Iterable[Lane]) -> Account | Place | None:
        """The child or, in a leaf, the request of least key that waits in one of `lanes`.

        All of one pool.
        """
        found: Account | Place | None = None
        least = 0
        for lane in lanes:
            heap = self.lanes.get(lane)
            item = heap.least() if heap else None
            if item is None:
                continue
            key = item.key_in(lane.pool)
            if found is None or key < least:
                found, least = item, key
        return found

    def near(self, lanes: Sequence[Lane], *, window: int, most: int) -> list[Account]:
        """Children that wait in one of `lanes` with keys up to `window` above the least one's.

        At most `most`, the least first. O(most x lanes).
        """
        least = self.least(lanes)
        if least is None or most == 1:
            return [] if least is None else [_account(least)]
        pool = lanes[0].pool
        limit = least.key_in(pool) + window
        found: dict[Account | Place, None] = {least: None}
        for lane in lanes:
            heap = self.lanes.get(lane)
            if heap is not None:
                found.update(dict.fromkeys(heap.upto(limit, most)))
        order = sorted(found, key=lambda item: item.key_in(pool))
        return [_account(item) for item in order[:most]]

    def choice(
        self, lanes: Sequence[Lane], bit: int, *, oldest_first: Callable[[Place], bool]
    ) -> tuple[Place, int]:
        """Of a leaf: the request that gains most on the node of this bit, and what it gains.

        The oldest of those whose beginning is there, else of those whose beginning is nowhere, else
        of all; the gain is in cached tokens, and negative where they lie elsewhere. What is passed
        over for it is counted (`Place.passed`), and `oldest_first` says when that has its end.
        """
        oldest = self.oldest(lanes)
        own: Place | None = None
        fresh: Place | None = None
        if not oldest_first(oldest):
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
        return _place(self.least(lanes))

    def newest(self) -> Place:
        """Of a leaf: the request that has its turn last."""
        places = [place for heap in self.lanes.values() for place in heap]
        return max((_place(place) for place in places), key=lambda place: place.key)

    def waits_in(self, pool: Pool) -> bool:
        """Whether anything at or below it waits for a slot of this pool."""
        return any(lane.pool is pool for lane in self.lanes)

    def level(self, pool: Pool) -> int:
        """The key to which a child is lifted that begins to wait in this pool."""
        least = self.least([lane for lane in self.lanes if lane.pool is pool])
        if least is not None:
            return least.key_in(pool)
        virtual = self.virtual.get(pool)
        return 0 if virtual is None else virtual.now

    def lift(self, pool: Pool, level: int) -> None:
        """Let its key in this pool be `level`, or what it is if that is more."""
        base = self.bases.get(pool)
        if base is None or base + self.measure < level:
            self.bases[pool] = level - self.measure

    def limit(self, pool: Pool, ceiling: int) -> None:
        """From now on, what other pools serve it puts it no further ahead than this."""
        self.ceilings[pool] = max(ceiling, self.key_in(pool))

    def stand(self, pool: Pool, key: int) -> None:
        """Let its key in this pool, where it has something to do, be `key`."""
        former = self.key_in(pool)
        self.bases[pool] = key - self.measure
        self.ceilings[pool] = max(self.ceilings[pool], key)
        if key < former and self.parent is not None:
            self._put_forward(self.parent)
            idle = self.parent.idle.get(pool)
            if idle is not None and self in idle:
                idle.add(self)

    def leave(self, pool: Pool) -> None:
        """It has nothing to do in this pool, and stands there as a newcomer does."""
        self.bases.pop(pool, None)
        self.ceilings.pop(pool, None)

    def pay(self, micro_credits: int, pool: Pool) -> None:
        """Add to the measure what this service of `pool` costs; a negative amount is a refund."""
        self.service += micro_credits
        self.paid += micro_credits
        former, self.measure = self.measure, self.carried + self.paid * _WEIGHT // self.weight
        if len(self.bases) > 1 or pool not in self.bases:
            self._keep_below(pool, former)
        if self.measure < former and self.parent is not None:
            self._put_forward(self.parent)

    def _put_forward(self, parent: Account) -> None:
        for lane in self.lanes:
            parent.lanes[lane].add(self)

    def _keep_below(self, pool: Pool, former: int) -> None:
        """What `pool` has just changed of the measure moves other pools' keys below ceilings only.

        A key at its ceiling stays there when something is given back too: when that was charged,
        it was not counted.
        """
        for other, base in self.bases.items():
            if other is not pool:
                before, ceiling = base + former, self.ceilings[other]
                after = base + self.measure if before < ceiling else before
                self.bases[other] = min(after, max(before, ceiling)) - self.measure

    def weigh(self, weight: int) -> None:
        """Let what comes be paid by another weight; what was paid stays paid."""
        if self.awake and self.parent is not None:
            self.parent.awake_weight += weight - self.weight
        self.carried, self.paid, self.weight = self.measure, 0, weight

    def wake(self, parent: Account) -> None:
        """It has something to do; its weight counts among its siblings from now on."""
        assert not self.awake
        self.awake = True
        parent.awake_weight += self.weight

    def sleep(self, parent: Account) -> None:
        """It has had nothing to do for a while."""
        self.awake = False
        parent.awake_weight -= self.weight

    def __repr__(self) -> str:
        counts = f"{self.queued} queued {self.running} running"
        return f"<Account {self.member} {self.measure} had {counts}>"


_NO_HOMES: dict[int, Heap[Place]] = {}


def _account(item: Account | Place) -> Account:
    assert isinstance(item, Account)
    return item


def _place(item: Account | Place | None) -> Place:
    assert isinstance(item, Place)
    return item
