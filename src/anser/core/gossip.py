"""What shards tell each other, and what one knows of the others by it.

Theory of operation
-------------------
A `Message` says how things are, never what has changed, so it may be lost, late, doubled or out of
order: what it says of sums is merged by maximum (`sums`), and the rest of it counts only if its
number is the highest so far. It says how much of the other's it has taken (`heard_number`,
`heard_stamp`), and so what need not be said again.

A shard *calls* for slots by telling, for each account below which something waits, the least key of
its children and whose that is. From all calls follows where a free slot of some models is due:
from the root down, to the child of least key, at the shard that called for it. A call is as old as
its message: a key is at least what has been heard of it since, and a slot that is under way counts
as used by whoever it was called for.

An account that waits at several shards has its *turn* at one of them: with each start that is told
it goes round. At the others its key counts as what it will be after that start, in calls too. So
two shards do not start the same member's requests while neither has heard of the other's start,
and if they disagree on the turn for a moment, or the one that has it cannot start, the others do
when it is that far behind; nothing waits for a turn for longer.

It also tells what a borrowed slot's node still has to read for members above their share, so that
the owner's reading gate holds for all. Until it has told of a loan, the gate is closed.

A shard that has not been heard of for `lost_s` calls no more. Nor does one for as long as it has as
many slots under way to it as it has requests for them, or has just given one back unused; if that
was kept for light members, it calls for such no more.

Times are those of the shard's own clock; nothing compares two clocks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from anser.core.sums import Row, Sums

__all__ = [
    "CALLS_MAX",
    "UNHEARD_MAX",
    "Call",
    "Lent",
    "Loan",
    "Message",
    "Neighbour",
    "Neighbours",
    "Returned",
]

CALLS_MAX = 256  # in one message; those of the upper levels first
UNHEARD_MAX = 8  # slots under way to one shard that it has not confirmed
_SENT_MAX = 256  # messages whose time is remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Something waits for this model below `parent`: the least key among its children."""

    parent: str
    model: str
    child: str
    key: int  # micro-credits per share
    cost: int = 0  # the same: by how much that grows when its next request starts

    def __post_init__(self) -> None:
        assert self.child.startswith(self.parent)
        assert self.child != self.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """A slot of a node of the sender that is the other's until it gives it back."""

    number: int  # of the sender's loans; never used again
    node: str
    models: frozenset[str]
    light: bool = False  # it is for a member who asks little only


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """A loan of the other that has ended."""

    number: int
    used: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """How things are at one shard, for another."""

    sender: str
    receiver: str
    number: int  # of the sender's messages to the receiver, from 1
    heard_number: int  # the highest of the receiver's that it has had
    heard_stamp: int  # the receiver's rows up to this stamp have all been taken
    since: int  # `rows` are all that changed after this stamp
    upto: int  # up to this one
    rows: tuple[Row, ...]
    slots: Mapping[str, int]  # of its nodes, by model
    calls: tuple[Call, ...]
    waiting: Mapping[str, int]  # requests by model
    light: Mapping[str, int]  # of these, some that are next and of members who ask little
    loans: tuple[Loan, ...]  # all that the receiver has not given back yet
    returned: tuple[Returned, ...]  # of the receiver's, until it lists them no more
    reading: Mapping[str, int]  # prompt tokens of its heavy members, by node of the receiver's


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """A loan, as its owner knows it."""

    loan: Loan
    told: int  # the number of the first message that told of it
    costs: Mapping[str, int]  # by how much keys of accounts will have grown when it is used


@dataclass(slots=True, eq=False)
class Neighbour:
    """Another shard, as this one knows it."""

    name: str
    number: int = 0  # of the last message to it
    heard_number: int = 0  # of its last message
    heard_stamp: int = 0
    acknowledged: int = 0  # the number of the last message that it has had
    taken: int = 0  # the stamp up to which it has taken our rows
    heard_at: float = -inf
    spoken_at: float = -inf
    news: bool = False  # of a slot lent, had or given back that it has not been told of
    haste: bool = False  # something has happened that it should know soon
    calls: dict[str, dict[str, Call]] = field(
        default_factory=dict[str, dict[str, Call]]
    )  # by account and model
    slots: Mapping[str, int] = field(default_factory=dict[str, int])
    waiting: Mapping[str, int] = field(default_factory=dict[str, int])
    light: Mapping[str, int] = field(default_factory=dict[str, int])
    reading: Mapping[str, int] = field(default_factory=dict[str, int])  # of it, by node of ours
    told: Mapping[str, int] = field(default_factory=dict[str, int])  # the same of ours, by its node
    lent: dict[int, Lent] = field(default_factory=dict[int, Lent])  # to it
    returned: dict[int, Returned] = field(default_factory=dict[int, Returned])  # of its loans
    held: dict[int, Loan] = field(default_factory=dict[int, Loan])  # its loans that are used
    sent_at: OrderedDict[int, float] = field(default_factory=OrderedDict[int, float])

    def hears(self, message: Message, now: float) -> bool:
        """Take note of a message; whether it is the newest of it."""
        self.acknowledged = max(self.acknowledged, min(message.heard_number, self.number))
        self.taken = max(self.taken, message.heard_stamp)
        if message.number <= self.heard_number:
            return False
        self.heard_number, self.heard_at = message.number, now
        # Who leaves a slot unused does not wait for such.
        unused = [one.number for one in message.returned if not one.used]
        declined = {self.lent[number].loan.light for number in unused if number in self.lent}
        self.calls = {}
        for call in () if False in declined else message.calls:
            self.calls.setdefault(call.parent, {})[call.model] = call
        self.waiting = {} if False in declined else message.waiting
        self.light = {} if declined else message.light
        self.reading, self.slots = message.reading, message.slots
        return True

    def takes(self, message: Message, *, whole: bool) -> None:
        """Its rows are merged; `whole`: each of them was."""
        if whole and message.since <= self.heard_stamp:
            self.heard_stamp = max(self.heard_stamp, message.upto)

    def speaks(self, now: float) -> int:
        """The number of one more message to it."""
        self.number += 1
        self.spoken_at, self.news, self.haste = now, False, False
        self.sent_at[self.number] = now
        if len(self.sent_at) > _SENT_MAX:
            self.sent_at.popitem(last=False)
        return self.number

    def age(self, message: Message, now: float) -> float:
        """The most that can have passed since it was sent, by our clock alone.

        It was sent after ours had come that it has heard of.
        """
        return now - self.sent_at.get(message.heard_number, -inf)

    @property
    def unheard(self) -> list[Lent]:
        """What is lent to it and of which it has not heard yet, as far as is known."""
        return [lent for lent in self.lent.values() if lent.told > self.acknowledged]

    def reads(self, node: str) -> float:
        """What a node of ours has to read for its heavy members; all there is until it has told."""
        if any(lent.loan.node == node and not lent.loan.light for lent in self.unheard):
            return inf
        return self.reading.get(node, 0)

    def wants(self, models: Iterable[str], *, light: bool = False) -> int:
        """How many more slots of these models it can use, as far as is known."""
        by_model = self.light if light else self.waiting
        return sum(by_model.get(model, 0) for model in models) - len(self.unheard)

    def __repr__(self) -> str:
        return f"<Neighbour {self.name} lent {len(self.lent)} held {len(self.held)}>"


