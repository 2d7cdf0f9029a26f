"""services.hedge: what may go wrong while two nodes work for one first token."""

from __future__ import annotations

import asyncio

import pytest

from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    DeadlineUnreachable,
    EngineBroken,
    EngineDeclined,
    EngineRefused,
)
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.core.limits import STREAM_BUFFER_MAX
from tests.pool import demand
from tests.race import LATE_S, Race, paid, race
from tests.unit.test_flight import chunk, say


def test_who_leaves_stops_both_and_pays_once() -> None:
    """Its first lease is its own; the second was for nothing."""

    async def story(at: Race) -> None:
        await at.late()
        at.flight.leave()
        assert (at.first.aborted, at.second.aborted, at.running) == (True, True, 0)
        assert await at.leases() == [("r+1.1", "hedged", 0), ("r.1", None, 0)]
        assert (await at.receipt()).outcome is Outcome.CANCELLED
        assert at.pool.gateway.scheduler.service == paid()
        assert at.ear.heard == []

    race(story)


def test_a_first_lease_that_fails_leaves_all_to_the_second() -> None:
    """It is asked already, so nobody has to be asked anew; its node is to blame."""

    async def story(at: Race) -> None:
        await at.late()
        say(at.first, chunk())
        say(at.second, chunk())
        at.first.receiver.failed(EngineBroken("gone"))
        at.flight.validate()
        assert (at.running, at.ear.heard) == (1, [])
        say(at.second, chunk("x"), chunk("", "stop"))
        at.second.receiver.ended()
        assert await at.leases() == [("r.1", "engine_broken", 0), ("r+1.1", None, 1)]
        assert at.ear.heard == ["began", "usage", "x", "stop", "ended"]
        assert (at.blamed("a"), at.blamed("b")) == (True, False)
        assert (at.pool.gateway.stats.retries, at.pool.gateway.scheduler.running) == (1, 0)
        assert at.pool.gateway.scheduler.service == paid(output=1)

    race(story)


@pytest.mark.parametrize("error", [EngineBroken("gone"), EngineDeclined("no"), None])
def test_a_second_lease_that_fails_changes_nothing(error: AnserError | None) -> None:
    """The first goes on as if it were alone, and has no other."""

    async def story(at: Race) -> None:
        await at.late()
        if error is None:
            at.second.receiver.ended()
        else:
            at.second.receiver.failed(error)
        at.flight.validate()
        assert at.running == 1
        await asyncio.sleep(5.0)
        assert at.running == 1
        say(at.first, chunk("x"), chunk("", "stop"))
        at.first.receiver.ended()
        code = "engine_broken" if error is None else error.code
        assert await at.leases() == [("r+1.1", code, 0), ("r.1", None, 1)]
        assert (at.blamed("a"), at.blamed("b")) == (False, True)

    race(story)


@pytest.mark.parametrize(
    "said", [[b"no chunk"], [chunk()] * STREAM_BUFFER_MAX], ids=["no chunk", "no token"]
)
def test_a_second_lease_without_an_answer_fails(said: list[bytes]) -> None:
    """What is no chunk, or has no token for ever, is no first token."""

    async def story(at: Race) -> None:
        await at.late()
        say(at.second, *said)
        assert (at.second.aborted, at.running) == (True, 1)
        at.flight.leave()
        assert [error for _, error, _ in await at.leases()] == ["engine_broken", None]

    race(story)


def test_a_second_lease_that_is_refused_blames_nobody() -> None:
    """One engine finds the request at fault, the other may not."""

    async def story(at: Race) -> None:
        await at.late()
        at.second.receiver.failed(EngineRefused("not that"))
        say(at.first, chunk("x"), chunk("", "stop"))
        at.first.receiver.ended()
        assert await at.leases() == [("r+1.1", "engine_refused", 0), ("r.1", None, 1)]
        assert not at.blamed("b")

    race(story)


def test_a_first_lease_that_is_refused_ends_both() -> None:
    """What the request is at fault for is nobody else's work."""

    async def story(at: Race) -> None:
        await at.late()
        at.first.receiver.failed(EngineRefused("not that"))
        assert (at.second.aborted, at.running) == (True, 0)
        assert await at.leases() == [("r+1.1", "hedged", 0), ("r.1", "engine_refused", 0)]
        assert isinstance(at.ear.error, EngineRefused)

    race(story)


