"""services.gateway: how long each stage of a request may take, and what is said when it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    AnswerTimeout,
    FirstTokenTimeout,
    QueueTimeout,
    TokenGapTimeout,
)
from anser.core.health import NodeState
from anser.core.ledger import Outcome, Receipt
from anser.ports import Route
from anser.services.chunks import Piece
from anser.services.gateway import Demand
from tests.pool import Pool, demand, open_pool
from tests.simulation import virtual

SLOW = Pace(step_s=1.0, step_each_s=0.0, prefill_tokens_s=1e6)
LONG: dict[str, Any] = {"output_tokens_max": 500, "body": {"messages": [], "max_tokens": 500}}


def in_virtual_time(main: Callable[[MemoryClock], Coroutine[Any, Any, None]]) -> None:
    """Run on a clock that jumps from timer to timer."""
    clock = MemoryClock()
    virtual.run(lambda: main(clock), clock=clock, jumped=lambda: None)


async def read(pool: Pool, wanted: Demand, into: list[Piece] | None = None) -> list[Piece]:
    """The whole answer, or what came of it."""
    pieces = [] if into is None else into
    async with pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
    return pieces


async def fails(pool: Pool, wanted: Demand) -> tuple[Receipt, list[Piece]]:
    """What is left of an answer that lasts too long, and what came of it."""
    pieces: list[Piece] = []
    with pytest.raises(AnswerTimeout):
        await read(pool, wanted, into=pieces)
    found = [one for one in await pool.receipts() if one.request == wanted.id]
    assert [one.outcome for one in found] == [Outcome.FAILED]
    assert found[0].error == "answer_timeout"
    return found[0], pieces


# The whole answer


def test_an_answer_that_goes_on_too_long_is_ended() -> None:
    """It ends with an error of its own; its engine stops, and nobody is blamed or goes on."""

    async def main(clock: MemoryClock) -> None:
        engines = {"a": MemoryEngine(slots=2, pace=SLOW), "b": MemoryEngine(slots=1, pace=SLOW)}
        settings = GatewaySettings(answer_timeout_s=10.5)
        async with open_pool({**engines}, settings=settings, clock=clock) as pool:
            begun = clock.now()
            for number in range(10):
                receipt, pieces = await fails(pool, demand(f"r{number}", **LONG))
                assert receipt.usage.completion_tokens == len(pieces) - 1 == 10
                assert [lease.error for lease in receipt.leases] == ["answer_timeout"]
                assert pool.gateway.scheduler.running == 0
            assert clock.now() - begun == pytest.approx(105.0, abs=1.0)
            for node in engines:
                assert pool.fleet.status(node).state is NodeState.UP

    in_virtual_time(main)


def test_the_time_for_an_answer_holds_over_all_its_nodes() -> None:
    """Node after node stalls: all of them together have no longer than one."""

    async def main(clock: MemoryClock) -> None:
        stalled = {
            name: MemoryEngine(slots=1, pace=SLOW, fault_of=lambda _: Fault(kind=FaultKind.STALL))
            for name in "abc"
        }
        settings = GatewaySettings(first_token_timeout_s=8.0, answer_timeout_s=10.0)
        async with open_pool({**stalled}, settings=settings, clock=clock) as pool:
            begun = clock.now()
            receipt, pieces = await fails(pool, demand())
            assert clock.now() - begun == pytest.approx(10.0, abs=0.1)
            assert not pieces
            errors = [lease.error for lease in receipt.leases]
            assert errors == ["first_token_timeout", "answer_timeout"]

    in_virtual_time(main)


def test_the_time_for_an_answer_goes_on_in_the_queue_between_two_nodes() -> None:
    """Who waits for its second node does so within the time for its whole answer."""

    async def main(clock: MemoryClock) -> None:
        dies = MemoryEngine(
            slots=1, pace=SLOW, fault_of=lambda _: Fault(kind=FaultKind.BREAK, after_tokens=2)
        )
        busy = MemoryEngine(slots=1, pace=SLOW)
        settings = GatewaySettings(answer_timeout_s=20.0)
        async with (
            open_pool({"a": busy, "b": dies}, settings=settings, clock=clock) as pool,
            pool.gateway.answer(demand("first", member="other", **LONG)) as first,
        ):
            other, begun = demand("second", **LONG), clock.now()
            assert first.node == "a"
            receipt, _ = await fails(pool, other)
            assert clock.now() - begun == pytest.approx(20.0, abs=0.1)
            assert [lease.error for lease in receipt.leases] == ["engine_broken"]

    in_virtual_time(main)


def test_the_queue_is_no_part_of_the_answers_time() -> None:
    """It counts from the first slot: a long wait before leaves an answer all of it."""

    async def main(clock: MemoryClock) -> None:
        settings = GatewaySettings(answer_timeout_s=10.0)
        engines = {"a": MemoryEngine(slots=1, pace=SLOW)}
        async with open_pool({**engines}, settings=settings, clock=clock) as pool:
            begun, eight = clock.now(), {"output_tokens_max": 8, "body": {"max_tokens": 8}}
            async with asyncio.TaskGroup() as group:
                for name in ("first", "second"):
                    group.create_task(read(pool, demand(name, **eight)))
            assert clock.now() - begun > 12.0
            assert {one.outcome for one in await pool.receipts()} == {Outcome.FINISHED}

    in_virtual_time(main)


def test_embeddings_have_a_time_for_the_whole_answer() -> None:
    """It ends them as it does any answer."""

    async def main(clock: MemoryClock) -> None:
        crawls = MemoryEngine(slots=1, pace=Pace(step_s=1.0, prefill_tokens_s=0.1))
        settings = GatewaySettings(answer_timeout_s=5.0)
        wanted = demand(route=Route.EMBEDDINGS, body={"input": "a b c d"}, output_tokens_max=0)
        async with open_pool({"a": crawls}, settings=settings, clock=clock) as pool:
            with pytest.raises(AnswerTimeout):
                await pool.gateway.embed(wanted)
            [receipt] = await pool.receipts()
            assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "answer_timeout")
            assert pool.fleet.status("a").state is NodeState.UP

    in_virtual_time(main)


# A model's own times


@pytest.mark.parametrize(
    ("times", "lasts_s", "code"),
    [
        ("memory first_token=2", 2.0, "first_token_timeout"),
        ("memory answer=3", 3.0, "answer_timeout"),
        ("memory queue=4", 30.0, "first_token_timeout"),
        ("other first_token=2", 30.0, "first_token_timeout"),
    ],
)
def test_a_models_own_times_hold_for_it(times: str, lasts_s: float, code: str) -> None:
    """Its entry, and nothing else, says how long its engine has for a first token."""

    async def main(clock: MemoryClock) -> None:
        stalls = MemoryEngine(slots=1, pace=SLOW, fault_of=lambda _: Fault(kind=FaultKind.STALL))
        settings = GatewaySettings(
            first_token_timeout_s=30.0, queue_timeout_s=0.5, model_timeouts=(times,)
        )
        async with open_pool({"a": stalls}, settings=settings, clock=clock) as pool:
            begun = clock.now()
            with pytest.raises(AnserError):
                await read(pool, demand())
            [receipt] = await pool.receipts()
            assert receipt.leases[0].error == code
            first = receipt.leases[0]
            assert first.ended_ms - first.started_ms == pytest.approx(lasts_s * 1_000, abs=50)
            assert clock.now() - begun >= lasts_s

    in_virtual_time(main)


@pytest.mark.parametrize(("times", "waits_s"), [("memory queue=4", 4.0), ("other queue=4", 9.0)])
def test_a_models_own_queue_time_holds_for_it(times: str, waits_s: float) -> None:
    """It waits for a slot as long as its entry says, or as all others do."""

    async def main(clock: MemoryClock) -> None:
        settings = GatewaySettings(queue_timeout_s=9.0, model_timeouts=(times,))
        engines = {"a": MemoryEngine(slots=1, pace=SLOW)}
        async with (
            open_pool({**engines}, settings=settings, clock=clock) as pool,
            pool.gateway.answer(demand("first", **LONG)),
        ):
            begun = clock.now()
            with pytest.raises(QueueTimeout):
                await read(pool, demand("second"))
            assert clock.now() - begun == pytest.approx(waits_s, abs=0.1)

    in_virtual_time(main)


@pytest.mark.parametrize(("times", "ends"), [("memory gap=0.5", False), ("memory gap=1.5", True)])
def test_a_models_own_gap_holds_for_it(times: str, *, ends: bool) -> None:
    """An engine of one token a second is silent for the one model, and not for the other."""

    async def main(clock: MemoryClock) -> None:
        settings = GatewaySettings(model_timeouts=(times,), continue_answers=False)
        engines = {"a": MemoryEngine(slots=1, pace=SLOW)}
        async with open_pool({**engines}, settings=settings, clock=clock) as pool:
            if ends:
                assert await read(pool, demand())
            else:
                with pytest.raises(TokenGapTimeout):
                    await read(pool, demand())

    in_virtual_time(main)


def test_embeddings_have_their_models_own_times() -> None:
    """They come whole: the time for a first token is theirs."""

    async def main(clock: MemoryClock) -> None:
        crawls = MemoryEngine(slots=1, pace=Pace(step_s=1.0, prefill_tokens_s=0.1))
        settings = GatewaySettings(model_timeouts=("memory first_token=2",))
        wanted = demand(route=Route.EMBEDDINGS, body={"input": "a b c d"}, output_tokens_max=0)
        async with open_pool({"a": crawls}, settings=settings, clock=clock) as pool:
            begun = clock.now()
            with pytest.raises(FirstTokenTimeout):
                await pool.gateway.embed(wanted)
            assert 2.0 <= clock.now() - begun < 60.0

    in_virtual_time(main)
