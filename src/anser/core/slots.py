"""Slots: where a waiting request could run now, answered without looking at every node.

Theory of operation
-------------------
A node has slots, shared by all models that it serves. Nodes that serve the same models stand on one
`Shelf`, in levels of free share (free / slots, in 64ths), with one bit per level that is not empty,
so the node with most to spare is one `bit_length` away. A level changes only when a slot is taken
or given back, however many models the node serves. `Supply` is what all shelves offer of one model.

A `Lane` is a set of waiting requests that may run on the same nodes: one model, less the nodes on
which they have failed before. Where those are all that serve the model, failing again beats
waiting for ever, so the exclusion counts only while another node serves the model. Lanes exist
while something waits in them, hence an exclusion costs nothing once its request runs.

A node that drains and a node that is gone look alike from here: no slots, no models. Its record
stays while leases still hold slots on it, so that a node which returns before they are reported
is not booked twice.

Invariants: a slot is taken only where one is free; a node is in exactly one level of its shelf
while it has a free slot, else in none; a record exists only with slots or leases; a supply exists
only with nodes or lanes, a shelf only with nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from anser.core.pace import Pace
from anser.core.virtual import Pool

__all__ = ["Lane", "Moved", "NodeSlots", "Shelf", "Slots", "Supply"]

_LEVELS = 64
_NO_NODES: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False, repr=False)
class NodeSlots:
    """One node: how many slots it has, how many are taken, and what it serves."""

    id: str
    slots: int = 0  # that may be used: what it claims, as far as it keeps that
    taken: int = 0
    shelf: Shelf | None = None  # of those that serve the same models; None: it serves nothing now
    level: int = 0
    claimed: int = 0
    bit: int = 0  # in `Place.homes`
    reading: int = 0  # fresh prompt tokens that it was sent and has not answered yet
    reading_heavy: int = 0  # of these, those of members above their share
    prompts: int = 0  # the same prompts whole, were nothing of them cached
    pace: Pace = field(default_factory=Pace)

    @property
    def free(self) -> int:
        """Slots that may be taken now; none while it has shrunk below what it runs."""
        return max(0, self.slots - self.taken)

    @property
    def supplies(self) -> tuple[Supply, ...]:
        """What it serves now."""
        return self.shelf.supplies if self.shelf else ()

    def __repr__(self) -> str:
        return f"<NodeSlots {self.id} {self.taken}/{self.slots}>"


@dataclass(slots=True, eq=False, repr=False)
class Lane:
    """Waiting requests that may run on the same nodes: a model, less the nodes they failed on.

    Those of the batch band wait apart.
    """

    supply: Supply
    excluded: frozenset[str] = _NO_NODES
    batch: bool = False
    waiting: int = 0

    @property
    def pool(self) -> Pool:
        """Where its requests' members are compared."""
        return self.supply.pool.batch if self.batch else self.supply.pool

    def open_to(self, node: NodeSlots) -> bool:
        """Whether a request of this lane may run on `node`, which serves its model."""
        excluded = self.excluded
        return node.id not in excluded or self.supply.nodes.keys() <= excluded

    def __repr__(self) -> str:
        without = f" without {','.join(sorted(self.excluded))}" if self.excluded else ""
        return f"<Lane {self.supply.model}{without}, {self.waiting} waiting>"


@dataclass(slots=True, eq=False, repr=False)
class Supply:
    """What all nodes together offer of one model, and the lanes that wait for it."""

    model: str
    pool: Pool
    nodes: dict[str, NodeSlots] = field(default_factory=dict[str, NodeSlots])
    shelves: dict[Shelf, None] = field(default_factory=dict["Shelf", None])
    lanes: dict[tuple[frozenset[str], bool], Lane] = field(
        default_factory=dict[tuple[frozenset[str], bool], Lane]
    )
    slots: int = 0  # of all its nodes
    lane: Lane = field(init=False)  # of requests that have failed nowhere, whether any waits or not

    def __post_init__(self) -> None:
        self.lane = Lane(self)

    def __repr__(self) -> str:
        return f"<Supply {self.model}: {len(self.nodes)} nodes, {len(self.lanes)} lanes>"