def test_when_both_fail_it_is_tried_again() -> None:
    """Its tries are those of the lease that failed last; the answer is a third one's."""

    async def story(at: Race) -> None:
        await at.late()
        at.first.receiver.failed(EngineBroken("gone"))
        at.second.receiver.failed(EngineBroken("gone as well"))
        assert [len(node.lines) for node in at.nodes.values()] == [2, 1]
        await at.late()
        assert at.running == 1, "a request has one second lease at most"
        third = at.nodes["a"].lines[1]
        say(third, chunk("x"), chunk("", "stop"))
        third.receiver.ended()
        assert await at.leases() == [
            ("r.1", "engine_broken", 0),
            ("r+1.1", "engine_broken", 0),
            ("r+1.2", None, 1),
        ]
        trail = at.pool.gateway.whys.find("r")
        assert trail is not None
        assert [step.error for step in trail.steps] == ["engine_broken", "engine_broken", None]
        assert at.pool.gateway.scheduler.service == paid(output=1)

    race(story)


def test_an_answer_of_the_second_lease_survives_its_node() -> None:
    """Once it is the request's own, it is gone on with as any other."""

    async def story(at: Race) -> None:
        await at.late()
        say(at.second, chunk("x"))
        at.second.receiver.failed(EngineBroken("gone"))
        third = at.nodes["a"].lines[1]
        say(third, chunk("y"), chunk("", "stop"))
        third.receiver.ended()
        assert await at.leases() == [
            ("r.1", "hedged", 0),
            ("r+1.1", "engine_broken", 1),
            ("r+1.2", None, 1),
        ]
        assert at.ear.heard == ["began", "x", "y", "stop", "ended"]

    race(story)


def test_a_deadline_ends_both() -> None:
    """No node is to blame for a first token that was wanted too soon."""

    async def story(at: Race) -> None:
        await at.late()
        await asyncio.sleep(0.5)
        assert (at.first.aborted, at.second.aborted, at.running) == (True, True, 0)
        assert await at.leases() == [("r+1.1", "hedged", 0), ("r.1", "deadline_unreachable", 0)]
        assert isinstance(at.ear.error, DeadlineUnreachable)
        assert all(at.pool.fleet.status(node).state is NodeState.UP for node in "ab")
        assert not at.blamed("a")

    race(story, wanted=lambda clock: demand(deadline=clock.now() + 0.8))


def test_a_second_lease_has_its_own_time_for_a_first_token() -> None:
    """The first one's is over; the second one's began later."""

    async def story(at: Race) -> None:
        begun = at.clock.now()
        await at.late()
        await asyncio.sleep(1.3)
        assert (at.first.aborted, at.second.aborted, at.running) == (False, False, 2)
        await asyncio.sleep(0.3)
        assert (at.first.aborted, at.second.aborted, at.running) == (True, False, 1)
        while not at.second.aborted:
            await asyncio.sleep(0.01)
        assert at.clock.now() - begun == pytest.approx(LATE_S + 2.0, abs=0.05)
        at.flight.leave()
        errors = [error for _, error, _ in await at.leases()]
        assert errors == ["first_token_timeout", "first_token_timeout", None]

    race(story, settings=GatewaySettings(hedge=True, first_token_timeout_s=2.0))


def test_a_reader_that_has_enough_is_told_nothing_by_the_second_either() -> None:
    """What it says is kept until it may be told, and its engine is paused."""

    async def story(at: Race) -> None:
        await at.late()
        at.flight.pause()
        say(at.second, chunk(), chunk("x"))
        assert at.ear.heard == ["began"]
        assert at.second.paused
        at.flight.resume()
        assert at.ear.heard == ["began", "usage", "x"]
        assert not at.second.paused
        at.flight.leave()

    race(story)


def test_a_second_node_that_has_just_gone_is_not_asked() -> None:
    """Its slot is given back at once, and the first lease goes on."""

    async def story(at: Race) -> None:
        offers = at.pool.fleet._entries["b"].offers
        kept = offers.pop("memory")
        await asyncio.sleep(LATE_S + 0.01)
        offers["memory"] = kept
        assert (at.running, len(at.nodes["b"].lines)) == (1, 0)
        say(at.first, chunk("x"), chunk("", "stop"))
        at.first.receiver.ended()
        assert await at.leases() == [("r+1.1", "engine_unreachable", 0), ("r.1", None, 1)]

    race(story)
