"""How evenly service goes round: shares, entitlements, Jain's index, and the gap with its bound."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random

import pytest

from anser.adapters.memory_engine import MemoryEngine, Pace
from anser.api.fairness import fairness_of
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
from anser.core.ledger import Usage
from anser.core.members import Scope
from anser.core.scheduler import Scheduler
from anser.services.fairness import WINDOW_S, Evenness, Fairness, jain
from anser.services.members import Principal
from tests.pool import demand, open_pool
from tests.stage import stage

pytestmark = pytest.mark.anyio

CREDIT = 1_000_000


class World:
    """A scheduler and its figures, told of everything as the gateway tells them."""

    def __init__(self, slots: int = 1, **weights: int) -> None:
        self.now = 100.0
        self.weights = weights
        self.scheduler = Scheduler(queued_max=1_000, retries_max=3)
        self.fairness = Fairness(self.scheduler, lambda member: weights.get(member, 1_000))
        self.running: dict[str, Request] = {}
        for member, weight in weights.items():
            self.tell(Weighed(member=member, weight=weight))
        self.tell(NodeChanged(node="n", slots=slots, models=frozenset({"m"})))

    def tell(self, event: Event) -> None:
        """What `Dispatch.tell` does."""
        if isinstance(event, Progressed):
            self.fairness.progressed(event.lease, event.tokens, self.now)
        if isinstance(event, Finished):
            self.fairness.ended(event.lease, event.usage, self.now)
            self.running.pop(event.lease)
        for decision in self.scheduler.handle(event, self.now):
            if isinstance(decision, Start):
                self.fairness.began(decision, self.now)
                self.running[decision.lease.id] = decision.request
        self.fairness.validate()

    def ask(
        self, name: str, member: str, *, prompt: int = 100, output: int = 10, model: str = "m"
    ) -> None:
        """A request comes."""
        request = Request(
            id=name, member=member, model=model, prompt_tokens=prompt, output_tokens_max=output
        )
        self.tell(Submitted(request=request))

    def finish(self, *, output: int | None = None) -> None:
        """The oldest lease ends with its longest answer, or with one of `output` tokens."""
        lease, request = next(iter(self.running.items()))
        tokens = request.output_tokens_max if output is None else output
        usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=tokens)
        self.tell(Finished(lease=lease, usage=usage))

    def counted(self, member: str) -> int:
        """What this member had lately, at a fresh look."""
        self.now += 1
        return self.fairness.look(self.now).shares[member].service

    def evenness(self) -> Evenness:
        """A fresh look."""
        self.now += 1
        return self.fairness.look(self.now).evenness


def test_jains_index() -> None:
    """1 for equals, 1/n where one has all, nothing where nobody has anything."""
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0]) == pytest.approx(0.9)
    assert jain([]) is jain([0.0, 0.0]) is None


def test_shares_and_entitlements_by_level() -> None:
    """A member sees its part of each level, and its weight among those that were active there."""
    world = World(a=3_000)
    for name, member in (("1", "a/p/x"), ("2", "a/p/y"), ("3", "b/q/z")):
        world.ask(name, member)
        world.finish()
    look = world.fairness.look(world.now)
    assert look.shares["a"].share == pytest.approx(2 / 3)
    assert look.shares["a"].entitlement == pytest.approx(3 / 4)
    assert look.shares["a/p"].share == look.shares["a/p"].entitlement == 1
    assert look.shares["a/p/x"].share == look.shares["a/p/x"].entitlement == 0.5
    assert look.shares["b"].service == 140 * CREDIT
    assert look.evenness.members == 2
    assert look.evenness.jain == pytest.approx(jain([280 / 3, 140.0]))


def test_who_has_not_come_yet_is_told_what_would_be_due() -> None:
    """A newcomer's entitlement is its weight among the active and itself; its share is nothing."""
    world = World(b=2_000)
    world.ask("1", "a/p/x")
    world.finish()
    top, middle, own = world.fairness.path("b/q/z", world.now)
    assert (top.share, top.entitlement) == (0.0, pytest.approx(2 / 3))
    assert (middle.share, own.entitlement) == (None, 1.0)
    assert World().fairness.path("c", 100.0)[0].entitlement == 1.0


def test_only_the_last_minutes_count() -> None:
    """What was served longer ago is forgotten; who has been idle since is not a member of it."""
    world = World()
    world.ask("1", "a/p/x")
    world.finish()
    for _ in range(9):
        world.now += 30
        world.ask("b", "b/q/z", output=0)
        world.finish()
    assert world.evenness().members == 2
    assert world.fairness.look(world.now).shares["a"].share == pytest.approx(140 / (140 + 900))
    world.now += 60
    assert world.evenness().members == 1
    world.now += WINDOW_S
    assert world.evenness() == Evenness()


def test_what_is_forgotten_by_the_scheduler_still_counts() -> None:
    """A member that the scheduler has forgotten was served in the last minutes all the same."""
    world = World(a=2_000)
    world.ask("1", "a/p/x")
    world.finish()
    for number in range(3):
        world.now += 31
        world.ask(str(number), "b/q/z")
        world.finish()
    assert "a" not in {row.member for row in world.scheduler.standings()}
    world.now += 1
    look = world.fairness.look(world.now)
    assert look.shares["a"].service == 140 * CREDIT
    assert look.shares["a"].weight == 2_000
    assert look.evenness.members == 2


def test_a_look_is_taken_once_a_second() -> None:
    """However many ask, the figures are computed at most once a second."""
    world = World()
    first = world.fairness.look(world.now)
    world.now += 0.5
    world.ask("1", "a/p/x")
    assert world.fairness.look(world.now) is first
    world.now += 0.5
    assert world.fairness.look(world.now).evenness.members == 1


