"""services.gateway: from admission to receipt, over engines in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.config import GatewaySettings, MemberSettings
from anser.core.errors import (
    AnserError,
    EngineBroken,
    EngineRefused,
    EngineUnreachable,
    FirstTokenTimeout,
    LimitReached,
    ModelNotFound,
    NoNode,
    Overloaded,
    QueueTimeout,
    ShuttingDown,
    StoreError,
    StoreFull,
    TokenGapTimeout,
)
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.ledger import Outcome, Usage
from anser.ports import Call, Route
from anser.services.chunks import Piece
from anser.services.gateway import Answer, Demand
from anser.services.members import OWNER
from tests.pool import Pool, demand, open_pool

pytestmark = pytest.mark.anyio

FAST = Pace(step_s=0.001, step_each_s=0.0001, prefill_tokens_s=100_000)
SLOW = Pace(step_s=0.02, step_each_s=0.0, prefill_tokens_s=100_000)


def engine(
    fault: Fault | None = None, *, pace: Pace = FAST, slots: int = 2, times: int = 10**6
) -> MemoryEngine:
    """An engine whose first `times` answers have this fault."""
    left = [times]

    def fault_of(_call: Call) -> Fault | None:
        left[0] -= 1
        return fault if left[0] >= 0 else None

    return MemoryEngine(slots=slots, pace=pace, fault_of=fault_of)


async def read(pool: Pool, wanted: Demand, into: list[Piece] | None = None) -> list[Piece]:
    pieces = [] if into is None else into
    async with pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
    return pieces


def words(pieces: list[Piece]) -> str:
    choices: list[dict[str, Any]] = [
        choice for piece in pieces for choice in json.loads(piece.data)["choices"]
    ]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_answer_ends_once_and_leaves_its_receipt() -> None:
    """A finished request: its text, one finish, one usage, one receipt that agrees with it."""
    async with open_pool({"a": engine()}) as pool:
        async with pool.gateway.answer(demand()) as answer:
            assert answer.node == "a"
            assert answer.limits["x-ratelimit-remaining-requests"] == "511"
            pieces = [piece async for piece in answer]
            usage = answer.usage
        assert len(words(pieces).split()) == 5
        assert [piece.finish for piece in pieces if piece.finish] == ["length"]
        assert [piece.usage for piece in pieces if piece.usage] == [usage]
        assert usage.completion_tokens == 5
        [receipt] = await pool.receipts()
        assert (receipt.request, receipt.member, receipt.model) == ("r", OWNER, "memory")
        assert (receipt.outcome, receipt.error, receipt.usage) == (Outcome.FINISHED, None, usage)
        [lease] = receipt.leases
        assert (lease.node, lease.completion_tokens, lease.error) == ("a", 5, None)
        assert receipt.first_token_ms is not None
        assert receipt.queued_ms <= lease.started_ms <= receipt.first_token_ms <= receipt.ended_ms


async def test_the_end_is_sent_only_when_the_receipt_is_durable() -> None:
    """Whoever has seen a finish finds the receipt: at the finish piece it is stored already."""
    async with open_pool({"a": engine()}) as pool, pool.gateway.answer(demand()) as answer:
        async for piece in answer:
            stored = await pool.store.find("r")
            assert (stored is not None) == (piece.finish is not None or piece.usage is not None)


async def test_no_end_is_sent_when_the_receipt_cannot_be_stored() -> None:
    """A full disk is an error in mid-stream, never an end without a receipt."""
    async with open_pool({"a": engine()}) as pool:
        pool.store.fault = StoreFull("The disk is full.")
        got: list[Piece] = []
        with pytest.raises(StoreError):
            await read(pool, demand(), into=got)
        assert got
        assert not any(piece.finish or piece.usage for piece in got)
        pool.store.fault = None
        assert await read(pool, demand("after"))


async def test_a_node_that_fails_before_its_first_token_is_replaced_unseen() -> None:
    """The client sees one answer; the receipt shows both leases, the first with its error."""
    broken = engine(Fault(kind=FaultKind.BREAK))
    async with open_pool({"a": broken, "b": engine(slots=1)}) as pool:
        pieces = await read(pool, demand())
        assert len(words(pieces).split()) == 5
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FINISHED
        assert [lease.node for lease in receipt.leases] == ["a", "b"]
        assert receipt.leases[0].error == "engine_broken"
        assert pool.gateway.stats.retries == 1


async def test_a_request_gives_up_after_its_tries() -> None:
    """Where every node fails, the last error is told, and what was tried is in the receipt."""
    engines = {name: engine(Fault(kind=FaultKind.BREAK)) for name in "abc"}
    async with open_pool({**engines}) as pool:
        with pytest.raises(EngineBroken):
            await read(pool, demand())
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "engine_broken")
        assert len(receipt.leases) == 3
        assert receipt.usage == Usage()


async def test_a_failure_after_the_first_token_is_told() -> None:
    """Where nobody may go on, the error comes in mid-stream: what has been said stays said."""
    fault = Fault(kind=FaultKind.BREAK, after_tokens=2)
    settings = GatewaySettings(continue_answers=False)
    engines = {"a": engine(fault), "b": engine(fault)}
    async with open_pool({**engines}, settings=settings) as pool:
        got: list[Piece] = []
        with pytest.raises(EngineBroken):
            await read(pool, demand(), into=got)
        assert len(words(got).split()) == 2
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.FAILED
        assert receipt.usage.completion_tokens == 2
        assert len(receipt.leases) == 1


async def test_the_requests_own_fault_is_not_the_nodes() -> None:
    """A refusal goes to the client at once, without a retry and without harm to the node."""
    async with open_pool({"a": engine(Fault(kind=FaultKind.REFUSE))}) as pool:
        for number in range(20):
            with pytest.raises(EngineRefused):
                await read(pool, demand(f"r{number}"))
        assert pool.fleet.status("a").state is NodeState.UP
        receipts = await pool.receipts()
        assert {receipt.error for receipt in receipts} == {"engine_refused"}
        assert all(len(receipt.leases) == 1 for receipt in receipts)


async def test_silence_before_the_first_token_is_a_failed_node() -> None:
    """A stalled node is left within the limit, and another one answers."""
    stalled = engine(Fault(kind=FaultKind.STALL))
    settings = GatewaySettings(first_token_timeout_s=0.1)
    async with open_pool({"a": stalled, "b": engine(slots=1)}, settings=settings) as pool:
        assert await read(pool, demand())
        [receipt] = await pool.receipts()
        assert [lease.error for lease in receipt.leases] == ["first_token_timeout", None]


async def test_silence_between_tokens_is_told() -> None:
    """Never silence: a gap beyond the limit is an error event."""
    fault = Fault(kind=FaultKind.STALL, after_tokens=2)
    settings = GatewaySettings(token_gap_timeout_s=0.1, continue_answers=False)
    async with open_pool({"a": engine(fault)}, settings=settings) as pool:
        with pytest.raises(TokenGapTimeout):
            await read(pool, demand())
        [receipt] = await pool.receipts()
        assert (receipt.error, receipt.usage.completion_tokens) == ("token_gap_timeout", 2)


async def test_a_client_that_leaves_in_mid_answer_frees_the_slot_at_once() -> None:
    """Leaving cancels at the engine; the receipt counts what was delivered, as cancelled."""
    node = engine(pace=SLOW, slots=1)
    async with open_pool({"a": node}) as pool:
        wanted = demand(output_tokens_max=500, body={"messages": [], "max_tokens": 500})
        async with pool.gateway.answer(wanted) as answer:
            got = 0
            async for piece in answer:
                got += len(words([piece]).split())
                if got == 3:
                    break
        node.validate()
        assert "0/1" in repr(node)
        assert pool.gateway.scheduler.running == 0
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED
        assert receipt.usage.completion_tokens == 3


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.004, 0.012, 0.03])
async def test_a_task_that_is_cancelled_leaves_one_receipt_and_nothing_else(delay_s: float) -> None:
    """At whatever instant the client's task is cancelled, slots and limits are as before."""
    async with open_pool({"a": engine(pace=SLOW, slots=1)}) as pool:
        tasks = [asyncio.ensure_future(read(pool, demand(f"r{n}"))) for n in range(3)]
        await asyncio.sleep(delay_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(pool.gateway.empty.is_set)
        pool.validate()
        admitted = await pool.receipts()
        assert len({receipt.request for receipt in admitted}) == len(admitted)
        assert len(admitted) == 3
        assert await read(pool, demand("after"))


async def test_who_waits_and_leaves_was_never_charged() -> None:
    """A request cancelled in the queue has no lease and no usage."""
    async with open_pool({"a": engine(pace=SLOW, slots=1)}) as pool:
        first = asyncio.ensure_future(read(pool, demand("first")))
        await until(lambda: pool.gateway.scheduler.running == 1)
        second = asyncio.ensure_future(read(pool, demand("second")))
        await until(lambda: pool.gateway.scheduler.queued == 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert await first
        by_id = {receipt.request: receipt for receipt in await pool.receipts()}
        assert by_id["second"].leases == ()
        assert by_id["second"].usage == Usage()
        assert by_id["second"].outcome is Outcome.CANCELLED


async def test_waiting_has_a_limit() -> None:
    """A request that finds no slot in time is told so, with a time to come back."""
    settings = GatewaySettings(queue_timeout_s=0.1)
    async with open_pool({"a": engine(pace=SLOW, slots=1)}, settings=settings) as pool:
        long = demand("long", output_tokens_max=500, body={"messages": [], "max_tokens": 500})
        holding = asyncio.ensure_future(read(pool, long))
        await until(lambda: pool.gateway.scheduler.running == 1)
        with pytest.raises(QueueTimeout) as late:
            await read(pool, demand())
        assert late.value.retry_after_s
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


async def test_a_full_queue_refuses_without_a_receipt() -> None:
    """The platform's own limit: at it waits, beyond it is refused, and nothing is left behind."""
    async with open_pool({"a": engine(pace=SLOW, slots=1)}, queued_max=1) as pool:
        held = [asyncio.ensure_future(read(pool, demand(f"r{n}"))) for n in range(2)]
        await until(lambda: pool.gateway.scheduler.queued == 1)
        with pytest.raises(Overloaded):
            await read(pool, demand("more"))
        await asyncio.gather(*held)
        assert {receipt.request for receipt in await pool.receipts()} == {"r0", "r1"}


async def test_a_members_limit_refuses_without_a_receipt() -> None:
    """Beyond its own limit a member is refused before admission; others are not."""
    settings = MemberSettings(in_flight_max=1)
    async with open_pool({"a": engine(pace=SLOW)}, member_settings=settings) as pool:
        held = asyncio.ensure_future(read(pool, demand()))
        await until(lambda: pool.gateway.scheduler.running == 1)
        with pytest.raises(LimitReached):
            await read(pool, demand("more"))
        assert await read(pool, demand("other", member="anonymous/bucket-1"))
        await held
        assert len(await pool.receipts()) == 2


async def test_models_are_checked_before_anything_is_taken() -> None:
    """An unknown model is not found; a known one whose nodes are down is unavailable."""
    node = engine()
    async with open_pool({"a": node}) as pool:
        with pytest.raises(ModelNotFound):
            await read(pool, demand(model="nothing"))
        node.go_down()
        await until(lambda: pool.fleet.status("a").state is NodeState.DOWN)
        with pytest.raises(NoNode) as down:
            await read(pool, demand())
        assert down.value.retry_after_s
        assert await pool.receipts() == []


async def test_a_draining_gateway_admits_nothing_and_finishes_what_runs() -> None:
    """After drain() what runs ends well, and what comes is sent elsewhere."""
    async with open_pool({"a": engine(pace=SLOW)}) as pool:
        running = asyncio.ensure_future(read(pool, demand()))
        await until(lambda: pool.gateway.scheduler.running == 1)
        pool.gateway.drain()
        with pytest.raises(ShuttingDown):
            await read(pool, demand("late"))
        assert await running
        assert pool.gateway.empty.is_set()
        assert pool.gateway.snapshot().draining


EMBED = demand(route=Route.EMBEDDINGS, body={"input": ["hello"]}, output_tokens_max=0)


async def test_how_long_prompts_are_is_learnt_from_engines() -> None:
    """The engine's own count of a prompt is what the next one's length is estimated by."""
    async with open_pool({"a": engine()}) as pool:
        words = " ".join(str(number) for number in range(300))
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": 5}
        async with pool.gateway.answer(demand(body=body, prompt_bytes=1_000)) as answer:
            _ = [piece async for piece in answer]
            counted = answer.usage.prompt_tokens
        assert pool.gateway.lengths.tokens("memory", 1_000) == counted != 250


async def test_embeddings_go_the_same_way() -> None:
    """One lease, one receipt, prompt tokens only; a failed node is replaced."""
    broken = engine()
    async with open_pool({"a": broken, "b": engine(slots=1)}) as pool:
        broken.go_down()
        embedded = await pool.gateway.embed(EMBED)
        assert embedded.node == "b"
        assert json.loads(embedded.data)["data"]
        [receipt] = await pool.receipts()
        assert receipt.usage == embedded.usage
        assert receipt.usage.completion_tokens == 0
        assert [lease.error for lease in receipt.leases] == ["engine_unreachable", None]


CRAWLING = Pace(step_s=1.0, prefill_tokens_s=1)


async def test_embeddings_have_a_limit() -> None:
    """A node that takes too long over them has failed."""
    settings = GatewaySettings(first_token_timeout_s=0.05)
    async with open_pool({"a": engine(pace=CRAWLING)}, settings=settings) as pool:
        with pytest.raises(FirstTokenTimeout):
            await pool.gateway.embed(EMBED)
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "first_token_timeout")


async def test_embeddings_can_be_cancelled() -> None:
    """A client that leaves while its embeddings are made frees the slot."""
    async with open_pool({"a": engine(pace=CRAWLING)}) as pool:
        asking = asyncio.ensure_future(pool.gateway.embed(EMBED))
        await until(lambda: pool.gateway.scheduler.running == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert pool.gateway.empty.is_set()
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED


async def test_a_removed_node_is_another_nodes_work() -> None:
    """A node that is gone between lease and call counts as unreachable, and another is tried."""
    async with open_pool({"b": engine(slots=1)}, more={"a": engine(slots=1)}) as pool:
        await pool.fleet.add(Node(id="a", url="http://a.example"))
        held: dict[str, AbstractAsyncContextManager[Answer]] = {}
        for number in range(2):
            context = pool.gateway.answer(demand(str(number)))
            held[(await context.__aenter__()).node] = context
        waiting = asyncio.ensure_future(read(pool, demand("2")))
        await until(lambda: pool.gateway.scheduler.queued == 1)
        await held["a"].__aexit__(None, None, None)  # the slot of a is leased to the next one
        await pool.fleet.remove("a")  # before that one's task has run
        await held["b"].__aexit__(None, None, None)
        assert await waiting
        errors = {each.request: [x.error for x in each.leases] for each in await pool.receipts()}
        assert errors["2"] == [EngineUnreachable.code, None]


async def test_shares_follow_weights_while_both_wait() -> None:
    """Two organisations of weights 3 and 1 with full queues: tokens are divided 3 to 1."""
    async with open_pool({"a": engine(slots=1)}) as pool:
        for name, weight in (("heavy", 3_000), ("light", 1_000)):
            await pool.members.add_member(name, weight=weight)
        done: list[str] = []

        async def ask(member: str, number: int) -> None:
            await read(pool, demand(f"{member}{number}", member=member))
            done.append(member)

        async with asyncio.TaskGroup() as tasks:
            for number in range(24):
                tasks.create_task(ask("heavy", number))
                tasks.create_task(ask("light", number))
        early = done[:24]
        assert early.count("heavy") == pytest.approx(18, abs=1)


async def test_the_snapshot_tells_what_waits_and_runs() -> None:
    """What people see agrees with what is in flight, and counters with what has ended."""
    async with open_pool({"a": engine(pace=SLOW, slots=1)}) as pool:
        held = [asyncio.ensure_future(read(pool, demand(f"r{n}"))) for n in range(3)]
        await until(lambda: pool.gateway.scheduler.running == 1)
        shot = pool.gateway.snapshot()
        assert (shot.queued, shot.running) == (2, 1)
        assert [(row.node, row.running) for row in shot.nodes] == [("a", 1)]
        await asyncio.gather(*held)
        stats = pool.gateway.stats
        assert stats.outcomes["chat", "finished"] == 3
        assert stats.tokens["completion"] == 15
        assert sum(stats.first_token_s.counts) == 3
        assert pool.gateway.snapshot().tokens_per_s > 0
        assert "runs=0" in repr(pool.gateway)


async def test_errors_raised_while_reading_end_the_request_as_failed() -> None:
    """An error of the caller's own, raised between pieces, is the receipt's error."""
    async with open_pool({"a": engine(pace=SLOW)}) as pool:
        context = pool.gateway.answer(demand())
        await context.__aenter__()
        mine = AnserError("The caller cannot go on.")
        swallowed = await context.__aexit__(AnserError, mine, None)
        assert not swallowed
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "internal_error")
        assert "0/2" in repr(pool.fleet.engine("a"))
