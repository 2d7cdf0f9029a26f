"""Two hundred worlds, each from a seed: `python -m tests.simulation SEED` tells a story."""

from __future__ import annotations

import asyncio
import gc
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.core.account import Account, Leaf, Stand
from anser.core.fairness import Shares
from anser.core.virtual import Pool
from tests.simulation import virtual
from tests.simulation.__main__ import main
from tests.simulation.books import Books
from tests.simulation.checked import CheckedScheduler
from tests.simulation.plan import Act, Behaviour, Lie
from tests.simulation.shards import ShardWorld, simulate_shards
from tests.simulation.story import failure
from tests.simulation.world import World, simulate

_SEEDS = 200
_SHARD_SEEDS = 60
_STORIES = tomllib.loads((Path(__file__).parent / "stories.toml").read_text("utf-8"))["story"]
_CROWDED = 7  # from this seed on there is soon a world in which many wait for long


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    """All of them, lived through; a test for each says which one was not."""
    return []


@pytest.fixture(scope="module")
def shards() -> list[ShardWorld]:
    """The same of those in which schedulers share a pool."""
    return []


def _seeds(number: int) -> list[Any]:
    """So many, of which a quarter are lived through on every interpreter."""
    late = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(number // 4, number)]
    return [*range(number // 4), *late]


@pytest.mark.parametrize("seed", _seeds(_SEEDS))
def test_world(seed: int, worlds: list[World]) -> None:
    """No request is lost or answered twice; receipts, charges and the bound are as promised."""
    worlds.append(simulate(seed))


def test_worlds_have_what_they_are_for(worlds: list[World]) -> None:
    """They meet every fault: a world in which nothing happens would prove nothing."""
    if len(worlds) < _SEEDS:
        pytest.skip("needs all worlds")
    ends = {client.error.code for world in worlds for client in world.clients if client.error}
    assert ends >= {
        "answer_timeout",
        "deadline_unreachable",
        "engine_broken",
        "engine_refused",
        "engine_unreachable",
        "first_token_timeout",
        "model_not_found",
        "no_node",
        "overloaded",
        "queue_timeout",
        "rate_limit_exceeded",
        "store_full",
        "token_gap_timeout",
    }
    assert any(client.left and client.tokens for world in worlds for client in world.clients)
    gone_on = [client for world in worlds for client in world.clients if client.before]
    assert sum(client.finishes for client in gone_on) > 20, "answers that survived a node"
    assert sum(world.hedged for world in worlds) > 20, "requests with a second lease"
    assert any(machine.declined for world in worlds for machine in world.machines.values())
    assert any(world.scheduler.out_of_tries for world in worlds)
    assert any(world.scheduler.pushed_out for world in worlds)
    assert {mishap.act for world in worlds for mishap in world.plan.mishaps} == set(Act)
    assert {machine.lie for world in worlds for machine in world.plan.machines} == {None, *Lie}
    behaviours = {client.plan.behaviour for world in worlds for client in world.clients}
    assert behaviours == set(Behaviour)


def test_siblings_wait_for_long_enough_to_be_told_apart(worlds: list[World]) -> None:
    """Some come near their bound: where nobody does, nothing that is unfair would show."""
    if len(worlds) < _SEEDS:
        pytest.skip("needs all worlds")
    assert sum(world.scheduler.siblings.met for world in worlds) > 1_000
    near = [world for world in worlds if world.scheduler.siblings.worst > 0.5]
    assert len(near) >= 3


@pytest.mark.parametrize("story", _STORIES, ids=lambda story: f"{story['seed']}")
def test_what_once_failed_does_not(story: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Each seed that found something still meets what it found, ends well, and leaves no error."""
    told = iter(simulate(story["seed"]).story)
    for end in story["shows"]:
        met = any(line.endswith(end) for line in told)
        assert met, f"{story['seed']} tells another story now: find a seed of this one"
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("seed", _seeds(_SHARD_SEEDS))
def test_shards(seed: int, shards: list[ShardWorld]) -> None:
    """Whatever the network does, no slot is booked twice, no request lost, and sums converge."""
    shards.append(simulate_shards(seed))


def test_shard_worlds_have_what_they_are_for(shards: list[ShardWorld]) -> None:
    """Slots are lent, messages lost, nodes and shards gone, and requests end in every way."""
    if len(shards) < _SHARD_SEEDS:
        pytest.skip("needs all worlds")
    seen = set[str]().union(*(world.seen for world in shards))
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


# That the checks can fail: the scheduler is broken on purpose, each time in another way.


def _wide(shares: Shares, lanes: Any, *, window: int, most: int) -> Iterator[Leaf]:
    """Whoever waits, by name."""
    leaves = [leaf for leaf in shares._leaves.values() if any(lane in leaf.lanes for lane in lanes)]
    del window, most
    yield from sorted(leaves, key=lambda leaf: leaf.member)[:1]


def _for_nothing(account: Account[Any], micro_credits: int, _: Pool) -> int:
    """Service that moves no key."""
    account.service += micro_credits
    account.carried_service += micro_credits
    return 0


def _as_it_was(account: Account[Any], pool: Pool, level: int, ceiling: int) -> None:
    """Who comes back is where it was when it left, and who is new at nothing."""
    del level
    account.stands.setdefault(pool, Stand(0, ceiling))


@pytest.mark.parametrize(
    ("where", "name", "broken", "says"),
    [
        (Shares, "window", _wide, "ahead"),
        (Account, "pay", _for_nothing, "was charged per share"),
        (Account, "lift", _as_it_was, "not at the level of who waits"),
    ],
    ids=["window", "charge", "lift"],
)
def test_a_broken_scheduler_is_found(
    where: type, name: str, broken: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its window, its charges or its lift it does not get through."""
    monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr(CheckedScheduler, "validate", lambda _: None)
    found = (failure(seed) or "" for seed in range(_CROWDED, _CROWDED + 20))
    assert any(says in cause.rpartition("BROKEN")[2] for cause in found)


def test_the_bound_alone_finds_who_is_served_unfairly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were each single decision taken as right, what comes of them would still not be."""
    monkeypatch.setattr(Shares, "window", _wide)
    monkeypatch.setattr(CheckedScheduler, "check_decision", lambda *_: None)
    found = (failure(seed) or "" for seed in range(_CROWDED, _CROWDED + 20))
    assert any("of their bound apart" in cause for cause in found)


def test_a_failing_seed_tells_its_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was there, what happened last, and what broke; and the command fails."""

    def wrong(_: object, job: object) -> None:
        raise AssertionError(f"nothing is right with {job}")

    monkeypatch.setattr(Books, "compare", wrong)
    assert main(["3", "5"]) == 1
    told = capsys.readouterr().out
    assert "seed 3: " in told
    assert "n0: " in told
    assert "BROKEN: " in told
    assert "nothing is right" in told
    assert "2 seeds, 2 failed: [3, 4]" in told
    assert main(["3"]) == 1


def test_processes_share_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of them find the same as one."""
    assert main(["3", "7", "--jobs", "2"]) == 0
    assert "4 seeds, 0 failed: []" in capsys.readouterr().out


def test_virtual_time_jumps_and_nothing_sleeps() -> None:
    """A day passes at once, in the order of its timers, and each jump is told."""
    clock, jumps, order = MemoryClock(), list[float](), list[float]()

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
