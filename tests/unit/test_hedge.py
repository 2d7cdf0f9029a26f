"""services.hedge: the second lease of a request whose first token is late."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import MemoryEngine, Pace
from anser.config import GatewaySettings
from anser.core.events import Lease
from anser.core.ledger import Usage
from anser.core.limits import FIRST_TOKENS_MAX
from anser.ports import Call
from anser.services.hedge import FirstTokens
from tests.pool import Pool, demand, open_pool
from tests.race import LATE_S, Race, hedging, paid, race, scarce
from tests.simulation import virtual
from tests.unit.test_flight import Caller, Ear, chunk, listen, say

LONG: dict[str, Any] = {"output_tokens_max": 500, "body": {"messages": [], "max_tokens": 500}}


# Who is faster


def test_the_faster_one_has_the_answer() -> None:
    """A late first token is asked of a second node; it answers, and is paid for, once."""

    async def story(at: Race) -> None:
        await at.late()
        assert (at.running, at.pool.gateway.stats.hedged) == (2, 1)
        say(at.second, chunk(), chunk("x"))
        assert at.ear.heard == ["began", "usage", "x"]
        assert (at.flight.node, at.flight.lease) == ("b", "r+1.1")
        assert (at.first.aborted, at.second.aborted, at.running) == (True, False, 1)
        say(at.second, chunk("y"), chunk("", "stop"))
        at.second.receiver.ended()
        assert await at.leases() == [("r.1", "hedged", 0), ("r+1.1", None, 2)]
        assert at.ear.heard[3:] == ["y", "stop", "ended"]
        usage = (await at.receipt()).usage
        assert usage == Usage(prompt_tokens=4, completion_tokens=2)
        assert at.pool.gateway.scheduler.service == paid(output=2)
        assert not at.blamed("a")
        assert not at.blamed("b")
        [own, other] = at.pool.gateway.whys.find("r").steps  # type: ignore[union-attr]
        assert (own.error, own.hedge, other.error, other.hedge) == ("hedged", False, None, True)
        assert at.pool.gateway.whys.find("r+1") is None

    race(story)


def test_the_first_may_be_the_faster_one_after_all() -> None:
    """The second is stopped then, for nothing."""

    async def story(at: Race) -> None:
        await at.late()
        say(at.second, chunk())
        say(at.first, chunk("x"), chunk("", "stop"))
        assert (at.second.aborted, at.running) == (True, 1)
        at.first.receiver.ended()
        assert await at.leases() == [("r+1.1", "hedged", 0), ("r.1", None, 1)]
        assert at.pool.gateway.scheduler.service == paid(output=1)
        assert at.flight.lease == "r.1"

    race(story)


@pytest.mark.parametrize("faster", ["a", "b"])
def test_the_slower_ones_slot_is_free_once_its_engine_has_stopped(faster: str) -> None:
    """Not before: until then the platform counts it, and is not empty."""

    async def story(at: Race) -> None:
        await at.late()
        quick, slow = (at.first, at.second) if faster == "a" else (at.second, at.first)
        say(quick, chunk("x"), chunk("", "stop"))
        quick.receiver.ended()
        await asyncio.sleep(0.1)
        assert quick.stopped is not None
        quick.stopped()
        await at.receipt()
        assert at.ear.heard[-1] == "ended"
        assert (at.running, at.pool.gateway.empty.is_set()) == (1, False)
        assert [row.running for row in at.pool.gateway.snapshot().nodes] == [1]
        assert slow.stopped is not None
        slow.stopped()
        assert (at.running, at.pool.gateway.empty.is_set()) == (0, True)

    race(story, slow=True)


def test_what_the_slower_one_took_is_remembered() -> None:
    """Else a node that is always too slow would always be hedged against."""

    async def story(at: Race) -> None:
        await at.late()
        await asyncio.sleep(0.49)
        say(at.second, chunk("x"))
        times = hedging(at.pool).first_tokens._times
        assert [round(times[node, "memory"][-1], 1) for node in "ab"] == [1.0, 0.5]
        at.flight.leave()

    race(story)


# When there is one


def test_there_is_none_before_it_is_late() -> None:
    """Until the 95th percentile has passed, its node is as fast as it ever was."""

    async def story(at: Race) -> None:
        await asyncio.sleep(LATE_S - 0.01)
        assert at.running == 1
        say(at.first, chunk("x"))
        await asyncio.sleep(1.0)
        assert not at.nodes["b"].lines
        at.flight.leave()

    race(story)


@pytest.mark.parametrize(
    ("settings", "saved", "more"),
    [
        (GatewaySettings(), 1.0, {}),
        (GatewaySettings(hedge=True), 0.9, {}),
        (GatewaySettings(hedge=True), 1.0, {"batch": True}),
        (GatewaySettings(hedge=True, first_token_timeout_s=0.4), 1.0, {}),
    ],
    ids=["off", "nothing saved", "batch", "too late anyhow"],
)
def test_there_is_none_for_all(
    settings: GatewaySettings, saved: float, more: dict[str, Any]
) -> None:
    """Only where the operator wants it, for who does not take what is left over, and seldom."""

    async def story(at: Race) -> None:
        await at.late()
        assert at.pool.gateway.stats.hedged == 0
        at.flight.leave()
        await at.flight.gone()

    race(story, settings=settings, saved=saved, wanted=lambda _: demand(**more))


def test_one_in_twenty_has_one() -> None:
    """Each request saves a twentieth of a second lease, whether it needs one or not."""

    async def story(at: Race) -> None:
        at.flight.leave()
        hedging(at.pool).saved = 0.0
        for number in range(61):
            ear = Ear()
            flight = listen(at.pool, ear, demand(f"more{number}"))
            await at.late()
            assert at.pool.gateway.stats.hedged == (number + 1) // 20
            flight.leave()
            await flight.gone()
        hedging(at.pool).saved = 7.99
        listen(at.pool, Ear(), demand("last")).leave()
        assert hedging(at.pool).saved == 8.0

    race(story)


def test_a_node_of_which_little_is_known_is_waited_for() -> None:
    """Fifteen first tokens say nothing about the slowest of twenty."""
    times = FirstTokens()
    lease = Lease(id="r.1", request="r", node="a", model="m", attempt=1)
    for number in range(15):
        times.observe(lease, 1.0 + number)
        assert times.late_s(lease) == math.inf
    times.observe(lease, 0.3)
    assert times.late_s(lease) == 15.0
    for _ in range(64):
        times.observe(lease, 0.001)
    assert times.late_s(lease) == 0.2, "nobody notices less"
    for number in range(64):
        times.observe(lease, float(number))
    assert times.late_s(lease) == 60.0
    for number in range(FIRST_TOKENS_MAX):
        times.observe(Lease(id="", request="", node=str(number), model="m", attempt=1), 1.0)
    assert times.late_s(lease) == math.inf, "the one that was used least is forgotten"
    assert str(FIRST_TOKENS_MAX) in repr(times)
    times.validate()


# Where there is no slot for it


def test_a_second_lease_on_the_same_node_is_given_back() -> None:
    """It would be no faster there; nobody is charged, and nothing is said of it."""

    async def story(pool: Pool, nodes: dict[str, Caller]) -> None:
        flight = listen(pool, Ear())
        before = pool.gateway.scheduler.service
        await asyncio.sleep(1.0)
        assert (pool.gateway.scheduler.running, pool.gateway.scheduler.service) == (1, before)
        assert (pool.gateway.stats.hedged, hedging(pool).saved) == (0, 1.05)
        trail = pool.gateway.whys.find("r")
        assert trail is not None
        assert [step.lease.id for step in trail.steps] == ["r.1"]
        pool.validate()
        say(nodes["a"].lines[0], chunk("x"))
        flight.leave()
        assert [lease.lease for lease in (await pool.receipts())[0].leases] == ["r.1"]

    scarce(story, {"a": 2})


def test_a_second_lease_does_not_wait() -> None:
    """All other slots are taken: it is withdrawn, and the queue is as it was."""

    async def story(pool: Pool, nodes: dict[str, Caller]) -> None:
        flights = [listen(pool, Ear(), demand(name, **LONG)) for name in ("r", "s")]
        for node in nodes.values():
            assert len(node.lines) == 1
        say(nodes["b"].lines[0], chunk("x"))
        await asyncio.sleep(1.0)
        scheduler = pool.gateway.scheduler
        assert (scheduler.running, scheduler.queued, scheduler.dropped) == (2, 0, 0)
        assert pool.gateway.stats.hedged == 0
        pool.validate()
        for flight in flights:
            flight.leave()

    scarce(story, {"a": 1, "b": 1})


@pytest.mark.parametrize("queued_max", [1_000, 1])
def test_a_second_lease_takes_nothing_from_who_waits(queued_max: int) -> None:
    """A slot that a light member would get before others is not for hedging; nor is anybody sent
    away from a full queue for it.
    """

    async def story(pool: Pool, nodes: dict[str, Caller]) -> None:
        flights = [listen(pool, Ear())]
        ears = [Ear() for _ in range(4)]
        for number, ear in enumerate(ears):
            wanted = demand(f"other{number}", member="other", **LONG)
            flights.append(listen(pool, ear, wanted))
        scheduler = pool.gateway.scheduler
        assert [len(node.lines) for node in nodes.values()] == [1, 3]
        for line in nodes["b"].lines:
            say(line, chunk("x"))
        assert (scheduler.running, scheduler.queued) == (4, 1)
        await asyncio.sleep(0.6)
        assert pool.gateway.stats.hedged == 0
        assert (scheduler.running, scheduler.queued, scheduler.dropped) == (4, 1, 0)
        assert not any(ear.error for ear in ears)
        pool.validate()
        for flight in flights:
            flight.leave()

    scarce(story, {"a": 1, "b": 4}, queued_max=queued_max)


# What it is good for


class Hiccups(MemoryEngine):
    """An engine of which every fortieth answer begins three seconds late."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(slots=8, pace=Pace(step_s=0.02, step_each_s=0.001))
        self._chance = chance

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """As ever, once it has begun."""
        await asyncio.sleep(3.0 * (self._chance.random() < 1 / 40))
        async with super().generate(call) as chunks:
            yield chunks