@dataclass(slots=True, eq=False, repr=False)
class Shelf:
    """Nodes that serve the same models, by level of free share."""

    supplies: tuple[Supply, ...]
    nodes: int = 0
    levels: dict[int, dict[NodeSlots, None]] = field(
        default_factory=dict[int, dict[NodeSlots, None]]
    )
    levels_mask: int = 0
    waiting: dict[Supply, None] = field(default_factory=dict[Supply, None])  # those with lanes

    def move(self, node: NodeSlots, *, old: int, new: int) -> None:
        """Put `node` from level `old` into level `new`; 0 is no level."""
        if old:
            level = self.levels[old]
            del level[node]
            if not level:
                self.levels_mask ^= 1 << old
        if new:
            self.levels.setdefault(new, {})[node] = None
            self.levels_mask |= 1 << new

    def __repr__(self) -> str:
        return f"<Shelf of {self.nodes} nodes, {len(self.supplies)} models>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Models have moved from former pools into one that is new; or nobody is left in those."""

    former: tuple[Pool, ...]
    pool: Pool | None
    ended: frozenset[Pool]  # of the former, those without models from now on

    def of_batch(self) -> Moved:
        """The same of their batch bands."""
        return Moved(
            former=tuple(pool.batch for pool in self.former),
            pool=None if self.pool is None else self.pool.batch,
            ended=frozenset(pool.batch for pool in self.ended),
        )


