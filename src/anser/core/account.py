"""One member's account: what it has had, what waits below it, and what of that fits a node best.

Theory of operation. What an account was served is measured in micro-credits per share, `measure`.
In each pool in which it has anything to do it has a key (`Stand`), which grows with the measure. So
whatever it is served anywhere counts wherever it waits; only that what other pools serve it never
puts it further ahead than a ceiling (`pay`), or it would wait in a slow pool for as long as a fast
one serves it.

A `Branch` has children, which wait in one heap for each lane in which anything below them waits; in
a `Leaf` the requests themselves do. A leaf's `Queue` also keeps its requests by the nodes that have
the beginning of their prompts in their caches, so that a node can be given the one that gains most
there, wherever in the queue it stands. `fairness` owns the tree and its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from anser.core.heap import Heap
from anser.core.pace import smoothed
from anser.core.slots import Lane
from anser.core.virtual import Pool, Virtual

__all__ = ["Account", "Branch", "Leaf", "Node", "Place", "Queue", "Stand"]

_WEIGHT = 1_000  # one share
_OUTPUT_TOKENS = 256.0  # of an answer, until a member has had one


@dataclass(slots=True, eq=False, kw_only=True)
class Place:
    """A waiting request's place among its account's own: `key` is its turn, least first."""

    id: str
    account: Leaf
    lane: Lane
    key: int
    homes: int = 0  # a bit for each node that has its beginning; 0: nobody has
    hit: int = 0  # how much of it they have, in tokens
    since: float = 0.0  # when it began to wait
    passed: int = 0  # how many of its member's others went before it while it was the oldest

    def key_in(self, _: Pool, /) -> int:
        """Its turn, whatever the pool."""
        return self.key


@dataclass(slots=True, eq=False)
class Stand:
    """Where an account stands in one pool, in micro-credits per share."""

    key: int
    ceiling: int  # what other pools serve it puts it no further ahead than this

    def limit(self, ceiling: int) -> None:
        """From now on, let this be its ceiling, or its key where that is ahead already."""
        key = self.key
        self.ceiling = ceiling if ceiling > key else key


class Queue(Heap[Place]):
    """What waits in one lane of a leaf, also by the nodes that have its beginning."""

    __slots__ = ("homes",)

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.homes: dict[int, Heap[Place]] = {}

    def add(self, item: Place) -> None:
        """Let it wait here."""
        super().add(item)
        heap = self.homes.get(item.homes)
        if heap is None:
            heap = self.homes[item.homes] = Heap(self._pool)
        heap.add(item)

    def discard(self, item: Place) -> None:
        """It waits here no longer."""
        super().discard(item)
        heap = self.homes[item.homes]
        heap.discard(item)
        if not heap:
            del self.homes[item.homes]

    def validate(self) -> None:
        """Assert that each place is in the heap of its homes, and nothing else is."""
        super().validate()
        assert {place for heap in self.homes.values() for place in heap} == set(self)
        for homes, heap in self.homes.items():
            heap.validate()
            assert heap
            assert all(place.homes == homes for place in heap)


_NO_LANES: dict[Lane, Queue] = {}  # of all leaves in which nothing waits; nothing is put in it

_Heap = TypeVar("_Heap", bound=Heap[Any])


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Account(Generic[_Heap]):
    """What one member has had."""

    member: str
    name: str  # among its siblings
    parent: Branch | None
    weight: int
    path: tuple[tuple[Node, Branch], ...] = ()  # (account, parent), from the organisation on
    service: int = 0  # micro-credits since the account was opened
    carried: int = 0  # of the measure, by former weights
    carried_service: int = 0  # of the service, by former weights
    stands: dict[Pool, Stand] = field(default_factory=dict[Pool, Stand])
    lanes: dict[Lane, _Heap] = field(default_factory=dict[Lane, _Heap])  # no heap is empty
    queued: int = 0
    running: int = 0
    awake: bool = False  # waits, runs, or did so a moment ago

    @property
    def measure(self) -> int:
        """All service, each by the weight of its time, in micro-credits per share."""
        by_weight = (self.service - self.carried_service) * _WEIGHT // self.weight
        return self.carried + by_weight

    def key_in(self, pool: Pool, /) -> int:
        """Where it stands among its siblings in a pool in which it has something to do."""
        return self.stands[pool].key

    def waits_in(self, pool: Pool) -> bool:
        """Whether anything at or below it waits for a slot of this pool."""
        return any(lane.pool is pool for lane in self.lanes)

    def lift(self, pool: Pool, level: int, ceiling: int) -> None:
        """Let its key in this pool be `level`, or what it is if that is more."""
        stand = self.stands.get(pool)
        if stand is None:
            self.stands[pool] = Stand(level, max(level, ceiling))
            return
        if stand.key < level:
            stand.key = level
        stand.limit(ceiling)

    def move(self, pool: Pool, key: int) -> int:
        """Let its key in this pool be `key`, whatever it was; returns by how much that is more."""
        stand = self.stands[pool]
        grown, stand.key = key - stand.key, key
        stand.limit(stand.ceiling)
        return grown

    def leave(self, pool: Pool) -> None:
        """It has nothing to do in this pool, and stands there as a newcomer does."""
        self.stands.pop(pool, None)

    def pay(self, micro_credits: int, pool: Pool) -> int:
        """Add to the measure what this service of `pool` costs; a negative amount is a refund.

        Returns by how much the measure has grown. What other pools than this one serve it moves its
        key there below the ceiling only, and a key at its ceiling stays when something is given
        back: when that was charged, it was not counted.
        """
        grown, weight = micro_credits, self.weight
        if weight != _WEIGHT:
            by_weight = self.service - self.carried_service
            grown = (by_weight + micro_credits) * _WEIGHT // weight - by_weight * _WEIGHT // weight
        self.service += micro_credits
        own = self.stands.get(pool)
        if own is not None:
            own.key += grown
        if own is None or len(self.stands) > 1:
            for stand in self.stands.values():
                if stand is not own and stand.key < stand.ceiling:
                    stand.key = min(stand.key + grown, stand.ceiling)
        return grown

    def growth(self, micro_credits: int) -> int:
        """By about how much its key would grow by this service, in micro-credits per share."""
        return micro_credits * _WEIGHT // self.weight

    def weigh(self, weight: int) -> None:
        """Let what comes be paid by another weight; what was paid stays paid."""
        if self.awake and self.parent is not None:
            self.parent.awake_weight += weight - self.weight
        self.carried, self.carried_service, self.weight = self.measure, self.service, weight

    def wake(self, parent: Branch) -> None:
        """It has something to do; its weight counts among its siblings from now on."""
        assert not self.awake
        self.awake = True
        parent.awake_weight += self.weight

    def sleep(self, parent: Branch) -> None:
        """It has had nothing to do for a while."""
        self.awake = False
        parent.awake_weight -= self.weight

    def __repr__(self) -> str:
        counts = f"{self.queued} queued {self.running} running"
        return f"<{type(self).__name__} {self.member} {self.measure} had {counts}>"


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Branch(Account[Heap["Node"]]):
    """The account of a member that has others below it, or may have."""

    children: dict[str, Node] = field(default_factory=dict[str, "Node"])
    awake_weight: int = 0  # of the children that are awake
    service_forgotten: int = 0  # of the service, for children that were forgotten
    virtual: dict[Pool, Virtual] = field(default_factory=dict[Pool, Virtual])  # of its children
    idle: dict[Pool, Heap[Node]] = field(default_factory=dict[Pool, "Heap[Node]"])

    def first(self, lanes: Sequence[Lane]) -> Leaf:
        """The leaf to which the least keys lead, level by level."""
        node: Node = self
        while isinstance(node, Branch):
            node = _least(node.lanes, lanes)
        return node

    def least(self, lanes: Sequence[Lane]) -> Node | None:
        """The child of least key that waits in one of `lanes`, all of one pool."""
        waited_in = [lane for lane in lanes if lane in self.lanes]
        return _least(self.lanes, waited_in) if waited_in else None

    def near(self, lanes: Sequence[Lane], *, window: int, most: int) -> list[Node]:
        """Children that wait in one of `lanes` with keys up to `window` above the least one's.

        At most `most`, the least first. O(most x lanes).
        """
        pool = lanes[0].pool
        least = _least(self.lanes, lanes)
        limit = least.key_in(pool) + window
        found: dict[Node, None] = {least: None}
        for lane in lanes:
            heap = self.lanes.get(lane)
            if heap is not None and (len(heap) > 1 or least not in heap):
                found.update(dict.fromkeys(heap.upto(limit, most)))
        if len(found) == 1:
            return [least]
        return sorted(found, key=lambda node: node.key_in(pool))[:most]

    def reorder(self, child: Node) -> None:
        """A child's key has become less."""
        for lane in child.lanes:
            self.lanes[lane].add(child)
        for heap in self.idle.values():
            if child in heap:
                heap.add(child)

    def level(self, pool: Pool) -> int:
        """The key to which a child is lifted that begins to wait in this pool."""
        if self.lanes:
            lanes = [lane for lane in self.lanes if lane.pool is pool]
            if lanes:
                return _least(self.lanes, lanes).key_in(pool)
        virtual = self.virtual.get(pool)
        return 0 if virtual is None else virtual.now


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Leaf(Account[Queue]):
    """The account in which a member's own requests wait."""

    lanes: dict[Lane, Queue] = field(default_factory=lambda: _NO_LANES)
    answer_tokens: float | None = None  # of its answers, smoothed; None until there was one

    @property
    def output_tokens(self) -> float:
        """How long its next answer is likely to be."""
        return _OUTPUT_TOKENS if self.answer_tokens is None else self.answer_tokens

    def enqueue(self, place: Place) -> None:
        """Let a request of its own wait."""
        if not self.lanes:
            self.lanes = {}
        queue = self.lanes.get(place.lane)
        if queue is None:
            queue = self.lanes[place.lane] = Queue(place.lane.pool)
        queue.add(place)

    def dequeue(self, place: Place) -> None:
        """Let it wait no longer."""
        queue = self.lanes[place.lane]
        queue.discard(place)
        if not queue:
            del self.lanes[place.lane]
            self.lanes = self.lanes or _NO_LANES

    def answered(self, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self.answer_tokens = smoothed(self.answer_tokens, tokens)

    def choice(
        self, lanes: Sequence[Lane], bit: int, *, oldest_first: Callable[[Place], bool]
    ) -> tuple[Place, int]:
        """The request that gains most on the node of this bit, and what it gains.

        The oldest of those whose beginning is there, else of those whose beginning is nowhere, else
        of all; the gain is in cached tokens, and negative where they lie elsewhere. What is passed
        over for it is counted (`Place.passed`), and `oldest_first` says when that has its end.
        """
        oldest = self.oldest(lanes)
        own: Place | None = None
        fresh: Place | None = None
        if not oldest_first(oldest):
            for lane in lanes:
                queue = self.lanes.get(lane)
                for homes, heap in queue.homes.items() if queue else ():
                    place = heap.least()
                    if homes & bit and (own is None or place.key < own.key):
                        own = place
                    elif not homes and (fresh is None or place.key < fresh.key):
                        fresh = place
        chosen = own or fresh or oldest
        if not chosen.homes:
            return chosen, 0
        return chosen, chosen.hit if chosen.homes & bit else -chosen.hit

    def oldest(self, lanes: Sequence[Lane]) -> Place:
        """The request that has its turn first, of those that wait in one of `lanes`."""
        return _least(self.lanes, lanes)

    def newest(self, lanes: Collection[Lane]) -> Place:
        """The request that has its turn last, of those in one of `lanes`, if any, else of all."""
        queues = [self.lanes[lane] for lane in lanes if lane in self.lanes] or self.lanes.values()
        places = [place for queue in queues for place in queue]
        return max(places, key=lambda place: place.key)


Node: TypeAlias = Branch | Leaf

_Item = TypeVar("_Item", Node, Place)


def _least(heaps: Mapping[Lane, Heap[_Item]], lanes: Sequence[Lane]) -> _Item:
    """The least of what waits in one of `lanes`, all of one pool; something does."""
    if len(lanes) == 1:
        return heaps[lanes[0]].least()
    items = [heap.least() for lane in lanes if (heap := heaps.get(lane)) is not None]
    pool = lanes[0].pool
    return min(items, key=lambda item: item.key_in(pool))
