"""Fair shares: who is next, decided by what each has had so far for its weight.

Theory of operation
-------------------
Members form a tree: organisation, project, person. Each has an `Account` whose key is the price of
all that was done for it and everything below it, per share (a weight of 1,000). Service is charged
to every account on the path from a member up to its organisation, so fairness holds among
organisations, inside an organisation, and inside a project, each with its own weights. A member
that is no person may have requests of its own: they wait in a leaf below it, which is one more
child, of weight 1,000.

*Pick*: from the root down, the account of least key among those that have something waiting in one
of the open lanes; in the leaf, the oldest request. Between equals the one that has waited longer.

*Lift*: an account that had nothing waiting and now has is raised to the least key among its
siblings that wait, or to its parent's virtual time (the largest key ever dispatched) if none does.
It is never lowered: idleness earns nothing.

*Forget*: an account with nothing waiting or running at or below it is dropped, with all below it,
as soon as its key is not above the level that it would be lifted to. That is safe because its
return would lift it there anyhow, as it does a newcomer. One whose key is ahead is kept until the
others have caught up, so nobody resets its key by going away. (What is lost is who was ahead of
whom inside an organisation, once the whole of it has been idle until others have passed it.) Hence
memory is bounded by those who wait, run or are ahead.

Keys move with each charge, so the heaps are lazy: an entry whose item has moved on since is put
back where it belongs when it surfaces; only a refund, which lowers a key, has to add an entry at
once. A pick costs O(depth x log members), a charge O(depth), a lift O(depth x lanes).

Prices are exact: whole micro-credits. One credit is a fresh prompt token of a model of factor 1;
a cached prompt token costs a tenth of it, an output token four times as much.

Invariants: each key is base + floor(1,000 x paid / weight); service and counts of an account are
the sums over its children, living or forgotten; an account is in its parent's heap of a lane if
and only if something waits in that lane at or below it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from anser.core.members import ancestry
from anser.core.slots import Lane

__all__ = ["Account", "Heap", "Place", "Shares", "Standing", "price"]

# Micro-credits per token and per thousandth of the model's factor.
_FRESH, _CACHED, _OUTPUT = 1_000, 100, 4_000

_WEIGHT = 1_000  # one share
_DEPTH_MAX = 3
_OWN = ""  # the name of a member's own leaf, which is no path
_SWEPT_MAX = 4  # accounts forgotten per dispatch and level: more than can come, in small steps
_GARBAGE_MIN = 16  # entries; smaller heaps are not worth compacting


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
    key: int  # micro-credits per share of its siblings' measure
    service: int  # micro-credits since the account was opened
    queued: int
    running: int


class _Keyed(Protocol):
    @property
    def key(self) -> int: ...


_T = TypeVar("_T", bound=_Keyed)


class Heap(Generic[_T]):
    """A set of items, least key first, equals in the order of entry. Keys may grow unannounced."""

    __slots__ = ("_entries", "_entry_of", "_next")

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, _T]] = []
        self._entry_of: dict[_T, int] = {}
        self._next = 0

    def add(self, item: _T) -> None:
        """Put the item in, or in its new place after its key has become less."""
        number = self._next = self._next + 1
        self._entry_of[item] = number
        heapq.heappush(self._entries, (item.key, number, item))
        self._clear_away()

    def discard(self, item: _T) -> None:
        """Take the item out, if it is in."""
        if self._entry_of.pop(item, None) is not None:
            self._clear_away()

    def least(self) -> _T | None:
        """The item of least key, or None when empty."""
        entries = self._entries
        while entries:
            key, number, item = entries[0]
            if self._entry_of.get(item) != number:
                heapq.heappop(entries)
            elif key != item.key:
                number = self._next = self._next + 1
                self._entry_of[item] = number
                heapq.heapreplace(entries, (item.key, number, item))
            else:
                return item
        return None

    def _clear_away(self) -> None:
        if len(self._entries) > 2 * len(self._entry_of) + _GARBAGE_MIN:
            self._entries = [(item.key, number, item) for item, number in self._entry_of.items()]
            heapq.heapify(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._entry_of)

    def __repr__(self) -> str:
        return f"<Heap of {len(self._entry_of)}, {len(self._entries)} entries>"

    def validate(self) -> None:
        """Assert that each item has its entry, and none with a key above its own."""
        numbers = {number: (key, item) for key, number, item in self._entries}
        assert len(numbers) == len(self._entries) <= 2 * len(self._entry_of) + _GARBAGE_MIN
        for item, number in self._entry_of.items():
            key, entered = numbers[number]
            assert entered is item
            assert key <= item.key


@dataclass(slots=True, eq=False, kw_only=True)
class Place:
    """A waiting request's place among its account's own: `key` is its turn, least first."""

    id: str
    account: Account
    lane: Lane
    key: int


def _nobody() -> Heap[Account]:
    return Heap()  # annotated here, because Heap["Account"]() costs a microsecond each time


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

    def least(self, lanes: Iterable[Lane]) -> Account | Place | None:
        """The child or, in a leaf, the request of least key that waits in one of `lanes`."""
        found: Account | Place | None = None
        for lane in lanes:
            heap = self.lanes.get(lane)
            item = heap.least() if heap else None
            if item is not None and (found is None or item.key < found.key):
                found = item
        return found

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
        self.base, self.paid, self.weight = self.key, 0, weight

    def __repr__(self) -> str:
        return f"<Account {self.member} key={self.key} {self.queued} queued {self.running} running>"


class Shares:
    """The tree of accounts, and which waiting request is next."""

    def __init__(self) -> None:
        self._root = Account(member="", name="", parent=None, weight=_WEIGHT)
        self._leaves: dict[str, Account] = {}
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

    def weigh(self, member: str, weight: int) -> None:
        """Give a member its weight among its siblings, in thousandths."""
        self._weights[member] = weight
        if weight == _WEIGHT:
            del self._weights[member]
        account = self.find(member)
        if account is not None:
            account.weigh(weight)

    def leaf(self, member: str) -> Account:
        """The account in which this member's own requests wait; opened if need be."""
        return self._leaves.get(member) or self._open(member)

    def find(self, member: str) -> Account | None:
        """The account of this member and all below it, if there is one."""
        account: Account | None = self._root
        for name in ancestry(member):
            account = account.children.get(name) if account else None
        return account

    def arrive(self, leaf: Account) -> None:
        """A request of `leaf` is here, to wait or to start: lift whoever had nothing waiting."""
        for account, parent in leaf.path:
            if not account.queued:
                if not account.running:
                    parent.idle.discard(account)
                account.lift(parent.level())

    def enqueue(self, place: Place) -> None:
        """Let an arrived request wait."""
        item: Account | Place = place
        account: Account | None = place.account
        while account is not None:
            account.queued += 1
            heap = account.lanes.get(place.lane)
            if heap is None:
                heap = account.lanes[place.lane] = Heap()
            if item not in heap:
                heap.add(item)
            item, account = account, account.parent

    def dequeue(self, place: Place) -> None:
        """Let a request wait no longer, because it starts or is not wanted any more."""
        emptied: Account | Place | None = place
        account: Account | None = place.account
        while account is not None:
            account.queued -= 1
            if emptied is not None:
                heap = account.lanes[place.lane]
                heap.discard(emptied)
                emptied = None if heap else account
                if emptied:
                    del account.lanes[place.lane]
            account = account.parent

    def pick(self, lanes: Iterable[Lane]) -> Place | None:
        """The waiting request that is next for a slot to which these lanes are open."""
        item = self._root.least(lanes)
        while isinstance(item, Account):
            item = item.least(lanes)
        return item

    def start(self, leaf: Account, micro_credits: int) -> None:
        """A request of `leaf` starts, and pays this much at once."""
        self._root.running += 1
        self._root.service += micro_credits
        for account, parent in leaf.path:
            account.running += 1
            account.pay(micro_credits)
            parent.virtual = max(parent.virtual, account.key)
            if parent.idle:
                self._sweep(parent)

    def charge(self, leaf: Account, micro_credits: int) -> None:
        """Charge, or refund if negative, a request of `leaf` that runs."""
        self._root.service += micro_credits
        for account, _ in leaf.path:
            account.pay(micro_credits)

    def end(self, leaf: Account) -> None:
        """A request of `leaf` runs no longer."""
        self._root.running -= 1
        for account, _ in leaf.path:
            account.running -= 1

    def retire(self, leaf: Account) -> None:
        """Forget what is idle on the path of `leaf`, at once or when the others have caught up."""
        for account, parent in reversed(leaf.path):
            if account.queued or account.running:
                return
            if account.key > parent.level():
                parent.idle.add(account)
            else:
                self._forget(account, parent)

    def standings(self) -> list[Standing]:
        """A row for each member that has an account, parents before children."""
        return [
            Standing(
                member=account.member,
                weight=account.weight,
                key=account.key,
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
        leaves = {account.member: account for account in _below(self._root) if _is_leaf(account)}
        assert leaves == self._leaves
        for account in (self._root, *_below(self._root)):
            _validate(account)

    def _open(self, member: str) -> Account:
        names = ancestry(member)
        assert "" not in member.split("/")
        assert len(names) <= _DEPTH_MAX
        account = self._root
        for name in names:
            account = account.children.get(name) or self._child(account, name, member=name)
        if len(names) < _DEPTH_MAX:
            account = self._child(account, _OWN, member=member)
        self._leaves[member] = account
        return account

    def _child(self, parent: Account, name: str, *, member: str) -> Account:
        weight = self._weights.get(name, _WEIGHT)
        account = Account(member=member, name=name, parent=parent, weight=weight)
        account.path = (*parent.path, (account, parent))
        parent.children[name] = account
        return account

    def _sweep(self, parent: Account) -> None:
        level = parent.level()
        for _ in range(_SWEPT_MAX):
            account = parent.idle.least()
            if account is None or account.key > level:
                return
            self._forget(account, parent)

    def _forget(self, account: Account, parent: Account) -> None:
        del parent.children[account.name]
        parent.service_forgotten += account.service
        parent.idle.discard(account)
        if _is_leaf(account):
            del self._leaves[account.member]
        for below in _below(account):
            if _is_leaf(below):
                del self._leaves[below.member]


def _is_leaf(account: Account) -> bool:
    return account.name == _OWN or len(account.path) == _DEPTH_MAX


def _below(account: Account) -> Iterator[Account]:
    for child in account.children.values():
        yield child
        yield from _below(child)


def _validate(account: Account) -> None:
    children = account.children.values()
    assert account.key == account.base + account.paid * _WEIGHT // account.weight
    assert account.queued >= 0
    assert account.running >= 0
    if account.parent is not None and _is_leaf(account):
        assert not children
        assert account.queued == sum(map(len, account.lanes.values()))
    else:
        assert account.queued == sum(child.queued for child in children)
        assert account.running == sum(child.running for child in children)
        paid_below = sum(child.service for child in children) + account.service_forgotten
        assert account.service == paid_below
        _validate_heaps(account)


def _validate_heaps(account: Account) -> None:
    waiting = {lane for child in account.children.values() for lane in child.lanes}
    assert account.lanes.keys() == waiting
    for lane, heap in account.lanes.items():
        heap.validate()
        assert set(heap) == {child for child in account.children.values() if lane in child.lanes}
    account.idle.validate()
    for child in account.children.values():
        active = child.queued or child.running
        assert (child in account.idle) == (not active)
