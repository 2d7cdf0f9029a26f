"""Fair shares: who is next, decided by what each has had so far for its weight.

Theory of operation
-------------------
Members form a tree: organisation, project, person. Each has an `Account` whose key is the price of
all that was done for it and everything below it, per share (a weight of 1,000). Service is charged
to every account on the path from a member up to its organisation, so fairness holds among
organisations, inside an organisation, and inside a project, each with its own weights. A member
that is no person may have requests of its own: they wait in a leaf below it, which is one more
child, of weight 1,000.

*Pools*: models that compete for the same slots are a pool (`virtual`), and keys are compared within
a pool only. What an account is served anywhere raises its key in all its pools, but by what other
pools serve it no further than a minute's worth of service ahead of those who wait there.

*Pick*: from the root down, the accounts of least key, and those within a window above it, among all
that have something waiting in one of the open lanes.

*Lift*: an account that had nothing waiting in a pool and now has is raised to the least key among
its siblings that wait there, or to the pool's virtual time (the largest key ever dispatched) if
none does. It is never lowered: idleness earns nothing.

*Forget*: an account that has had nothing waiting or running at or below it for a while is dropped,
with all below it, as soon as it is in no pool ahead of the level that it would be lifted to. That
is safe because its return would lift it there anyhow, as it does a newcomer. One that is ahead is
kept until the others have caught up, so nobody resets its key by going away. (What is lost is who
was ahead of whom inside an organisation, once the whole of it has been idle until others have
passed it; and all keys of a pool, once no node serves its models and nobody waits for them.) Hence
memory is bounded by those who wait, run, did so a moment ago, or are ahead.

Keys move with each charge, so the heaps are lazy: an entry whose item has moved on since is put
back where it belongs when it surfaces; only a refund, which lowers a key, has to add an entry at
once. A pick costs O(depth x log members), a charge O(depth), a lift O(depth x lanes); a change of
pools, which is rare, visits all accounts.

Prices are exact: whole micro-credits. One credit is a fresh prompt token of a model of factor 1;
a cached prompt token costs a tenth of it, an output token four times as much.

Invariants: each measure is what was paid by former weights + floor(1,000 x paid / weight); an
account has a base in each pool in which something waits at or below it; service and counts of an
account are the sums over its children, living or forgotten; an account is in its parent's heap of a
lane if and only if something waits in that lane at or below it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from anser.core.account import Branch, Leaf, Node, Place, Stand
from anser.core.heap import Heap
from anser.core.members import ancestry
from anser.core.slots import Lane, Moved
from anser.core.virtual import Pool, Virtual

__all__ = ["Shares", "Standing", "price"]

# Micro-credits per token and per thousandth of the model's factor.
_FRESH, _CACHED, _OUTPUT = 1_000, 100, 4_000

_WEIGHT = 1_000  # one share
_DEPTH_MAX = 3
_OWN = ""  # the name of a member's own leaf, which is no path
_SWEPT_MAX = 4  # accounts forgotten per dispatch and level: more than can come, in small steps


def price(*, fresh: int = 0, cached: int = 0, output: int = 0, factor_milli: int) -> int:
    """What this many tokens cost, in micro-credits.

    >>> price(fresh=10, cached=10, output=1, factor_milli=1_000)
    15000000
    """
    return (_FRESH * fresh + _CACHED * cached + _OUTPUT * output) * factor_milli


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A member's account as others may see it: all that waits, runs and was paid for below it."""

    member: str
    weight: int  # thousandths
    key: int  # micro-credits per share: its place in the pool in which it is furthest
    service: int  # micro-credits since the account was opened
    queued: int
    running: int


