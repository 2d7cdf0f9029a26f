"""services.gateway: how answers end, what they are charged, and what the store may do meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.config import GatewaySettings, MemberSettings
from anser.core import limits
from anser.core.errors import (
    EngineBroken,
    Overloaded,
    QueueTimeout,
    StoreFull,
    StoreLocked,
    TokenGapTimeout,
)
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.ports import Call, Route
from anser.services.chunks import Piece
from anser.services.gateway import Demand
from anser.services.members import OWNER
from tests.pool import Pool, demand, open_pool
from tests.simulation import virtual

pytestmark = pytest.mark.anyio

FAST = Pace(step_s=0.001, step_each_s=0.0, prefill_tokens_s=1e6)
SLOW = Pace(step_s=0.05, step_each_s=0.0, prefill_tokens_s=1e6)
LONG = {"output_tokens_max": 500, "body": {"messages": [], "max_tokens": 500}}


def chunk(text: str = "", finish: str | None = None) -> bytes:
    """One chunk of a chat."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode()


def usage(completion: int) -> bytes:
    """The chunk that reports it."""
    return json.dumps(
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": completion}}
    ).encode()


class Scripted(MemoryEngine):
    """Says what it was given, chunk by chunk, each after `pause_s`; `endless` repeats the last."""

    def __init__(self, says: Sequence[bytes], *, pause_s: float = 0.0, endless: bool = False):
        super().__init__(slots=1, pace=FAST)
        self.says, self.pause_s, self.endless = says, pause_s, endless

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """One answer, whatever is asked."""
        yield self._speak(call)

    async def _speak(self, _call: Call) -> AsyncGenerator[bytes]:
        for each in self.says:
            await asyncio.sleep(self.pause_s)
            yield each
        while self.endless:
            await asyncio.sleep(self.pause_s)
            yield self.says[-1]


async def read(pool: Pool, wanted: Demand, *, into: list[Piece] | None = None) -> list[Piece]:
    """All pieces of an answer."""
    pieces = [] if into is None else into
    async with pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
    return pieces


def words(pieces: list[Piece]) -> str:
    """The text of these pieces."""
    choices: list[dict[str, Any]] = [
        choice for piece in pieces for choice in json.loads(piece.data)["choices"]
    ]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def blamed(pool: Pool) -> None:
    """Its node does this again and again, and is asked no more."""
    for number in range(20):
        if pool.fleet.status("a").state is not NodeState.UP:
            break
        await read(pool, demand(str(number)))
    assert pool.fleet.status("a").state is not NodeState.UP


def in_virtual_time(main: Callable[[MemoryClock], Coroutine[Any, Any, None]]) -> None:
    """Run on a clock that jumps from timer to timer."""
    clock = MemoryClock()
    virtual.run(lambda: main(clock), clock=clock, jumped=lambda: None)


# The end


async def test_after_the_end_only_the_usage_counts() -> None:
    """An engine's idle words after its finish are neither kept nor passed on; its usage is."""
    says = [chunk("a"), chunk("", "stop"), chunk(), chunk("", "stop"), usage(1), chunk(), usage(1)]
    async with open_pool({"a": Scripted(says)}) as pool:
        pieces = await read(pool, demand())
        assert [piece.data for piece in pieces] == [says[0], says[1], usage(1)]
        assert [piece.finish for piece in pieces] == [None, "stop", None]


@pytest.mark.parametrize("last", [chunk(), usage(1), chunk("", "stop")])
async def test_an_end_that_does_not_end_is_the_engines_fault(last: bytes) -> None:
    """A node that goes on for ever after its finish holds neither memory nor slot for ever."""
    node = Scripted([chunk("a"), chunk("", "stop"), last], endless=True)
    async with open_pool({"a": node}) as pool:
        assert words(await read(pool, demand())) == "a"
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FINISHED, 1)
        assert pool.gateway.scheduler.running == 0
        await blamed(pool)


async def test_text_after_the_end_is_the_engines_fault() -> None:
    """An answer ends once: what is said after it is never passed on."""
    async with open_pool({"a": Scripted([chunk("a"), chunk("", "stop"), chunk("b")])}) as pool:
        assert words(await read(pool, demand())) == "a"
        await blamed(pool)


async def test_chunks_without_a_token_are_silence() -> None:
    """The gap is measured between tokens: a node cannot fill it with empty chunks."""
    node = Scripted([chunk("a"), chunk()], pause_s=0.02, endless=True)
    settings = GatewaySettings(token_gap_timeout_s=0.2, continue_answers=False)
    async with open_pool({"a": node}, settings=settings) as pool:
        with pytest.raises(TokenGapTimeout):
            async with asyncio.timeout(3):
                await read(pool, demand())


async def test_silence_after_the_end_is_no_silence() -> None:
    """Whose finish has come is not kept from its end by a node that does not let go."""
    node = Scripted([chunk("a"), chunk("", "stop"), chunk()], pause_s=0.02, endless=True)
    settings = GatewaySettings(token_gap_timeout_s=0.2)
    async with open_pool({"a": node}, settings=settings) as pool, asyncio.timeout(3):
        assert words(await read(pool, demand())) == "a"