class Slots:
    """All nodes, what they serve, and which of their slots are free."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeSlots] = {}
        self._supplies: dict[str, Supply] = {}
        self._by_bit: dict[int, NodeSlots] = {}
        self._shelves: dict[tuple[str, ...], Shelf] = {}  # by models
        self._pools = 0
        self._moved: list[Moved] = []

    def change(self, id: str, *, slots: int, models: Iterable[str], bit: int = 0) -> NodeSlots:
        """From now on this node has `slots` slots for `models`; no slots means it takes nothing."""
        node = self._nodes.setdefault(id, NodeSlots(id))
        if bit:
            node.bit = bit
            self._by_bit[bit] = node
        former = node.supplies
        self._take_down(node)
        node.claimed, node.slots = slots, node.pace.slots(slots)
        self._put_up(node, tuple(sorted(set(models))) if slots else ())
        self._settle(node)
        for supply in former:
            self._forget_supply(supply)
        self._regroup((*former, *node.supplies))
        return node

    def moved(self) -> list[Moved]:
        """What has become of pools since this was last asked."""
        moved, self._moved = self._moved, []
        return moved

    def throttle(self, node: NodeSlots) -> None:
        """Let the node have as many slots as it has shown to keep, of those that it claims."""
        slots = node.pace.slots(node.claimed)
        if slots != node.slots:
            for supply in node.supplies:
                supply.slots += slots - node.slots
            node.slots = slots
            self._settle(node)

    def take(self, node: NodeSlots) -> None:
        """Take a free slot of `node`."""
        assert node.taken < node.slots
        node.taken += 1
        self._place(node, level=_level(node))

    def give_back(self, node: NodeSlots) -> None:
        """Give a taken slot of `node` back."""
        assert node.taken > 0
        node.taken -= 1
        self._settle(node)

    def lane(
        self, model: str, excluded: frozenset[str] = _NO_NODES, *, batch: bool = False
    ) -> Lane:
        """The lane of requests for `model` that have failed on the nodes `excluded`."""
        supply = self._supplies.get(model) or Supply(model, self._pool())
        if not excluded and not batch:
            return supply.lane
        return supply.lanes.get((excluded, batch)) or Lane(supply, excluded, batch)

    def wait(self, lane: Lane) -> None:
        """One more request waits in `lane`, as `lane()` has just returned it."""
        supply = self._supplies[lane.supply.model] = lane.supply
        if not supply.lanes:
            for shelf in supply.shelves:
                shelf.waiting[supply] = None
        supply.lanes[lane.excluded, lane.batch] = lane
        lane.waiting += 1

    def leave(self, lane: Lane) -> None:
        """One request less waits in `lane`."""
        assert lane.waiting > 0
        lane.waiting -= 1
        if not lane.waiting:
            supply = lane.supply
            del supply.lanes[lane.excluded, lane.batch]
            if not supply.lanes:
                for shelf in supply.shelves:
                    del shelf.waiting[supply]
            self._forget_supply(supply)

    def freest(self, lane: Lane) -> Iterator[NodeSlots]:
        """The nodes open to `lane` that have a free slot, the largest free share first."""
        shelves = lane.supply.shelves
        mask = 0
        for shelf in shelves:
            mask |= shelf.levels_mask
        while mask:
            level = mask.bit_length() - 1
            for shelf in shelves:
                for node in shelf.levels.get(level, ()):
                    if lane.open_to(node):
                        yield node
            mask ^= 1 << level

    def waiting_for(self, node: NodeSlots) -> list[Lane]:
        """The lanes in which something waits that may run on `node`."""
        return [
            lane
            for supply in (node.shelf.waiting if node.shelf else ())
            for lane in supply.lanes.values()
            if lane.open_to(node)
        ]

    def freed_by_exclusion(self, models: Iterable[str]) -> list[NodeSlots]:
        """Nodes with a free slot that a lane of `models` excludes, but may have to use now."""
        nodes: dict[NodeSlots, None] = {}
        for model in models:
            supply = self._supplies.get(model)
            for lane in supply.lanes.values() if supply else ():
                names = sorted(lane.excluded & lane.supply.nodes.keys())
                nodes |= {node: None for node in map(self._nodes.__getitem__, names) if node.free}
        return list(nodes)

    def with_bits(self, bits: int) -> Iterator[NodeSlots]:
        """The nodes that have one of these bits."""
        while bits:
            bit = bits & -bits
            node = self._by_bit.get(bit)
            if node is not None:
                yield node
            bits ^= bit

    def models(self, id: str) -> tuple[str, ...]:
        """The models that this node serves now."""
        node = self._nodes.get(id)
        return tuple(supply.model for supply in node.supplies) if node else ()

    def taken(self, id: str) -> int:
        """How many slots of this node are taken."""
        node = self._nodes.get(id)
        return node.taken if node else 0

    def lanes(self) -> list[Lane]:
        """All lanes in which something waits."""
        return [lane for supply in self._supplies.values() for lane in supply.lanes.values()]

    def nodes(self) -> list[NodeSlots]:
        """All nodes with slots or leases."""
        return list(self._nodes.values())

    def __repr__(self) -> str:
        taken = sum(node.taken for node in self._nodes.values())
        slots = sum(node.slots for node in self._nodes.values())
        return f"<Slots {taken}/{slots} taken on {len(self._nodes)} nodes>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        for id, node in self._nodes.items():
            assert node.id == id
            assert node.slots >= 0
            assert node.taken >= 0
            assert node.slots or node.taken
            assert node.slots or not node.supplies
            assert node.level == _level(node)
            assert node.slots == node.pace.slots(node.claimed)
            assert 0 <= node.reading_heavy <= node.reading
            assert node.shelf is None or node.shelf in self._shelves.values()
            assert all(self._supplies.get(supply.model) is supply for supply in node.supplies)
            assert all(supply.nodes.get(id) is node for supply in node.supplies)
        self._validate_pools()
        for model, supply in self._supplies.items():
            assert supply.model == model
            assert supply.nodes or supply.lanes
            _validate_supply(supply)
        for models, shelf in self._shelves.items():
            assert tuple(supply.model for supply in shelf.supplies) == models
            nodes = [node for node in self._nodes.values() if node.shelf is shelf]
            assert len(nodes) == shelf.nodes > 0
            _validate_shelf(shelf, nodes)

    def _validate_pools(self) -> None:
        for supply in self._supplies.values():
            group = _group(supply)
            for other in self._supplies.values():
                assert (other.pool is supply.pool) == (other in group)

    def _supply(self, model: str) -> Supply:
        supply = self._supplies.get(model)
        if supply is None:
            supply = self._supplies[model] = Supply(model, self._pool())
        return supply

    def _pool(self) -> Pool:
        self._pools += 1
        return Pool(self._pools)

    def _settle(self, node: NodeSlots) -> None:
        self._place(node, level=_level(node))
        if not node.slots and not node.taken:
            del self._nodes[node.id]
            self._by_bit.pop(node.bit, None)

    def _place(self, node: NodeSlots, *, level: int) -> None:
        old = node.level
        if level != old:
            node.level = level
            if node.shelf is not None:
                node.shelf.move(node, old=old, new=level)

    def _take_down(self, node: NodeSlots) -> None:
        """It serves nothing, for now."""
        self._place(node, level=0)
        shelf, node.shelf = node.shelf, None
        if shelf is None:
            return
        shelf.nodes -= 1
        for supply in shelf.supplies:
            del supply.nodes[node.id]
            supply.slots -= node.slots
            if not shelf.nodes:
                del supply.shelves[shelf]
        if not shelf.nodes:
            del self._shelves[tuple(supply.model for supply in shelf.supplies)]

    def _put_up(self, node: NodeSlots, models: tuple[str, ...]) -> None:
        """It serves these models."""
        if not models:
            return
        shelf = self._shelves.get(models)
        if shelf is None:
            shelf = self._shelves[models] = Shelf(tuple(map(self._supply, models)))
            shelf.waiting = {supply: None for supply in shelf.supplies if supply.lanes}
        node.shelf = shelf
        shelf.nodes += 1
        for supply in shelf.supplies:
            supply.nodes[node.id] = node
            supply.shelves[shelf] = None
            supply.slots += node.slots

    def _forget_supply(self, supply: Supply) -> None:
        if self._supplies.get(supply.model) is supply and not supply.nodes and not supply.lanes:
            del self._supplies[supply.model]
            self._retire(supply.pool, former=(supply.pool,), pool=None)
            supply.pool = self._pool()  # what still runs of it is of no pool that anybody waits in

    def _regroup(self, supplies: Iterable[Supply]) -> None:
        """Give each group of models that compete for the same slots a pool, and its own."""
        for supply in supplies:
            if self._supplies.get(supply.model) is not supply:
                continue
            group = _group(supply)
            former = tuple(sorted({one.pool for one in group}, key=lambda pool: pool.number))
            if len(former) == 1 and self._size(former[0]) == len(group):
                continue
            pool = self._pool()
            for one in group:
                one.pool = pool
            self._retire(*former, former=former, pool=pool)

    def _size(self, pool: Pool) -> int:
        return sum(supply.pool is pool for supply in self._supplies.values())

    def _retire(self, *pools: Pool, former: tuple[Pool, ...], pool: Pool | None) -> None:
        ended = frozenset(old for old in pools if not self._size(old))
        if pool is not None or ended:
            moved = Moved(former=former, pool=pool, ended=ended)
            self._moved += [moved, moved.of_batch()]


def _group(supply: Supply) -> set[Supply]:
    """All that compete for slots with `supply`, directly or by way of others."""
    group, found = {supply}, [supply]
    for one in found:  # which grows meanwhile
        for shelf in one.shelves:
            new = [other for other in shelf.supplies if other not in group]
            group.update(new)
            found += new
    return group


def _level(node: NodeSlots) -> int:
    # Rounded up: a node with any free slot is in some level, one with all free in the highest.
    free = node.slots - node.taken
    return -(-free * _LEVELS // node.slots) if free > 0 else 0


def _validate_supply(supply: Supply) -> None:
    assert supply.slots == sum(node.slots for node in supply.nodes.values())
    for (excluded, batch), lane in supply.lanes.items():
        assert lane.batch is batch
        assert lane.waiting > 0
        assert lane.supply is supply
        assert lane.excluded == excluded
    assert all(supply in shelf.supplies for shelf in supply.shelves)
    assert all((supply in shelf.waiting) == bool(supply.lanes) for shelf in supply.shelves)


def _validate_shelf(shelf: Shelf, nodes: list[NodeSlots]) -> None:
    for number, level in shelf.levels.items():
        assert bool(level) == bool(shelf.levels_mask >> number & 1)
        assert all(node.level == number for node in level)
    placed = {node.id for level in shelf.levels.values() for node in level}
    assert placed == {node.id for node in nodes if node.free}
    assert all(shelf in supply.shelves for supply in shelf.supplies)