class Neighbours:
    """All other shards. `lost_s`: after so much silence, one is not counted with."""

    def __init__(self, name: str, names: Iterable[str], sums: Sums, *, lost_s: float) -> None:
        self.name = name
        self.lost_s = lost_s
        self._sums = sums
        self.now = -inf
        self.all: dict[str, Neighbour] = {name: Neighbour(name) for name in sorted(names)}

    def heard(self) -> list[Neighbour]:
        """Those that are there."""
        return [one for one in self.all.values() if self.now - one.heard_at <= self.lost_s]

    def least(self, parent: str, models: Iterable[str]) -> int | None:
        """The least key that is called for below an account, for these models."""
        found = self._least(parent, list(models), self.pledged())
        return found[0] if found else None

    def pledged(self) -> Counter[str]:
        """By how much the keys of accounts will grow by slots that are under way to them."""
        pledged = Counter[str]()
        for one in self.heard():
            for lent in one.unheard:
                pledged.update(lent.costs)
        return pledged

    def keys(self, parent: str) -> list[int]:
        """The least keys that wait below an account, for each shard and model."""
        return [call.key for one in self.heard() for call in one.calls.get(parent, _NONE).values()]

    def starter(self, account: str) -> str:
        """The shard whose turn it is to start a request of this account, where it waits.

        Our own if it waits nowhere.
        """
        names = self._sums.waits_where(account, [one.name for one in self.heard()])
        if self._sums.waits(account):
            names.append(self.name)
        return sorted(names)[self._sums.started(account) % len(names)] if names else self.name

    def slots(self, model: str) -> int:
        """Slots of their nodes for a model."""
        return sum(one.slots.get(model, 0) for one in self.heard())

    def reads(self, node: str) -> float:
        """What a node of ours has to read for heavy members elsewhere, in prompt tokens."""
        return sum(one.reads(node) for one in self.heard())

    def neediest(
        self, models: Iterable[str], *, light: bool = False
    ) -> tuple[Neighbour, dict[str, int]] | None:
        """Who should have a slot of these models, and by how much that will raise whose keys.

        `light`: if it is for light members, among theirs. None too while it has not confirmed those
        that it was lent before: perhaps it has gone.
        """
        models, pledged = list(models), self.pledged()
        costs: dict[str, int] = {}
        neighbour: Neighbour | None = None
        found = self._least("", models, pledged, light=light)
        while found is not None:
            _, call, neighbour = found
            costs[call.child] = call.cost
            found = self._least(call.child, models, pledged, light=light)
        if neighbour is None or len(neighbour.unheard) >= UNHEARD_MAX:
            return None
        return neighbour, costs

    def _least(
        self, parent: str, models: list[str], pledged: Counter[str], *, light: bool = False
    ) -> tuple[int, Call, Neighbour] | None:
        found: tuple[int, Call, Neighbour] | None = None
        for neighbour in self.heard():
            if neighbour.wants(models, light=light) <= 0:
                continue
            calls = neighbour.calls.get(parent, _NONE)
            for call in (calls[model] for model in models if model in calls):
                # Others than the caller may have served the child since.
                key = max(call.key, self._sums.key(call.child)) + pledged[call.child]
                if found is not None and key >= found[0]:
                    continue
                if self.starter(call.child) != neighbour.name:
                    key += call.cost
                if found is None or key < found[0]:
                    found = key, call, neighbour
        return found

    def __repr__(self) -> str:
        return f"<Neighbours {len(self.heard())}/{len(self.all)} heard>"


_NONE: dict[str, Call] = {}