def test_a_client_that_reads_slowly_is_not_silence() -> None:
    """Only the engine's time counts in the gap, however long its client takes over a piece."""

    async def main(clock: MemoryClock) -> None:
        node = Scripted([*map(chunk, "abc"), chunk("", "stop")], pause_s=0.9)
        settings = GatewaySettings(token_gap_timeout_s=1.0)
        async with open_pool({"a": node}, settings=settings, clock=clock) as pool:
            async with pool.gateway.answer(demand()) as answer:
                async for _ in answer:
                    await asyncio.sleep(60.0)
            [receipt] = await pool.receipts()
            assert receipt.outcome is Outcome.FINISHED

    in_virtual_time(main)


# The longest answer


async def test_an_answer_is_cut_off_at_its_longest() -> None:
    """No token beyond the maximum is delivered or charged, and the node is blamed for it."""
    settings = MemberSettings(tokens_per_minute=1_000)
    node = Scripted([chunk("x")], endless=True)
    async with open_pool({"a": node}, member_settings=settings) as pool:
        async with pool.gateway.answer(demand()) as answer:
            pieces = [piece async for piece in answer]
            assert answer.usage.completion_tokens == 5
        assert words(pieces) == "xxxxx"
        assert [piece.finish for piece in pieces] == [*[None] * 5, "length"]
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FINISHED, 5)
        assert [lease.completion_tokens for lease in receipt.leases] == [5]
        left = pool.members.limits_left(OWNER)["x-ratelimit-remaining-tokens"]
        assert int(left) == pytest.approx(1_000 - 4 - 5, abs=2)
        await blamed(pool)


async def test_an_answer_that_ends_too_late_is_cut_off_too() -> None:
    """A few tokens too many are not delivered either, though the engine ends by itself."""
    says = [*map(chunk, "abcdefg"), chunk("", "stop"), usage(7)]
    async with open_pool({"a": Scripted(says)}) as pool:
        pieces = await read(pool, demand())
        assert words(pieces) == "abcde"
        assert [piece.finish for piece in pieces if piece.finish] == ["length"]
        [receipt] = await pool.receipts()
        assert receipt.usage.completion_tokens == 5


async def test_the_rest_of_the_last_token_is_delivered() -> None:
    """An engine may send its last token in two parts: that is no overrun."""
    says = [*map(chunk, "abcdef"), chunk(), chunk("", "length"), usage(5)]
    async with open_pool({"a": Scripted(says)}) as pool:
        assert words(await read(pool, demand())) == "abcdef"
        [receipt] = await pool.receipts()
        assert receipt.usage.completion_tokens == 5
    async with open_pool({"a": Scripted(says[:6])}) as pool:
        pieces = await read(pool, demand())
        assert words(pieces) == "abcde"
        assert pieces[-1].finish == "length", "nothing was missing when the node died"


# What is charged


async def test_leases_add_up_to_what_was_used() -> None:
    """Usage and the leases' tokens are one story, also where a chunk holds several tokens."""
    says = [chunk("four tokens in one"), chunk("", "stop"), usage(4)]
    async with open_pool({"a": Scripted(says)}) as pool:
        await read(pool, demand())
        [receipt] = await pool.receipts()
        assert receipt.usage.completion_tokens == 4
        assert [lease.completion_tokens for lease in receipt.leases] == [4]


async def test_a_share_is_charged_while_an_answer_is_made() -> None:
    """A long answer is paid for as it grows, not at its end: others do not have to wait for it."""
    async with (
        open_pool({"a": MemoryEngine(slots=1, pace=SLOW)}) as pool,
        pool.gateway.answer(demand(**LONG)) as answer,
    ):
        paid: list[int] = []
        async for _ in answer:
            paid.append(pool.gateway.scheduler.service)
            if len(paid) == 12:
                break
        assert len(set(paid)) >= 3
        assert paid == sorted(paid)


async def test_who_leaves_pays_for_what_was_made() -> None:
    """A client that leaves in mid-answer has used its prompt and the tokens so far."""
    settings = MemberSettings(tokens_per_minute=1_000)
    node = MemoryEngine(slots=1, pace=SLOW)
    async with open_pool({"a": node}, member_settings=settings) as pool:
        async with pool.gateway.answer(demand(**LONG)) as answer:
            pieces = 0
            async for _ in answer:
                pieces += 1
                if pieces == 4:
                    break
        left = int(pool.members.limits_left(OWNER)["x-ratelimit-remaining-tokens"])
        assert left == pytest.approx(1_000 - 4 - 3 + 3, abs=4)
        assert left < 1_000


