"""E11: random pools, driven to where the bound of fairness would break first.

No engines here: members who always have requests waiting, nodes that take any, and a lease drawn
at random that writes some tokens, ends or fails. After each event the service of every two members
is compared to the bound, with U and R as they were, so nothing hides between samples.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import combinations

from anser.core.events import (
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
from anser.core.ledger import Usage
from anser.core.rules import DESIGN
from bench.bound import Pair, Side
from bench.policies import Anser
from bench.rows import Options, Row, at_most, figure

__all__ = ["pools"]

_POOLS, _POOLS_QUICK = 10_000, 20
_STEPS = 150
_WAITING_MIN = 3


@dataclass(slots=True)
class _Lease:
    request: Request
    output: int
    cached: int
    written: int = 0

    def usage(self, written: int) -> Usage:
        """What it is, having written so much; nothing before its first token."""
        if not written:
            return Usage()
        return Usage(
            prompt_tokens=self.request.prompt_tokens,
            cached_tokens=self.cached,
            completion_tokens=written,
        )

    def delivered(self) -> int:
        """The price of what its client has."""
        return _price(self.usage(self.written))

    def due(self) -> int:
        """The price of what it has not."""
        return _price(self.usage(self.output)) - self.delivered()


def _price(usage: Usage) -> int:
    return price(
        fresh=usage.prompt_tokens - usage.cached_tokens,
        cached=usage.cached_tokens,
        output=usage.completion_tokens,
        factor_milli=1_000,
    )


@dataclass(slots=True)
class _Member:
    """One member, and what of its service has ended."""

    weight: int  # shares
    ended: int = 0  # the price of what leases that have ended delivered
    side: Side = field(default_factory=Side)


@dataclass(slots=True)
class _Pool:
    draw: random.Random
    policy: Anser = field(default_factory=Anser)
    members: dict[str, _Member] = field(default_factory=dict[str, _Member])
    leases: dict[str, _Lease] = field(default_factory=dict[str, _Lease])
    pairs: list[Pair] = field(default_factory=list[Pair])
    now: float = 0.0
    asked: int = 0
    worst: float = 0.0

    def run(self) -> float:
        """The largest part of its bound that any pair has come to."""
        draw = self.draw
        for number in range(draw.randint(2, 5)):
            name, weight = f"m{number}", draw.choice((1, 2, 4))
            self.members[name] = _Member(weight)
            self.tell(Weighed(member=name, weight=1_000 * weight))
        sides = [member.side for member in self.members.values()]
        self.pairs = [Pair(one, other) for one, other in combinations(sides, 2)]
        for name in self.members:
            self.top_up(name)
        for number in range(draw.randint(1, 5)):
            slots, models = draw.randint(1, 8), frozenset(("m",))
            self.tell(NodeChanged(node=f"n{number}", slots=slots, models=models))
            for name in self.members:
                self.top_up(name)
        for _ in range(_STEPS):
            self.step()
            for name in self.members:
                self.top_up(name)
            self.compare()
        return self.worst

    def tell(self, event: Event) -> None:
        """One thing happens."""
        self.now += self.draw.choice((0.0, 0.05, 0.5, 5.0))
        for decision in self.policy.handle(event, self.now):
            assert isinstance(decision, Start)
            request = decision.request
            lease = _Lease(
                request,
                output=self.draw.choice((1, 50, 300, 1_000)),
                cached=self.draw.choice((0, request.prompt_tokens // 2)),
            )
            self.leases[decision.lease.id] = lease

    def top_up(self, member: str) -> None:
        """It always has requests waiting."""
        draw = self.draw
        while self.policy.queued_of(member) < _WAITING_MIN:
            self.asked += 1
            blocks = draw.choice((0, 4, 20))
            start = draw.randint(0, 5)
            request = Request(
                id=str(self.asked),
                member=member,
                model="m",
                prompt_tokens=64 * blocks + draw.choice((1, 100, 3_000)),
                output_tokens_max=2_000,
                chain=tuple(bytes((start, place)) for place in range(blocks)),
                text_bytes=256 * blocks + 1,
            )
            self.tell(Submitted(request=request))

    def step(self) -> None:
        """A lease writes, ends or fails."""
        id = self.draw.choice(list(self.leases))
        lease = self.leases[id]
        member = self.members[lease.request.member]
        if self.draw.random() < 0.02 and not lease.written:
            del self.leases[id]
            self.tell(Failed(lease=id, delivered=Usage(), retry=False))
            return
        tokens = min(self.draw.randint(1, 300), lease.output - lease.written)
        lease.written += tokens
        if lease.written < lease.output:
            self.tell(Progressed(lease=id, tokens=tokens))
            return
        del self.leases[id]
        member.ended += lease.delivered()
        self.tell(Finished(lease=id, usage=lease.usage(lease.written)))

    def compare(self) -> None:
        """Nobody is further ahead of anybody than the bound of what has happened so far."""
        served = {name: member.ended for name, member in self.members.items()}
        due = dict.fromkeys(self.members, 0)
        for lease in self.leases.values():
            served[lease.request.member] += lease.delivered()
            due[lease.request.member] += lease.due()
        paid = self.policy.paid()
        for name, member in self.members.items():
            weight = member.weight
            member.side.note(
                served=served[name] / weight,
                due=due[name] / weight,
                charged=paid.get(name, 0) / weight,
            )
        self.worst = max(self.worst, *(pair.part(DESIGN.window) for pair in self.pairs))


def pools(options: Options) -> list[Row]:
    """E11: the worst part of its bound in any of so many random pools."""
    number = _POOLS_QUICK if options.quick else _POOLS
    worst, seed_of = 0.0, 0
    for seed in range(number):
        if not seed % 500:
            options.tell(f"E11 pool {seed}")
        found = _Pool(random.Random(seed)).run()
        if found > worst:
            worst, seed_of = found, seed
    return [
        at_most("E11 difference / bound", worst, "1", 1.0),
        figure("E11 pools", number, "pools"),
        figure("E11 seed of the worst", seed_of, "1"),
    ]
