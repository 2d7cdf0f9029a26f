"""Several shards: what they know converges, and nobody gets ahead by more than the bound allows."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.core.events import (
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    Progressed,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.fairness import price
from anser.core.gossip import Message
from anser.core.ledger import Usage
from anser.core.rules import DESIGN
from anser.core.shards import Gossip, Shard
from anser.core.sums import Row, Sums

# What is known converges

_ACCOUNTS = ("a", "a/", "b", "b/p", "b/p/x")
_changes = st.lists(
    st.tuples(
        st.integers(0, 2),  # the shard that does it
        st.sampled_from(_ACCOUNTS),
        st.integers(-50, 100),  # micro-credits
        st.integers(0, 500),  # a key to be lifted to, or given a slot
        st.integers(1, 3),  # rows in the message that follows
    ),
    max_size=30,
)


def _told(changes: Sequence[tuple[int, str, int, int, int]]) -> tuple[list[Sums], list[_Said]]:
    """Three shards that do all that, and a message of each after each thing that it did."""
    shards = [Sums(100) for _ in range(3)]
    said: list[_Said] = []
    taken = [0, 0, 0]
    for number, account, micro_credits, key, most in changes:
        own = shards[number]
        own.charge(account, micro_credits=micro_credits, raised=micro_credits * 2)
        own.lift(account, key)
        own.advance(account, key)
        own.start(account)
        rows, taken[number] = own.changed(taken[number], most)
        said.append((number, rows))
        own.validate()
    for number, own in enumerate(shards):
        said.append((number, own.changed(taken[number], 100)[0]))
    return shards, said


_Said = tuple[int, tuple[Row, ...]]


def _known(sums: Sums) -> dict[str, tuple[int, int, int, int]]:
    return {
        one: (sums.total(one), sums.key(one), sums.virtual(one), sums.started(one))
        for one in sums.totals()
    }


@given(_changes, st.randoms(use_true_random=False))
def test_knowledge_does_not_depend_on_the_order(
    changes: list[tuple[int, str, int, int, int]], draw: random.Random
) -> None:
    """Messages may come in any order and more than once: all who had them know the same."""
    _, said = _told(changes)
    observers = [Sums(100), Sums(100)]
    for observer in observers:
        order = said + draw.choices(said, k=len(said))
        draw.shuffle(order)
        for number, rows in order:
            observer.merge(str(number), rows)
            observer.validate()
    assert _known(observers[0]) == _known(observers[1])


@given(_changes)
def test_what_is_known_at_the_end_is_what_was_done(
    changes: list[tuple[int, str, int, int, int]],
) -> None:
    """Bounded messages, each of which goes on where the last ended, tell everything."""
    shards, said = _told(changes)
    observer = Sums(100)
    for number, rows in said:
        observer.merge(str(number), rows)
    for account in _ACCOUNTS:
        assert observer.total(account) == sum(own.total(account) for own in shards)
    for number, own in enumerate(shards):
        for other, rows in said:
            if other != number:
                own.merge(str(other), rows)
        assert _known(own) == _known(observer)


# The bound


@dataclass
class _Side:
    """One member: what it was served, and the extremes of what its bound is made of."""

    weight: int
    ended: int = 0
    served: int = 0
    due: int = 0
    due_most: int = 0
    reserved_most: int = 0
    reserved_least: int = 0

    def bound(self) -> float:
        return (self.due_most + self.reserved_most - self.reserved_least) / self.weight


@dataclass
class _Run:
    request: Request
    home: str
    output: int
    written: int = 0

    def usage(self, written: int) -> Usage:
        if not written:
            return Usage()
        return Usage(prompt_tokens=self.request.prompt_tokens, completion_tokens=written)

    def price(self, written: int) -> int:
        usage = self.usage(written)
        fresh, output = usage.prompt_tokens, usage.completion_tokens
        return price(fresh=fresh, output=output, factor_milli=1_000)


@dataclass
class _Pool:
    """Members who always wait at some shards each, nodes that fail, and messages that take a while.

    `age_s` is the longest that a shard can have known nothing new of another.
    """

    draw: random.Random
    shards: dict[str, Shard] = field(default_factory=dict)
    sides: dict[str, _Side] = field(default_factory=dict)
    homes: dict[str, list[str]] = field(default_factory=dict)  # where each member's requests come
    runs: dict[str, _Run] = field(default_factory=dict)
    charges: deque[tuple[float, int]] = field(default_factory=deque)
    ahead: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    wire: list[tuple[float, int, Message]] = field(default_factory=list)
    numbers: count[int] = field(default_factory=lambda: count(1))
    now: float = 0.0
    stale_most: int = 0
    worst: float = 0.0

    def run(self) -> float:
        """The largest part of the bound that any pair has come to."""
        draw = self.draw
        names = [f"s{number}" for number in range(draw.randint(2, 4))]
        every_s, self.late_s = draw.choice((0.1, 0.25, 0.5)), draw.choice((0.01, 0.2))
        self.step_s = 0.1
        self.age_s = every_s + 2 * self.late_s + 2 * self.step_s
        for name in names:
            others = [other for other in names if other != name]
            gossip = Gossip(every_s=every_s, lost_s=20.0)
            self.shards[name] = Shard(name, others, queued_max=10_000, retries_max=3, gossip=gossip)
        for number in range(draw.randint(2, 4)):
            self.sides[f"m{number}"] = _Side(draw.choice((1, 2, 4)))
            self.homes[f"m{number}"] = draw.sample(names, draw.choice((1, 1, len(names))))
            for name in names:
                weight = 1_000 * self.sides[f"m{number}"].weight
                self.tell(name, Weighed(member=f"m{number}", weight=weight))
        self.top_up()
        for _ in range(round(2 * self.age_s / self.step_s)):  # so that all have heard of all
            self.pass_time()
        for number in range(draw.randint(1, 4)):
            slots, models = draw.randint(1, 6), frozenset(("m",))
            event = NodeChanged(node=f"n{number}", slots=slots, models=models)
            self.tell(draw.choice(names), event)
        for _ in range(500):
            self.step()
        return self.worst

    def pass_time(self) -> None:
        """A moment later, messages have arrived."""
        self.now += self.step_s
        while self.wire and self.wire[0][0] <= self.now:
            message = heapq.heappop(self.wire)[2]
            self.do(message.receiver, self.shards[message.receiver].hear(message, self.now))
        for name in self.shards:
            self.speak(name)

    def step(self) -> None:
        """Some leases write, end or fail."""
        self.pass_time()
        for lease in self.draw.sample(sorted(self.runs), k=-(-len(self.runs) // 8)):
            run = self.runs[lease]
            dice = self.draw.random()
            if dice < 0.8 and run.written < run.output:
                tokens = min(self.draw.randint(1, 200), run.output - run.written)
                run.written += tokens
                self.paid(run.price(run.written) - run.price(run.written - tokens))
                self.tell(run.home, Progressed(lease=lease, tokens=tokens))
                continue
            del self.runs[lease]
            side = self.sides[run.request.member]
            side.ended += run.price(run.written)
            usage = run.usage(run.written)
            if dice < 0.95:
                self.tell(run.home, Finished(lease=lease, usage=usage))
            else:
                retry = not run.written
                self.tell(run.home, Failed(lease=lease, delivered=usage, retry=retry))
        self.top_up()
        self.compare()

    def top_up(self) -> None:
        """Everybody waits wherever its requests come to."""
        for member, names in self.homes.items():
            for name in names:
                shard = self.shards[name]
                while shard.scheduler.queued_of(member) < 3:
                    request = Request(
                        id=f"r{next(self.numbers)}",
                        member=member,
                        model="m",
                        prompt_tokens=self.draw.choice((10, 500, 4_000)),
                        output_tokens_max=1_000,
                    )
                    self.tell(name, Submitted(request=request))

    def tell(self, name: str, event: Event) -> None:
        """One thing happens at one shard."""
        self.do(name, self.shards[name].handle(event, self.now))
        self.speak(name)

    def do(self, name: str, decisions: list[Decision]) -> None:
        """What it has decided."""
        self.shards[name].validate()
        for decision in decisions:
            if isinstance(decision, Start):
                request = decision.request
                output = self.draw.choice((1, 50, 300, 1_000))
                self.runs[decision.lease.id] = _Run(request, name, output)
                self.paid(price(fresh=request.prompt_tokens, factor_milli=1_000))

    def speak(self, name: str) -> None:
        for message in self.shards[name].speak(self.now):
            at = self.now + self.draw.random() * self.late_s
            heapq.heappush(self.wire, (at, next(self.numbers), message))

    def paid(self, micro_credits: int) -> None:
        """What the pool charges in the time for which somebody may not know of it."""
        self.charges.append((self.now, micro_credits))
        while self.charges[0][0] < self.now - self.age_s:
            self.charges.popleft()
        self.stale_most = max(self.stale_most, sum(amount for _, amount in self.charges))

    def compare(self) -> None:
        """Nobody is further ahead of anybody than the bound of what has happened so far."""
        for side in self.sides.values():
            side.served, side.due = side.ended, 0
        for run in self.runs.values():
            side = self.sides[run.request.member]
            side.served += run.price(run.written)
            side.due += run.price(run.output) - run.price(run.written)
        for member, side in self.sides.items():
            paid = sum(shard.sums.own(member) for shard in self.shards.values())
            side.due_most = max(side.due_most, side.due)
            side.reserved_most = max(side.reserved_most, paid - side.served)
            side.reserved_least = min(side.reserved_least, paid - side.served)
        stale = self.stale_most / min(side.weight for side in self.sides.values())
        for (one, first), (other, second) in combinations(self.sides.items(), 2):
            ahead = first.served / first.weight - second.served / second.weight
            least, most = self.ahead.get((one, other), (ahead, ahead))
            least, most = self.ahead[one, other] = min(least, ahead), max(most, ahead)
            bound = first.bound() + second.bound() + 2 * DESIGN.window + 2 * stale
            self.worst = max(self.worst, (most - least) / bound)


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_with_what_is_charged_unheard(seed: int) -> None:
    """With several shards, a difference exceeds the bound by no more than what can be unknown."""
    pool = _Pool(random.Random(seed))
    assert 0.0 < pool.run() <= 1.0