async def test_only_whole_answers_teach_the_usual_length() -> None:
    """Neither an answer that its client left nor embeddings say how long the next one will be."""
    node = MemoryEngine(slots=1, pace=FAST)
    async with open_pool({"a": node}) as pool:
        for number in range(5):
            async with pool.gateway.answer(demand(str(number), **LONG)) as answer:
                await anext(aiter(answer))
            embedding = {"route": Route.EMBEDDINGS, "body": {"input": "hello"}}
            await pool.gateway.embed(demand(f"e{number}", output_tokens_max=0, **embedding))
        guess = pool.members.reserve(OWNER, prompt_tokens=0, output_tokens_max=500)
        assert guess.tokens == 256
        guess.settle(prompt_tokens=0, completion_tokens=0)
        await read(pool, demand())
        guess = pool.members.reserve(OWNER, prompt_tokens=0, output_tokens_max=500)
        assert guess.tokens < 256
        guess.settle(prompt_tokens=0, completion_tokens=0)


# The store fails


@pytest.mark.parametrize(
    ("fault", "told", "outcome"),
    [
        (None, StoreLocked, Outcome.FINISHED),
        (Fault(kind=FaultKind.BREAK, after_tokens=2), EngineBroken, Outcome.FAILED),
    ],
)
async def test_no_receipt_is_lost_while_the_store_fails(
    fault: Fault | None, told: type[Exception], outcome: Outcome
) -> None:
    """Whoever stays is told why there is no end, and the receipt is stored later, once."""
    node = MemoryEngine(slots=1, pace=FAST, fault_of=lambda _: fault)
    settings = GatewaySettings(continue_answers=False)
    async with open_pool({"a": node}, settings=settings) as pool:
        pool.store.fault = StoreLocked("Locked by a backup.")
        with pytest.raises(told):
            await read(pool, demand())
        pool.store.fault = None
        [receipt] = await pool.receipts()
        assert (receipt.request, receipt.outcome) == ("r", outcome)


async def test_nothing_is_admitted_whose_receipt_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At RECEIPTS_PENDING_MAX of what runs and what is kept, new requests are refused."""
    monkeypatch.setattr(limits, "RECEIPTS_PENDING_MAX", 2)
    async with open_pool({"a": MemoryEngine(slots=3, pace=SLOW)}) as pool:
        pool.store.fault = StoreFull("The disk is full.")
        with pytest.raises(StoreFull):
            await read(pool, demand("kept"))
        running = asyncio.ensure_future(read(pool, demand("running")))
        await until(lambda: pool.gateway.scheduler.running == 1)
        with pytest.raises(Overloaded, match="receipts") as refused:
            await read(pool, demand("refused"))
        assert refused.value.retry_after_s
        with pytest.raises(StoreFull):
            await running
        pool.store.fault = None
        assert {receipt.request for receipt in await pool.receipts()} == {"kept", "running"}
        assert await read(pool, demand("after"))


async def test_what_could_not_be_stored_is_not_drained() -> None:
    """A drain that the store refuses changes nothing: node and store agree."""
    async with open_pool({}, more={"b": MemoryEngine(slots=1, pace=FAST)}) as pool:
        await pool.fleet.add(Node(id="b", url="http://b.example"))
        pool.store.fault = StoreFull("The disk is full.")
        with pytest.raises(StoreFull):
            await pool.fleet.drain("b")
        pool.store.fault = None
        assert pool.fleet.status("b").state is NodeState.UP
        assert await read(pool, demand())


# The queue's time


def test_a_retry_does_not_wait_anew() -> None:
    """The queue's limit is one for the whole request, however many nodes fail meanwhile."""

    async def main(clock: MemoryClock) -> None:
        silent = MemoryEngine(slots=1, pace=FAST, fault_of=lambda _: Fault(kind=FaultKind.STALL))
        busy = MemoryEngine(slots=1, pace=SLOW)
        settings = GatewaySettings(queue_timeout_s=10.0, first_token_timeout_s=8.0)
        async with (
            open_pool({"a": silent, "b": busy}, settings=settings, clock=clock) as pool,
            pool.gateway.answer(demand("first")) as first,
        ):
            assert first.node == "b"
            begun = clock.now()
            with pytest.raises(QueueTimeout):
                await read(pool, demand("second"))
            assert clock.now() - begun == pytest.approx(10.0, abs=0.1)

    in_virtual_time(main)


async def test_who_leaves_as_its_node_goes_leaves_no_error_behind() -> None:
    """What a request would have been told is not logged as a fault that nobody has looked at."""
    nobody: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: nobody.append(context))
    node = MemoryEngine(slots=1, pace=SLOW)
    async with open_pool({}, more={"a": node}) as pool:
        await pool.fleet.add(Node(id="a", url="http://a.example"))
        async with pool.gateway.answer(demand("first", **LONG)), asyncio.TaskGroup() as group:
            waiting = group.create_task(read(pool, demand("second")))
            await asyncio.sleep(0)
            assert pool.gateway.scheduler.queued == 1
            await pool.fleet.remove("a")
            waiting.cancel()
        assert waiting.cancelled()
        del waiting
        gc.collect()
    assert nobody == []