def first_tokens(*, hedge: bool) -> tuple[list[float], int]:
    """How long the first tokens of 1,000 requests took, in order, and how many were hedged."""
    clock, chance, took = MemoryClock(), random.Random(4), list[float]()

    async def ask(pool: Pool, number: int) -> None:
        begun = clock.now()
        async with pool.gateway.answer(demand(f"r{number}", member=f"m{number % 9}")) as answer:
            took.append(clock.now() - begun)
            async for _ in answer:
                pass

    async def main() -> int:
        nodes = {name: Hiccups(chance) for name in "abc"}
        settings = GatewaySettings(hedge=hedge)
        async with open_pool({**nodes}, settings=settings, clock=clock) as pool:
            async with asyncio.TaskGroup() as group:
                for number in range(1_000):
                    group.create_task(ask(pool, number))
                    await asyncio.sleep(chance.expovariate(20.0))
            return pool.gateway.stats.hedged

    hedged = virtual.run(main, clock=clock, jumped=lambda: None)
    return sorted(took), hedged


def test_it_shortens_the_tail() -> None:
    """Of nodes that hang now and then, the slowest two in a hundred are far sooner."""
    (plain, none), (hedged, some) = first_tokens(hedge=False), first_tokens(hedge=True)
    assert (none, len(plain), len(hedged)) == (0, 1_000, 1_000)
    assert 5 <= some <= 1_000 // 20
    assert plain[985] > 3.0
    assert hedged[985] < 0.5
    assert hedged[500] < plain[500] + 0.02
