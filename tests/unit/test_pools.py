"""Several models: shares hold in each pool of slots, and pools come and go."""

from __future__ import annotations

from collections import Counter

import pytest

from anser.core.events import Finished, NodeChanged, NodeGone, Progressed, Request, Start, Submitted
from anser.core.ledger import Usage
from anser.core.rules import DESIGN, STRICT, Rules
from anser.core.scheduler import Scheduler
from anser.core.slots import Slots

RULES = pytest.mark.parametrize("rules", [STRICT, DESIGN], ids=["strict", "design"])


class Pools:
    """Nodes of one slot each; members who always want more of some model."""

    def __init__(self, rules: Rules) -> None:
        self.scheduler = Scheduler(10_000, 3, rules)
        self.now = 0.0
        self.asked = 0
        self.running: dict[str, Start] = {}  # by node
        self.waiting: Counter[tuple[str, str]] = Counter()  # by member and model
        self.served: Counter[tuple[str, str]] = Counter()  # by member and node

    def handle(self, event: Finished | NodeChanged | NodeGone | Submitted | Progressed) -> None:
        """Something happens."""
        self.now += 0.001
        for decision in self.scheduler.handle(event, self.now):
            assert isinstance(decision, Start)
            self.running[decision.lease.node] = decision
            self.waiting[decision.request.member, decision.request.model] -= 1

    def node(self, name: str, *models: str) -> None:
        """A node of one slot."""
        self.handle(NodeChanged(node=name, slots=1, models=frozenset(models)))

    def want(self, member: str, model: str, waiting: int = 2) -> None:
        """Keep so many of its requests in the queue."""
        while self.waiting[member, model] < waiting:
            self.asked += 1
            self.waiting[member, model] += 1
            request = Request(
                id=f"r{self.asked}",
                member=member,
                model=model,
                prompt_tokens=10,
                output_tokens_max=100,
            )
            self.handle(Submitted(request=request))

    def serve(self, node: str, seconds: float = 0.1) -> None:
        """What runs there ends after 25 tokens."""
        start = self.running.pop(node)
        self.now += seconds
        usage = Usage(prompt_tokens=10, completion_tokens=25)
        self.served[start.request.member, node] += 1
        self.handle(Finished(lease=start.lease.id, usage=usage))
        self.scheduler.validate()


@RULES
@pytest.mark.parametrize("third", [False, True])
def test_who_waits_elsewhere_does_not_hold_newcomers_back(rules: Rules, *, third: bool) -> None:
    """A member that returns is level with those who wait for the same slots, and with no others."""
    pools = Pools(rules)
    pools.node("fast", "m")
    pools.node("slow", "k")
    for round_ in range(400):
        if third:
            pools.want("c", "k")
        pools.want("a", "m")
        if round_ >= 200:
            pools.want("b", "m")
        pools.serve("fast")
    assert 95 <= pools.served["b", "fast"] <= 105


@RULES
def test_nobody_starves_in_a_slow_pool(rules: Rules) -> None:
    """What a fast pool serves a member keeps it from a slow one for a minute or two at most."""
    pools = Pools(rules)
    pools.node("fast", "m")
    pools.node("slow", "k")
    for round_ in range(4_000):
        pools.want("both", "m")
        pools.want("one", "k")
        pools.want("both", "k")
        pools.serve("fast")
        if round_ % 20 == 0:
            pools.serve("slow", 0.0)
    one, both = pools.served["one", "slow"], pools.served["both", "slow"]
    assert one > both > 0
    assert pools.served["both", "fast"] > 1_000


def test_spreading_over_models_gains_nothing() -> None:
    """What a member is served of one model counts where it competes for another."""
    pools = Pools(STRICT)
    pools.node("n1", "m")
    pools.node("n2", "k")
    for _ in range(400):
        for member in ("a", "b"):
            pools.want(member, "m")
        pools.want("a", "k")
        pools.serve("n1")
        pools.serve("n2", 0.0)
    assert pools.served["a", "n2"] > 100
    assert pools.served["b", "n1"] > 1.2 * pools.served["a", "n1"]


# What a pool is


def pool_of(slots: Slots, model: str) -> int:
    """The number of the model's pool."""
    return slots.lane(model).pool.number


def test_models_of_one_node_are_one_pool() -> None:
    """Directly, or by way of a third."""
    slots = Slots()
    slots.change("n1", slots=1, models=["a"])
    slots.change("n2", slots=1, models=["b"])
    assert pool_of(slots, "a") != pool_of(slots, "b")
    slots.change("n3", slots=1, models=["b", "c"])
    slots.change("n4", slots=1, models=["c", "a"])
    slots.validate()
    assert len({pool_of(slots, model) for model in "abc"}) == 1


def test_a_pool_falls_apart_when_its_bridge_goes() -> None:
    """Models that no node joins any more have nothing to do with each other."""
    slots = Slots()
    slots.change("n1", slots=1, models=["a"])
    slots.change("n2", slots=1, models=["b"])
    slots.change("bridge", slots=1, models=["a", "b"])
    assert pool_of(slots, "a") == pool_of(slots, "b")
    slots.change("bridge", slots=0, models=[])
    assert pool_of(slots, "a") != pool_of(slots, "b")
    slots.validate()


def test_who_was_ahead_stays_ahead_when_pools_join() -> None:
    """Each is as far ahead in the new pool as it was in its own, by virtual time."""
    pools = Pools(STRICT)
    pools.node("n1", "m")
    pools.node("n2", "k")
    for _ in range(50):
        pools.want("a", "m")
        pools.serve("n1")
    for member in ("a", "b"):
        pools.want(member, "m")
    for member in ("c", "d"):
        pools.want(member, "k")
    pools.node("bridge", "m", "k")
    pools.scheduler.validate()
    for _ in range(400):
        for member, model in (("a", "m"), ("b", "m"), ("c", "k"), ("d", "k")):
            pools.want(member, model)
        for node in ("n1", "n2", "bridge"):
            pools.serve(node)
    served = Counter[str]()
    for (member, _), count in pools.served.items():
        served[member] += count
    served["a"] -= 50
    assert max(served.values()) - min(served.values()) <= 0.1 * max(served.values())


def test_a_pool_ends_with_its_last_model() -> None:
    """Its keys are forgotten, also of those who are ahead and idle; the platform goes on."""
    pools = Pools(STRICT)
    pools.node("n1", "m")
    pools.want("a", "m", waiting=1)
    pools.serve("n1")
    pools.serve("n1")
    assert [row.member for row in pools.scheduler.standings()] == ["a"]
    pools.handle(NodeGone(node="n1"))
    assert pools.scheduler.standings() == []
    pools.node("n1", "m")
    pools.want("a", "m")
    pools.serve("n1")
    pools.scheduler.validate()
