"""Contributors against others in the whole scheduler, all rules on: what they are promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

import pytest

from anser.core.contribution import (
    HALF_LIFE_S,
    PLATFORM,
    Contributions,
    Credit,
    added_weight,
    credit_of,
)
from anser.core.events import (
    Event,
    Finished,
    NodeChanged,
    Progressed,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.rules import DESIGN
from anser.core.scheduler import Scheduler

WAITING = 12  # of each member, at any time: more than its share of the slots
PROMPT, OUTPUT_MAX = 200, 100
DEAREST = 1_000_000 * (PROMPT + 4 * OUTPUT_MAX)  # micro-credits, of one request


@dataclass
class World:
    """Members that always want more, on nodes of unlike speed that may be owned."""

    seed: int
    owners: dict[str, str]  # by node
    weights: dict[str, int]  # by member, as the operator gave them
    public: float = 0.3
    haste: float = 1.0  # how much faster contribution fades than it does
    now: float = 0.0
    contributions: Contributions = field(default_factory=Contributions)
    served: Counter[str] = field(default_factory=Counter[str])  # micro-credits, by member

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.scheduler = Scheduler(queued_max=10_000, retries_max=3)
        self.added: Counter[str] = Counter()
        self.coming: list[tuple[float, int, Event]] = []
        self.leases: dict[str, Start] = {}
        self.count = 0
        self.slots = {node: self.random.randint(2, 8) for node in self.owners}
        self.speed = {node: self.random.choice((20, 40, 80)) for node in self.owners}
        for member, weight in self.weights.items():
            self.tell(Weighed(member=member, weight=weight))
        for node, slots in self.slots.items():
            self.tell(NodeChanged(node=node, slots=slots, models=frozenset({"m"})))

    def give(self, owner: str, micro_credits: int) -> None:
        """This owner has contributed so much before."""
        self.contributions.add(Credit(owner=owner, micro_credits=micro_credits, at_ms=0))

    def weigh(self) -> None:
        """What the platform does every few seconds."""
        parts = self.contributions.parts()
        awake = sum(self.weights.values())
        for member, weight in self.weights.items():
            part = parts.get(member, 0.0)
            self.added[member] = added_weight(part, awake=awake, public_share=self.public)
            self.tell(Weighed(member=member, weight=weight + self.added[member]))

    def run(self, seconds: float) -> None:
        """Let time pass, while every member has as much waiting as ever."""
        until = self.now + seconds
        for member in self.weights:
            self.want(member)
        while self.coming[0][0] < until:
            self.now, _, event = heappop(self.coming)
            self.tell(event)
        self.now = until
        self.scheduler.validate()

    def want(self, member: str) -> None:
        """Let this member have enough waiting."""
        while self.scheduler.queued_of(member) < WAITING:
            self.count += 1
            request = Request(
                id=f"r{self.count}",
                member=f"{member}/project/{self.count % 3}",
                model="m",
                prompt_tokens=PROMPT,
                output_tokens_max=OUTPUT_MAX,
            )
            self.tell(Submitted(request=request))

    def tell(self, event: Event) -> None:
        """One event, and what follows from it."""
        if isinstance(event, Finished):
            self.ended(self.leases.pop(event.lease), event.usage)
        for decision in self.scheduler.handle(event, self.now):
            assert isinstance(decision, Start)
            self.began(decision)

    def began(self, start: Start) -> None:
        """Its node reads, writes a first token, and ends."""
        tokens = self.random.randint(OUTPUT_MAX // 2, OUTPUT_MAX)
        usage = Usage(prompt_tokens=PROMPT, completion_tokens=tokens)
        speed, lease = self.speed[start.lease.node], start.lease.id
        first_at = self.now + PROMPT / (50 * speed)
        self.leases[lease] = start
        self.later(first_at, Progressed(lease=lease, tokens=1))
        self.later(first_at + tokens / speed, Finished(lease=lease, usage=usage))
        self.want(start.request.member.partition("/")[0])

    def later(self, at: float, event: Event) -> None:
        """This will happen."""
        self.count += 1
        heappush(self.coming, (at, self.count, event))

    def ended(self, start: Start, usage: Usage) -> None:
        """Its receipt says who has earned it."""
        receipt = Receipt(
            request=start.request.id,
            member=start.request.member,
            model="m",
            outcome=Outcome.FINISHED,
            error=None,
            usage=usage,
            leases=(),
            queued_ms=0,
            first_token_ms=None,
            ended_ms=int(self.now * 1_000),
            owner=self.owners[start.lease.node],
        )
        credit = credit_of(receipt)
        if credit is not None:
            self.contributions.add(replace(credit, at_ms=int(credit.at_ms * self.haste)))
        cost = 1_000_000 * (PROMPT + 4 * usage.completion_tokens)
        self.served[start.request.member.partition("/")[0]] += cost

    def slack(self, member: str) -> float:
        """How much less than its share the bound lets a member have, in micro-credits.

        It is behind another by 2Q + U/w + U'/w' per share at most; all those add up by weight.
        """
        running = DEAREST * sum(self.slots.values())
        phi = {name: (w + self.added[name]) / 1_000 for name, w in self.weights.items()}
        behind = (
            phi[other] * (2 * DESIGN.window + running / phi[member] + running / phi[other])
            for other in phi
            if other != member
        )
        return phi[member] / sum(phi.values()) * sum(behind)


@pytest.mark.parametrize("seed", range(4))
def test_a_contributor_that_waits_has_what_it_is_promised(seed: int) -> None:
    """It gets (1 - b) of its part of all contribution and b of its base, less the bound's slack.

    And those who give nothing keep b of what their weights would give them.
    """
    random = Random(seed)
    public = random.choice((0.1, 0.3, 0.6))
    weights = {f"m{number}": random.choice((500, 1_000, 3_000)) for number in range(5)}
    world = World(seed, {"own": PLATFORM, "x": "m0", "y": "m1"}, weights, public)
    world.give("m0", random.randint(1, 9) * 10**15)
    world.give("m1", 10**15)  # nothing is the platform's: the guarantee is all that there is
    parts = world.contributions.parts()
    world.weigh()
    world.run(60.0)
    world.served.clear()
    world.run(400.0)
    total, base = sum(world.served.values()), sum(weights.values())
    for member, weight in weights.items():
        promised = (1 - public) * parts.get(member, 0.0) + public * weight / base
        assert world.served[member] >= promised * total - world.slack(member), member
        assert world.served[member] >= (promised - 0.02) * total, "it is far below its bound"
        if member in parts:
            assert world.served[member] >= (1 - public) * parts[member] * total


def test_the_loop_settles() -> None:
    """Weight lets a contributor use more, so its node serves others less: it comes to rest.

    From no contribution and from far too much it comes to the same share, and stays there. The
    half-life is a hundred seconds here, so that twelve of them pass.
    """
    shares: list[float] = []
    for head_start in (0, 3 * 10**12):  # more than the whole pool serves in ten minutes
        weights = {"a": 1_000, "b": 1_000, "c": 1_000}
        haste = HALF_LIFE_S / 100.0
        world = World(2, {"own": PLATFORM, "x": "a"}, weights, haste=haste)
        world.give("a", head_start)
        last: list[float] = []
        for _ in range(40):
            world.served.clear()
            world.run(30.0)
            world.weigh()
            last.append(world.served["a"] / sum(world.served.values()))
        rest = last[-12:]
        assert max(rest) - min(rest) < 0.1, rest
        shares.append(sum(rest) / len(rest))
    assert abs(shares[0] - shares[1]) < 0.03, shares


def test_many_small_members_gain_nothing() -> None:
    """Weight is for the organisation: however many persons ask, together they have its share."""
    world = World(1, {"own": PLATFORM, "x": "a"}, {"a": 1_000, "b": 1_000})
    world.give("a", 10**15)
    world.give(PLATFORM, 10**15)
    world.weigh()
    for number in range(200):
        request = Request(
            id=f"s{number}",
            member=f"a/crowd/{number}",
            model="m",
            prompt_tokens=PROMPT,
            output_tokens_max=OUTPUT_MAX,
        )
        world.tell(Submitted(request=request))
    world.run(60.0)
    world.served.clear()
    world.run(400.0)
    due = (0.5 + 0.7 / 0.3 * 0.5) / (1 + 0.7 / 0.3 * 0.5)
    assert world.served["a"] / sum(world.served.values()) == pytest.approx(due, abs=0.03)
