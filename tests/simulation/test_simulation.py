"""Fifty worlds, each from a seed: `python -m tests.simulation SEED` tells the story of one."""

from __future__ import annotations

import asyncio

import pytest

from anser.adapters.memory import MemoryClock
from tests.simulation import virtual
from tests.simulation.shards import simulate_shards
from tests.simulation.world import simulate


@pytest.mark.parametrize("seed", range(50))
def test_world(seed: int) -> None:
    """No request is lost or answered twice, and each story agrees with its receipt."""
    simulate(seed)


def test_worlds_have_what_they_are_for() -> None:
    """The fifty meet every fault: a world in which nothing happens would prove nothing."""
    worlds = [simulate(seed) for seed in range(50)]
    ends = {client.error.code for world in worlds for client in world.clients if client.error}
    assert ends >= {
        "engine_broken",
        "engine_refused",
        "engine_stalled",
        "engine_unreachable",
        "model_not_found",
        "no_node",
        "overloaded",
        "queue_timeout",
        "rate_limit_exceeded",
        "store_full",
    }
    assert any(client.left and client.tokens for world in worlds for client in world.clients)
    assert any(world.scheduler.out_of_tries for world in worlds)


@pytest.mark.parametrize("seed", range(25))
def test_shards(seed: int) -> None:
    """Whatever the network does, no slot is booked twice, no request lost, and sums converge."""
    simulate_shards(seed)


def test_shard_worlds_have_what_they_are_for() -> None:
    """Slots are lent, messages lost, nodes and shards gone, and requests end in every way."""
    seen = set[str]().union(*(simulate_shards(seed).seen for seed in range(25)))
    assert seen >= {
        "a message is lost",
        "a node crashes",
        "a shard vanishes",
        "a slot is lent",
        "aborted",
        "answered",
        "broken off",
        "cancelled while it waited",
        "refused: overloaded",
    }


def test_the_same_seed_gives_the_same_world() -> None:
    """A seed is a bug report."""
    assert simulate_shards(3).story == simulate_shards(3).story
    assert simulate(3).story == simulate(3).story
    assert simulate(3).story != simulate(4).story


def test_virtual_time_jumps_and_nothing_sleeps() -> None:
    """A day passes at once, in the order of its timers, and each jump is told."""
    clock, jumps, order = MemoryClock(), [], []

    async def at(seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(clock.now())

    async def day() -> None:
        async with asyncio.TaskGroup() as group:
            for seconds in (86_400.0, 1.5, 3_600.0):
                group.create_task(at(seconds))

    virtual.run(day, clock=clock, jumped=lambda: jumps.append(clock.now()))
    assert order == pytest.approx([1.5, 3_600.0, 86_400.0])
    assert jumps == order


def test_a_deadlock_is_found() -> None:
    """When everybody waits for somebody else, the run ends instead of hanging."""

    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="deadlock"):
        virtual.run(wait, clock=MemoryClock(), jumped=lambda: None)
