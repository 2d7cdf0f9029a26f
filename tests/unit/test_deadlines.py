"""Deadlines, and what whoever is turned away from the queue is told of when to come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.config import GatewaySettings
from anser.core.errors import DeadlineUnreachable, Overloaded, QueueTimeout
from anser.core.ledger import Outcome
from anser.core.limits import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S
from anser.ports import Call, Route
from anser.services.gateway import Demand
from anser.services.run import come_back_s
from tests.pool import Pool, demand, open_pool
from tests.stage import stage

pytestmark = pytest.mark.anyio

SLOW = Pace(step_s=0.02)


def stalls(call: Call) -> Fault | None:
    """An engine that never begins what is called late."""
    return Fault(kind=FaultKind.STALL) if call.lease.startswith("late") else None


@asynccontextmanager
async def busy(**options: Any) -> AsyncGenerator[Pool]:
    """A pool whose only slot is taken."""
    engine = MemoryEngine(slots=1, pace=SLOW)
    async with open_pool({"a": engine}, **options) as pool, asyncio.TaskGroup() as tasks:
        long = demand("long", output_tokens_max=500, body={"messages": [], "max_tokens": 500})
        holding = tasks.create_task(ask(pool, long))
        while not pool.gateway.scheduler.running:
            await asyncio.sleep(0.001)
        yield pool
        holding.cancel()


async def ask(pool: Pool, wanted: Demand) -> None:
    """Read one answer to its end."""
    async with pool.gateway.answer(wanted) as answer:
        assert [piece async for piece in answer]


async def test_what_cannot_meet_its_deadline_is_refused_early() -> None:
    """It never waits, and is told when a slot is expected; one with more time waits."""
    async with busy() as pool:
        now = pool.gateway.clock.now()
        expected_s = pool.gateway.scheduler.wait_s("local/default/owner", "memory")
        assert expected_s > 1
        with pytest.raises(DeadlineUnreachable) as refused:
            await ask(pool, demand("soon", deadline=now + expected_s / 2))
        assert refused.value.retry_after_s == pytest.approx(expected_s, rel=0.6)
        assert refused.value.status == 503
        waiting = asyncio.ensure_future(ask(pool, demand("later", deadline=now + 1_000)))
        await asyncio.sleep(0.01)
        assert pool.gateway.scheduler.queued == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert {one.request for one in await pool.receipts()} == {"later"}


async def test_a_free_slot_is_in_time() -> None:
    """Where a slot is free, a short deadline is met; what is kept is as any other answer."""
    async with open_pool({"a": MemoryEngine()}) as pool:
        await ask(pool, demand(deadline=pool.gateway.clock.now() + 1))
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FINISHED


async def test_who_waits_is_given_up_at_its_deadline() -> None:
    """An estimate may be wrong: what is admitted leaves the queue when its time is over."""
    async with busy() as pool:
        now = pool.gateway.clock.now()
        for node in pool.gateway.scheduler._slots.nodes():
            node.pace.hold_s.value = 0.01
        with pytest.raises(DeadlineUnreachable) as late:
            await ask(pool, demand("late", deadline=now + 0.1))
        assert late.value.retry_after_s
        assert pool.gateway.scheduler.queued == 0
        [receipt] = [one for one in await pool.receipts() if one.request == "late"]
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "deadline_unreachable")


@pytest.mark.parametrize("route", [Route.CHAT, Route.EMBEDDINGS])
async def test_a_first_token_that_is_late_blames_no_node(route: Route) -> None:
    """At the deadline its engine is stopped, no other is tried, and its member pays the prompt."""
    pace = Pace(step_s=0.02, prefill_tokens_s=1)
    nodes = {name: MemoryEngine(pace=pace, fault_of=stalls) for name in "ab"}
    async with open_pool({**nodes}) as pool:
        deadline = pool.gateway.clock.now() + 0.1
        late = demand("late", route=route, deadline=deadline, body={"input": "a b", "messages": []})
        asking = ask(pool, late) if route is Route.CHAT else pool.gateway.embed(late)
        with pytest.raises(DeadlineUnreachable):
            await asking
        [receipt] = await pool.receipts()
        assert len(receipt.leases) == 1
        assert receipt.error == "deadline_unreachable"
        assert pool.gateway.scheduler.service == 4 * 1_000_000
        assert pool.gateway.stats.retries == 0


async def test_when_to_come_back_is_computed_from_the_queue() -> None:
    """A full queue and a wait in vain tell how long one more request would wait."""
    settings = GatewaySettings(queue_timeout_s=0.05, probe_interval_s=1)
    async with busy(queued_max=1, settings=settings) as pool:
        first, second = (asyncio.ensure_future(ask(pool, demand(name))) for name in ("b", "c"))
        results = await asyncio.gather(first, second, return_exceptions=True)
        [full] = [one for one in results if isinstance(one, Overloaded)]
        [vain] = [one for one in results if isinstance(one, QueueTimeout)]
        for error in (full, vain):
            assert 10 < (error.retry_after_s or 0) <= 40


@pytest.mark.parametrize(
    ("wait_s", "told_s"),
    [
        (0.0, RETRY_AFTER_MIN_S),
        (42.5, 42.5),
        (RETRY_AFTER_MAX_S, RETRY_AFTER_MAX_S),
        (RETRY_AFTER_MAX_S + 1, RETRY_AFTER_MAX_S),
        (float("inf"), 5.0),
        (None, 5.0),
    ],
)
def test_when_to_come_back_is_bounded(wait_s: float | None, told_s: float) -> None:
    """Nobody is sent away for less than a second or more than ten minutes."""
    assert come_back_s(wait_s) == told_s


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1e999"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
async def test_a_deadline_is_a_number_of_seconds(tmp_path: Path, text: str, path: str) -> None:
    """Anything else is a 400 that names the header."""
    async with stage(tmp_path) as scene:
        answer = await scene.client().ask("POST", path, b"{}", x_anser_deadline=text)
    assert answer.status == 400
    assert answer.error["param"] == "x-anser-deadline"
    assert answer.error["code"] == "invalid_value"


async def test_a_deadline_comes_with_the_request(tmp_path: Path) -> None:
    """The header's seconds count from when the request came; far enough away it changes nothing."""
    chat = json.dumps({"model": "memory", "messages": [{"role": "user", "content": "x"}]}).encode()
    path = "/v1/chat/completions"
    async with stage(tmp_path, fault=lambda _: Fault(kind=FaultKind.STALL)) as scene:
        late = await scene.client().ask("POST", path, chat, x_anser_deadline="0.05")
    async with stage(tmp_path) as scene:
        good = await scene.client().ask("POST", path, chat, x_anser_deadline="1e3")
    assert (late.status, late.error["code"]) == (503, "deadline_unreachable")
    assert int(late.headers["retry-after"]) >= 1
    assert good.status == 200