class Shares:
    """The tree of accounts, and which waiting request is next.

    An account that had something to do up to `rest_s` seconds ago is awake: it counts when shares
    are computed, and is not forgotten.
    """

    def __init__(self, rest_s: float = 0.0) -> None:
        self._rest_s = rest_s
        self._resting: OrderedDict[Node, float] = OrderedDict()  # since when, longest first
        self._awake_leaves = 0
        self._root = Branch(member="", name="", parent=None, weight=_WEIGHT)
        self._leaves: dict[str, Leaf] = {}
        self._weights: dict[str, int] = {}

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._root.queued

    @property
    def running(self) -> int:
        """Requests that run."""
        return self._root.running

    @property
    def service(self) -> int:
        """The price of all service so far, in micro-credits."""
        return self._root.service

    @property
    def awake(self) -> int:
        """Leaves that wait, run, or did so a moment ago."""
        return self._awake_leaves

    def awake_weight(self, member: str | None) -> int:
        """Of this member while it is awake, else 0; of all organisations, if none is named."""
        if member is None:
            return self._root.awake_weight
        account = self.find(member)
        return account.weight if account is not None and account.awake else 0

    def share(self, leaf: Leaf) -> float:
        """Which part of everything is due to this leaf, among all that are awake."""
        share = 1.0
        for account, parent in leaf.path:
            others = 0 if account.awake else account.weight  # or it counts already
            share *= account.weight / (parent.awake_weight + others)
        return share

    def standing_of(self, member: str) -> tuple[int, float]:
        """How many of its own requests wait, and the share that is due to it if it has one more."""
        names = ancestry(member)
        account: Node | None = self._root
        share = 1.0
        for name in (*names, _OWN)[:_DEPTH_MAX]:
            parent = account if isinstance(account, Branch) else None
            account = parent.children.get(name) if parent else None
            weight = account.weight if account else self._weights.get(name, _WEIGHT)
            awake = parent.awake_weight if parent else 0
            share *= weight / (awake if account and account.awake else awake + weight)
        return account.queued if account else 0, share

    def weigh(self, member: str, weight: int) -> None:
        """Give a member its weight among its siblings, in thousandths."""
        self._weights[member] = weight
        if weight == _WEIGHT:
            del self._weights[member]
        account = self.find(member)
        if account is not None:
            account.weigh(weight)

    def leaf(self, member: str) -> Leaf:
        """The account in which this member's own requests wait; opened if need be."""
        return self._leaves.get(member) or self._open(member)

    def find(self, member: str) -> Node | None:
        """The account of this member and all below it, if there is one."""
        account: Node | None = self._root
        for name in ancestry(member):
            account = account.children.get(name) if isinstance(account, Branch) else None
        return account

    def arrive(self, leaf: Leaf, pool: Pool) -> None:
        """A request of `leaf` is here, to wait or to start: lift whoever had nothing waiting."""
        for account, parent in leaf.path:
            if not account.queued and not account.running:
                self._wake(account, parent)
            if not account.lanes or not account.waits_in(pool):
                virtual = parent.virtual.get(pool)
                ceiling = 0 if virtual is None else virtual.reach
                account.lift(pool, parent.level(pool), ceiling)

    def leave(self, leaf: Leaf, pool: Pool) -> None:
        """Nothing of this pool is left on the path of `leaf`."""
        for account, _ in leaf.path:
            account.leave(pool)

    def _wake(self, account: Node, parent: Branch) -> None:
        self._resting.pop(account, None)
        if not account.awake:
            for heap in parent.idle.values():
                heap.discard(account)
            account.wake(parent)
            self._awake_leaves += isinstance(account, Leaf)

    def enqueue(self, place: Place) -> None:
        """Let an arrived request wait."""
        leaf, lane = place.account, place.lane
        leaf.enqueue(place)
        self._root.queued += 1
        for account, parent in leaf.path:
            account.queued += 1
            heap = parent.lanes.get(lane)
            if heap is None:
                heap = parent.lanes[lane] = Heap(lane.pool)
            if account not in heap:
                heap.add(account)

    def dequeue(self, place: Place) -> None:
        """Let a request wait no longer, because it starts or is not wanted any more."""
        leaf, lane = place.account, place.lane
        leaf.dequeue(place)
        self._root.queued -= 1
        for account, parent in reversed(leaf.path):
            account.queued -= 1
            if lane not in account.lanes:
                heap = parent.lanes[lane]
                heap.discard(account)
                if not heap:
                    del parent.lanes[lane]

    def window(self, lanes: Sequence[Lane], *, window: int, most: int) -> Iterator[Leaf]:
        """Leaves that are next for a slot to which `lanes` are open, whoever is first first.

        At each level those with keys up to `window` above the least; about `most` in all.
        """
        lanes = [lane for lane in lanes if lane in self._root.lanes]
        if lanes:
            yield from self._window(self._root, lanes, window, most)

    def _window(
        self, branch: Branch, lanes: Sequence[Lane], window: int, most: int
    ) -> Iterator[Leaf]:
        children = branch.near(lanes, window=window, most=most)
        each = -(-most // len(children))
        for child in children:
            if isinstance(child, Leaf):
                yield child
            elif each == 1:
                yield child.first(lanes)
            else:
                yield from self._window(child, lanes, window, each)

    def longest(self, leaf: Leaf, lanes: Collection[Lane]) -> Leaf:
        """The leaf with most waiting, level by level, for its weight; between equals `leaf`.

        Of those that wait in one of `lanes`, if there are any, else of all. Whose newest request
        goes from a queue that is too long (longest queue drop, after McKenney, Stochastic Fairness
        Queueing, 1990).
        """
        own = {account for account, _ in leaf.path}
        account: Node = self._root
        while isinstance(account, Branch):
            children: Collection[Node] = account.children.values()
            if lanes:
                children = [child for child in children if not child.lanes.keys().isdisjoint(lanes)]
            account = max(children, key=lambda child: (child.queued / child.weight, child in own))
        return account

    def start(self, leaf: Leaf, pool: Pool, micro_credits: int, now: float = 0.0) -> None:
        """A request of `leaf` gets a slot of `pool`, and pays this much at once."""
        self._root.running += 1
        self._root.service += micro_credits
        for account, parent in leaf.path:
            account.running += 1
            account.pay(micro_credits, pool)
            virtual = parent.virtual.get(pool)
            if virtual is None:
                virtual = parent.virtual[pool] = Virtual()
            stand = account.stands[pool]
            stand.limit(virtual.advance(stand.key, now))
            if pool in parent.idle:
                self._sweep(parent, pool)

    def charge(self, leaf: Leaf, pool: Pool, micro_credits: int) -> None:
        """Charge, or refund if negative, a request of `leaf` that runs."""
        self._root.service += micro_credits
        for account, parent in leaf.path:
            if account.pay(micro_credits, pool) < 0:
                parent.reorder(account)

    def end(self, leaf: Leaf) -> None:
        """A request of `leaf` runs no longer."""
        self._root.running -= 1
        for account, _ in leaf.path:
            account.running -= 1

    def retire(self, leaf: Leaf, now: float = 0.0) -> None:
        """What is idle on the path of `leaf` rests from now on."""
        for account, _ in reversed(leaf.path):
            if account.queued or account.running:
                break
            self._resting[account] = now
            self._resting.move_to_end(account)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Forget who has rested long enough, at once or when the others have caught up."""
        while self._resting:
            account, since = next(iter(self._resting.items()))
            if since + self._rest_s > now:
                return
            del self._resting[account]
            parent = account.parent
            assert parent is not None
            account.sleep(parent)
            self._awake_leaves -= isinstance(account, Leaf)
            for pool in list(account.stands):
                if account.key_in(pool) > parent.level(pool):
                    parent.idle.setdefault(pool, Heap(pool)).add(account)
                else:
                    account.leave(pool)
            if not account.stands:
                self._forget(account, parent)

    def standings(self) -> list[Standing]:
        """A row for each member that has an account, parents before children."""
        return [
            Standing(
                member=account.member,
                weight=account.weight,
                key=max(map(account.key_in, account.stands), default=account.measure),
                service=account.service,
                queued=account.queued,
                running=account.running,
            )
            for account in _below(self._root)
            if account.name != _OWN
        ]

    def __repr__(self) -> str:
        root = self._root
        return f"<Shares {root.queued} queued {root.running} running {len(self._leaves)} leaves>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        leaves = {one.member: one for one in _below(self._root) if isinstance(one, Leaf)}
        assert leaves == self._leaves
        assert self._awake_leaves == sum(leaf.awake for leaf in leaves.values())
        for account in _below(self._root):
            busy = bool(account.queued or account.running)
            assert account.awake == (busy or account in self._resting)
            assert not (busy and account in self._resting)
        for account in (self._root, *_below(self._root)):
            _validate(account)

    def _open(self, member: str) -> Leaf:
        names = ancestry(member)
        assert "" not in member.split("/")
        assert len(names) <= _DEPTH_MAX
        branch = self._root
        for name in names[: _DEPTH_MAX - 1]:
            child = branch.children.get(name)
            if child is None:
                weight = self._weights.get(name, _WEIGHT)
                child = Branch(member=name, name=name, parent=branch, weight=weight)
                _adopt(branch, child)
            assert isinstance(child, Branch)
            branch = child
        own = member if len(names) == _DEPTH_MAX else _OWN
        weight = self._weights.get(own, _WEIGHT)
        leaf = self._leaves[member] = Leaf(member=member, name=own, parent=branch, weight=weight)
        _adopt(branch, leaf)
        return leaf

    def move(self, moved: Moved) -> None:
        """Models have changed their pool: so do all keys, each as far ahead as it was."""
        accounts: list[Node] = [self._root, *_below(self._root)]
        branches = [account for account in accounts if isinstance(account, Branch)]
        if moved.pool is not None:
            for branch in branches:
                _join(branch, moved.former, moved.pool)
        for pool in moved.ended:
            for branch in branches:
                branch.virtual.pop(pool, None)
                branch.idle.pop(pool, None)
            for account in accounts:
                account.leave(pool)
        for account in reversed(accounts):
            if not account.awake and not account.stands and account.parent is not None:
                self._forget(account, account.parent)

    def _sweep(self, parent: Branch, pool: Pool) -> None:
        level, idle = parent.level(pool), parent.idle[pool]
        for _ in range(_SWEPT_MAX):
            account = idle.least() if idle else None
            if account is None or account.key_in(pool) > level:
                break
            idle.discard(account)
            account.leave(pool)
            if not account.stands:
                self._forget(account, parent)
        if not idle:
            del parent.idle[pool]

    def _forget(self, account: Node, parent: Branch) -> None:
        del parent.children[account.name]
        parent.service_forgotten += account.service
        for below in (account, *_below(account)):
            if isinstance(below, Leaf):
                del self._leaves[below.member]


def _adopt(parent: Branch, child: Node) -> None:
    child.path = (*parent.path, (child, parent))
    parent.children[child.name] = child


def _join(parent: Branch, former: tuple[Pool, ...], pool: Pool) -> None:
    """Let all children be in `pool` what they were in the `former` ones, by virtual time."""
    virtuals = {old: parent.virtual.get(old) or Virtual() for old in former}
    joint = parent.virtual[pool] = Virtual.joint(virtuals.values())
    for child in parent.children.values():
        shifts = [(old, joint.now - virtuals[old].now) for old in former if old in child.stands]
        if not shifts:
            continue
        child.stands[pool] = Stand(
            key=max(child.stands[old].key + shift for old, shift in shifts),
            ceiling=max(child.stands[old].ceiling + shift for old, shift in shifts),
        )
        if not child.awake:
            parent.idle.setdefault(pool, Heap(pool)).add(child)
    for lane, heap in parent.lanes.items():
        if lane.pool is pool:
            heap.move(pool)


def _below(account: Node) -> Iterator[Node]:
    for child in account.children.values() if isinstance(account, Branch) else ():
        yield child
        yield from _below(child)


def _validate(account: Node) -> None:
    if account.parent is not None:
        assert {lane.pool for lane in account.lanes} <= account.stands.keys()
    assert account.queued >= 0
    assert account.running >= 0
    for heap in account.lanes.values():
        assert heap
        heap.validate()
    if isinstance(account, Leaf):
        assert account.queued == sum(map(len, account.lanes.values()))
    else:
        _validate_branch(account)


def _validate_branch(branch: Branch) -> None:
    children = branch.children.values()
    assert branch.queued == sum(child.queued for child in children)
    assert branch.running == sum(child.running for child in children)
    assert branch.service == sum(child.service for child in children) + branch.service_forgotten
    assert branch.lanes.keys() == {lane for child in children for lane in child.lanes}
    for lane, heap in branch.lanes.items():
        assert set(heap) == {child for child in children if lane in child.lanes}
    for pool, idle in branch.idle.items():
        idle.validate()
        assert set(idle) == {one for one in children if not one.awake and pool in one.stands}
    assert all(child.awake or child.stands for child in children)
    assert branch.awake_weight == sum(child.weight for child in children if child.awake)