def test_the_gap_is_of_those_that_wait() -> None:
    """Fewer than two that wait have no gap; two have one, within 2Q and what ran."""
    world = World()
    world.ask("run", "a/p/x")
    world.ask("a", "a/p/x", prompt=1_000)
    assert world.evenness().gap is None
    world.ask("b", "b/q/z")
    found = world.evenness()
    assert (found.gap, found.bound) == (0, (2 * 4_000 + 140) * CREDIT)
    world.tell(Progressed(lease=next(iter(world.running)), tokens=10))
    assert world.evenness().gap == 40 * CREDIT


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_never_above_its_bound(seed: int, pools: int) -> None:
    """Whatever comes in whatever order, what is measured is within what is promised."""
    random = Random(seed)
    weights = {"a": 1_000, "b": 2_000, "c": 4_000}
    world, measured = World(slots=4, **weights), 0
    world.tell(NodeChanged(node="o", slots=2, models=frozenset({"k"})))
    for number in range(600):
        world.now += random.random()
        if random.random() < 0.55 or not world.running:
            member = random.choice(["a/p/x", "b/q/y", "c/r/z"])
            prompt, output = random.choice([(50, 400), (6_000, 10), (800, 250)])
            model = random.choice("mk"[:pools])
            world.ask(str(number), member, prompt=prompt, output=output, model=model)
        else:
            world.finish(output=random.randint(1, 10))
        found = world.evenness()
        if found.gap is not None:
            assert found.bound is not None
            assert found.gap <= found.bound
            measured += 1
    assert measured > 100 or pools > 1


def test_a_key_is_told_of_who_waits_in_one_pool() -> None:
    """Who does not wait has none to compare, and who is in several pools is in no gap."""
    world = World()
    world.tell(NodeChanged(node="o", slots=1, models=frozenset({"k"})))
    assert world.scheduler.key_of("a") is None
    world.ask("run", "a/p/x")
    assert world.scheduler.key_of("a") is None
    world.ask("wait", "a/p/x")
    found = world.scheduler.key_of("a")
    assert found is not None
    assert found[1] == world.scheduler.standings()[0].key
    world.ask("other", "b/q/z")
    assert world.evenness().gap == 0
    world.ask("elsewhere", "b/q/z", model="k")
    assert world.scheduler.key_of("b") is None
    assert world.evenness().gap is None


def test_an_end_that_is_told_twice_counts_once() -> None:
    """A lease that is not known any more changes nothing."""
    world = World()
    world.ask("1", "a/p/x")
    assert "1 running" in repr(world.fairness)
    world.finish()
    world.fairness.ended("1.1", Usage(prompt_tokens=100), world.now)
    world.fairness.progressed("1.1", 5, world.now)
    world.fairness.validate()
    assert world.fairness.look(world.now).shares["a"].service == 140 * CREDIT


def test_what_is_counted_is_what_the_scheduler_charges() -> None:
    """Of each lease and at any moment, to the micro-credit; what is given back does not count."""
    world = World()
    world.ask("1", "a/p/x", prompt=1_000, output=100)
    assert world.counted("a") == world.scheduler.service == 1_000 * CREDIT
    world.tell(Progressed(lease="1.1", tokens=10))
    assert world.counted("a") == world.scheduler.service == 1_040 * CREDIT
    usage = Usage(prompt_tokens=900, cached_tokens=600, completion_tokens=20)
    world.tell(Finished(lease="1.1", usage=usage))
    assert world.counted("a") == world.scheduler.service == 440 * CREDIT
    world.ask("2", "b/q/z")
    world.tell(Finished(lease="2.1", usage=Usage()))
    assert world.evenness().members == 1


async def test_the_gateway_keeps_the_figures() -> None:
    """Requests that run, end and fail leave nothing running behind."""
    async with open_pool({"a": MemoryEngine(slots=1, pace=Pace(step_s=0.001))}) as pool:

        async def ask(name: str, member: str) -> None:
            async with pool.gateway.answer(demand(name, member=member)) as answer:
                assert [piece async for piece in answer]

        await asyncio.gather(ask("1", "local/default/owner"), ask("2", "anonymous/bucket-1"))
        now = pool.gateway.clock.now()
        look = pool.gateway.fairness.look(now)
        pool.gateway.validate()
        assert look.evenness.members == 2
        shares = [look.shares[name].share for name in ("local", "anonymous")]
        assert sum(share or 0 for share in shares) == pytest.approx(1)


async def test_a_member_sees_its_own_and_no_other(tmp_path: Path) -> None:
    """Names of others are for operators only; an anonymous bucket's number is for nobody."""
    async with stage(tmp_path) as scene:
        body = {"model": "memory", "messages": [{"role": "user", "content": "hello"}]}
        assert (await scene.client().post(body)).status == 200
        answer = await scene.client().ask("GET", "/v1/fairness")
        services = scene.services
        operator = Principal(
            member="local/default/owner", key=None, scope=Scope.OPERATE, anonymous=False
        )
        rows = fairness_of(services, operator)["members"]
    found = json.loads(answer.body)
    assert found["member"] == "anonymous"
    assert [level["member"] for level in found["levels"]] == ["anonymous", "anonymous"]
    assert found["levels"][0]["share"] == 1.0
    assert found["all"]["members"] == 1
    assert found["window_s"] == WINDOW_S
    assert "members" not in found
    assert "bucket" not in answer.body.decode()
    assert {row["member"].partition("/")[0] for row in rows} == {"anonymous"}
