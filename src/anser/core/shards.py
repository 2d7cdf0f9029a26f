"""One of several schedulers that share a pool of nodes: a shard.

Theory of operation
-------------------
Each node is owned by one shard, and a request is scheduled by the shard that it came to, whichever
its member. Shards tell each other how things are (`gossip`): what each account was served (`sums`),
who has least there, and which slots are lent. Nothing waits for an answer, so a shard decides as
quickly as if it were alone, and what it knows of the others is a little old; by how much this
weakens fairness is said in docs/explanation/fairness.md.

*Lending*: a free slot that is due to a request of another shard (`Neighbours.neediest`) is lent to
that shard. The owner counts a lent slot as no slot of its node. The borrower starts one request in
it, or none, and gives it back when that ends, or at once. So lent, taken and free slots of a node
are never more than it has, whatever is lost, late or doubled:

- A loan has a number that is never used again, and the owner lists all loans of a borrower in each
  message to it until the borrower says that it has given them back. The borrower says so until the
  owner lists them no more. Only the newest message counts, so nothing old brings a loan back.
- A borrower takes no loan from a message that may be older than `take_s`; it can tell, because the
  message says which of its own had been heard.

*Loss of a node*: its owner is told as always. A borrower sees its lease there fail, tries again on
other nodes, and gives the slot back; until then the owner does not count with it, also if the node
comes back.

*Loss of a shard*: what waited there is lost with it. After `lost_s` of silence its calls count no
more. The slots lent to it stay lent until it has been silent for twice that and the node itself
says that it runs nothing but its owner's leases (`reclaim`): it can have begun nothing since,
because it took no loan that was older than `take_s`. Its own nodes may be given to another shard
once they say that they run nothing. It may come back with all that it knew, or under a new name.

Limits: one pool, without a batch band.

Invariants: a node has no more slots in its owner's scheduler than it claims less those lent; each
slot that is held of another shard has one lease; those of `sums`, `shared` and `scheduler`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from anser.core.events import Decision, Event, NodeChanged, NodeGone, Refused, Start, Submitted
from anser.core.gossip import Lent, Loan, Message, Neighbour, Neighbours, Returned
from anser.core.rules import DESIGN, Rules
from anser.core.shared import ShardScheduler, accounts_of
from anser.core.sums import Sums

__all__ = ["Gossip", "Shard"]

_HASTE = 8  # times as often as usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Gossip:
    """How often shards talk, and how much."""

    every_s: float = 0.25
    lost_s: float = 2.0  # a shard that is silent for so long is not counted with
    rows_max: int = 4_096  # in one message
    accounts_max: int = 1_000_000  # known to one shard

    @property
    def take_s(self) -> float:
        """A loan that may be older than this is given back."""
        return self.lost_s


@dataclass(slots=True)
class _Owned:
    """A node of this shard."""

    slots: int
    models: frozenset[str]
    lent: int = 0


class Shard:
    """One scheduler of several: `handle` events, `speak` to the others, `hear` what they say."""

    def __init__(
        self,
        name: str,
        others: Iterable[str],
        *,
        queued_max: int,
        retries_max: int,
        rules: Rules = DESIGN,
        gossip: Gossip | None = None,
    ) -> None:
        self.name = name
        self.gossip = gossip = Gossip() if gossip is None else gossip
        self.dropped = 0  # messages that were for another, or from nobody
        self.sums = Sums(gossip.accounts_max)
        self._neighbours = Neighbours(name, others, self.sums, lost_s=gossip.lost_s)
        assert name not in self._neighbours.all
        self.scheduler = ShardScheduler(
            queued_max, retries_max, rules, sums=self.sums, neighbours=self._neighbours
        )
        self._owned: dict[str, _Owned] = {}
        self._loans = 0

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take one event at monotonic time `now` (seconds) and say what has to be done.

        A member that is new is refused where there is no room for its account.
        """
        self._neighbours.now = now
        if isinstance(event, Submitted):
            request = event.request
            assert not request.batch
            if not self.sums.room_for(accounts_of(request.member)):
                return [Refused(request=request.id, code="overloaded")]
        decisions = self.scheduler.handle(self._less_lent(event), now)
        for one in self._neighbours.all.values():
            if one.held and self._reading(one) != one.told:
                one.haste = True
        if isinstance(event, Submitted) and self.scheduler.waits_light(event.request.id):
            for one in self._neighbours.all.values():
                one.haste = True
        return self._settle(decisions, now)

    def speak(self, now: float) -> list[Message]:
        """What is to be sent now, if anything; to be asked after each event, and often.

        To each other shard in turn; at once when a slot changes hands, and soon when a prompt has
        been charged or read, or when a request of a member waits that asks little.
        """
        self._neighbours.now = now
        due = [one for one in self._neighbours.all.values() if self._is_due(one, now)]
        if not due:
            return []
        calls, waiting, light = self.scheduler.calls()
        messages: list[Message] = []
        for one in due:
            rows, upto = self.sums.changed(one.taken, self.gossip.rows_max)
            one.told = self._reading(one)
            messages.append(
                Message(
                    sender=self.name,
                    receiver=one.name,
                    number=one.speaks(now),
                    heard_number=one.heard_number,
                    heard_stamp=one.heard_stamp,
                    since=one.taken,
                    upto=upto,
                    rows=rows,
                    slots=self.scheduler.owned(),
                    calls=calls,
                    waiting=waiting,
                    light=light,
                    loans=tuple(lent.loan for lent in one.lent.values()),
                    returned=tuple(one.returned.values()),
                    reading=one.told,
                )
            )
        return messages

    def hear(self, message: Message, now: float) -> list[Decision]:
        """Take what another shard has said, and say what has to be done."""
        one = self._neighbours.all.get(message.sender)
        if one is None or message.receiver != self.name:
            self.dropped += 1
            return []
        self._neighbours.now = now
        moved, whole = self.sums.merge(one.name, message.rows)
        one.takes(message, whole=whole)
        decisions: list[Decision] = []
        if one.hears(message, now):
            decisions += self._close(one, (gone.number for gone in message.returned), now)
            listed = {loan.number for loan in message.loans}
            one.returned = {n: gone for n, gone in one.returned.items() if n in listed}
            decisions += self.scheduler.heard(moved, list(self._owned), now)
            decisions += self._borrow(one, message, now)
        else:
            decisions += self.scheduler.heard(moved, (), now)
        return self._settle(decisions, now)

    def reclaim(self, node: str, *, running: int, now: float) -> list[Decision]:
        """This node of ours says that so many answers run on it in all.

        If none of them can be another's, slots lent to shards that have gone are free again.
        """
        self._neighbours.now = now
        if node not in self._owned or running > self.scheduler.running_on(node):
            return []
        decisions: list[Decision] = []
        for one in self._neighbours.all.values():
            if now - one.heard_at > 2 * self.gossip.lost_s:
                lost = [n for n, lent in one.lent.items() if lent.loan.node == node]
                decisions += self._close(one, lost, now)
        return self._settle(decisions, now)

    def _reading(self, one: Neighbour) -> dict[str, int]:
        """What its nodes have to read for heavy members of ours."""
        nodes = {loan.node for loan in one.held.values()}
        reading = {node: self.scheduler.reading_on(node) for node in nodes}
        return {node: tokens for node, tokens in sorted(reading.items()) if tokens}

    def _is_due(self, one: Neighbour, now: float) -> bool:
        silent_s = now - one.spoken_at
        every_s = self.gossip.every_s
        return one.news or silent_s >= every_s or (one.haste and silent_s >= every_s / _HASTE)

    def _less_lent(self, event: Event) -> Event:
        """What an event about a node means for the slots that are not lent."""
        match event:
            case NodeChanged():
                assert not any(event.node == loan.node for loan in self._held())
                owned = self._owned.setdefault(event.node, _Owned(0, frozenset()))
                self.scheduler.own(-owned.slots, owned.models)
                self.scheduler.own(event.slots, event.models)
                owned.slots, owned.models = event.slots, event.models
                self._forget(event.node, owned)
                return self._offer(event.node, owned)
            case NodeGone(node=node) if node in self._owned:
                owned = self._owned[node]
                self.scheduler.own(-owned.slots, owned.models)
                owned.slots, owned.models = 0, frozenset()
                self._forget(node, owned)
                return event
            case _:
                return event

    def _offer(self, node: str, owned: _Owned) -> NodeChanged:
        return NodeChanged(node=node, slots=max(0, owned.slots - owned.lent), models=owned.models)

    def _forget(self, node: str, owned: _Owned) -> None:
        if not owned.slots and not owned.lent:
            del self._owned[node]

    def _close(self, one: Neighbour, numbers: Iterable[int], now: float) -> list[Decision]:
        """These loans have ended."""
        decisions: list[Decision] = []
        for number in numbers:
            if number in one.lent:
                node = one.lent.pop(number).loan.node
                owned = self._owned[node]
                owned.lent -= 1
                decisions += self.scheduler.handle(self._offer(node, owned), now)
                self._forget(node, owned)
        return decisions

    def _borrow(self, one: Neighbour, message: Message, now: float) -> list[Decision]:
        """Use the slots that are lent to us now, as far as there is use for them."""
        new = [
            loan
            for loan in message.loans
            if loan.number not in one.held and loan.number not in one.returned
        ]
        one.news |= bool(new)
        if one.age(message, now) > self.gossip.take_s:
            self._give_back(one, new, used=False)
            return []
        decisions: list[Decision] = []
        for loan in new:
            before = self.scheduler.running_on(loan.node)
            one.held[loan.number] = loan
            decisions += self.scheduler.borrow(loan.node, loan.models, now, light=loan.light)
            if self.scheduler.running_on(loan.node) == before:
                self._give_back(one, [loan], used=False)
        return decisions

    def _give_back(self, one: Neighbour, loans: Iterable[Loan], *, used: bool) -> None:
        for loan in loans:
            one.held.pop(loan.number, None)
            one.returned[loan.number] = Returned(number=loan.number, used=used)
            one.news = True

    def _settle(self, decisions: list[Decision], now: float) -> list[Decision]:
        """Give back what is used no more, and lend what is due elsewhere."""
        started = any(isinstance(decision, Start) for decision in decisions)
        for one in self._neighbours.all.values():
            one.haste |= started  # its prompt has been charged at once
            used = Counter(loan.node for loan in one.held.values())
            for node, held in used.items():
                over = held - self.scheduler.running_on(node)
                loans = [loan for loan in one.held.values() if loan.node == node]
                self._give_back(one, loans[:over], used=True)
        for node, owned in list(self._owned.items()):
            for light in (False, True):
                decisions = decisions + self._lend_all(node, owned, now, light=light)
        return decisions

    def _lend_all(self, node: str, owned: _Owned, now: float, *, light: bool) -> list[Decision]:
        """Lend what this node has to spare and is due elsewhere."""
        decisions: list[Decision] = []
        while self.scheduler.spare(node, light=light):
            neediest = self._neighbours.neediest(sorted(owned.models), light=light)
            if neediest is None:
                break
            one, costs = neediest
            loan = self._loan(node, owned, light=light)
            one.lent[loan.number] = Lent(loan=loan, told=one.number + 1, costs=costs)
            one.news = True
            decisions += self.scheduler.handle(self._offer(node, owned), now)
        return decisions

    def _loan(self, node: str, owned: _Owned, *, light: bool) -> Loan:
        self._loans += 1
        owned.lent += 1
        return Loan(number=self._loans, node=node, models=owned.models, light=light)

    def _held(self) -> list[Loan]:
        return [loan for one in self._neighbours.all.values() for loan in one.held.values()]

    def __repr__(self) -> str:
        lent = sum(owned.lent for owned in self._owned.values())
        return f"<Shard {self.name} {lent} lent {len(self._held())} held {self.scheduler!r}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        self.scheduler.validate()
        lent = Counter(
            lent.loan.node for one in self._neighbours.all.values() for lent in one.lent.values()
        )
        assert lent == Counter({node: owned.lent for node, owned in self._owned.items()})
        for loan_node, held in Counter(loan.node for loan in self._held()).items():
            assert held == self.scheduler.running_on(loan_node)
        for one in self._neighbours.all.values():
            assert not one.held.keys() & one.returned.keys()
