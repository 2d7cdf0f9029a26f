"""The gateway when a node dies in mid-answer: another one goes on, and nobody sees the seam."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import MemoryEngine
from anser.config import GatewaySettings, MemberSettings
from anser.core.errors import EngineBroken, EngineRefused
from anser.core.fairness import price
from anser.core.fleet import EngineKind, EngineReport
from anser.core.ledger import Outcome, Receipt, Usage
from anser.ports import Call, Route
from anser.services.chunks import Piece
from anser.services.members import OWNER
from tests.pool import Pool, demand, open_pool
from tests.simulation import virtual

pytestmark = pytest.mark.anyio

TEXT = "Wildgänse fliegen weit 🪿: 因为轮流领头。 END of it, and more."


class Copyist(MemoryEngine):
    """Writes `TEXT`, from wherever the assistant's turn has come to; dies after some chunks.

    It counts a chunk as a token, holds back what may be a stop string unless it is careless, and
    reports the prompt as so many tokens as it has characters.
    """

    def __init__(
        self,
        *,
        dies_after: Callable[[], int | None] = lambda: None,
        careless: bool = False,
        kind: EngineKind = EngineKind.LLAMACPP,
        sizes: Callable[[], int] = lambda: 3,
        slots: int = 4,
        pause_s: Callable[[Call], float] = lambda _: 0.0,
    ) -> None:
        super().__init__(slots=slots)
        self.pause_s = pause_s
        self.dies_after, self.careless, self.kind = dies_after, careless, kind
        self.sizes = sizes
        self.calls: list[Call] = []

    async def inspect(self) -> EngineReport:
        """What it serves, as an engine of its kind."""
        return replace(await super().inspect(), kind=self.kind)

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer."""
        self.calls.append(call)
        yield self._write(call, self.dies_after())

    async def _write(self, call: Call, left: int | None) -> AsyncGenerator[bytes]:
        body: Any = call.body
        prompt = _begun(call)
        at, written, stops = len(prompt), 0, body.get("stop") or []
        await asyncio.sleep(0.001)
        if call.route is Route.CHAT:
            yield _chunk(call, "", role=True)
        finish = "stop"
        while at < len(TEXT):
            if written == left:
                raise EngineBroken("It died.")
            if written == body["max_tokens"]:
                finish = "length"
                break
            end = at + self.sizes()
            text = TEXT[at:end]
            found = [TEXT.find(stop, len(prompt)) for stop in stops]
            first = min((each for each in found if each >= 0), default=len(TEXT))
            whole = first if not self.careless else first + max(map(len, stops), default=0) - 1
            if first < len(TEXT) and end > whole:
                if TEXT[at:first]:
                    yield _chunk(call, TEXT[at:first])
                    written += 1
                break
            yield _chunk(call, text)
            await asyncio.sleep(self.pause_s(call))
            at, written = end, written + 1
        yield _chunk(call, "", finish=finish)
        usage = {"prompt_tokens": 4 + len(prompt) // 3, "completion_tokens": written}
        yield json.dumps({"choices": [], "usage": usage}).encode()


def _begun(call: Call) -> str:
    body: Any = call.body
    if call.route is Route.COMPLETIONS:
        return str(body["prompt"]).removeprefix("q")
    last = body["messages"][-1]
    return last["content"] if last["role"] == "assistant" else ""


def _chunk(call: Call, text: str, *, role: bool = False, finish: str | None = None) -> bytes:
    choice: dict[str, object] = {"index": 0, "finish_reason": finish}
    if call.route is Route.CHAT:
        choice["delta"] = {"content": text} | ({"role": "assistant"} if role else {})
    else:
        choice["text"] = text
    return json.dumps({"choices": [choice]}).encode()


def once(after: int) -> Callable[[], int | None]:
    """Dies after so many chunks of its first answer, and never again."""
    deaths = [after]
    return lambda: deaths.pop() if deaths else None


def asked(**more: object) -> Any:
    """A question whose answer is `TEXT`."""
    body = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 500, **more}
    return demand(body=body, output_tokens_max=500)


async def read(pool: Pool, wanted: Any, into: list[Piece] | None = None) -> tuple[str, list[Piece]]:
    """The text that a client reads, and its pieces."""
    pieces = [] if into is None else into
    async with pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
    return "".join(piece.text for piece in pieces), pieces


async def told(pool: Pool) -> Receipt:
    """The only receipt."""
    [receipt] = await pool.receipts()
    assert receipt.usage.completion_tokens == sum(
        lease.completion_tokens for lease in receipt.leases
    )
    return receipt


def keys_paid(pool: Pool) -> int:
    """What all accounts have been charged, in micro-credits."""
    return pool.gateway.scheduler.service


# One story


async def test_an_answer_survives_its_node() -> None:
    """The client reads one answer with one role, finish and usage; the receipt shows two leases."""
    engines = {"a": Copyist(dies_after=once(5)), "b": Copyist(dies_after=lambda: None)}
    async with open_pool({**engines}) as pool:
        text, pieces = await read(pool, asked())
        assert text == TEXT
        roles = [b'"role"' in piece.data for piece in pieces]
        assert roles == [True, *[False] * (len(pieces) - 1)]
        assert [piece.finish for piece in pieces if piece.finish] == ["stop"]
        receipt = await told(pool)
        assert receipt.outcome is Outcome.FINISHED
        first, second = receipt.leases
        assert (first.error, first.completion_tokens) == ("engine_broken", 5)
        assert (second.error, second.node != first.node) == (None, True)
        assert receipt.usage.completion_tokens == -(-len(TEXT) // 3)
        assert receipt.usage.prompt_tokens == 4, "what was said is no part of the prompt"
        assert pool.gateway.stats.continued == 1
        trail = pool.gateway.whys.find("r")
        assert trail is not None
        assert [step.delivered_tokens for step in trail.steps] == [5, 0]
        paid = keys_paid(pool)
    async with open_pool({"a": Copyist()}) as pool:
        await read(pool, asked())
        assert keys_paid(pool) == paid, "the prompt is paid once, and each token"


@pytest.mark.parametrize("seed", range(200))
async def test_no_character_is_lost_or_twice(seed: int) -> None:
    """Whatever the chunks, the deaths, the route and the stop strings: the text is the same."""
    draw = random.Random(seed)
    deaths = [draw.randint(0, 12), draw.randint(0, 12)]
    stops = draw.choice([[], ["END"], ["🪿"], ["头。 E", "zzz"]])
    careless = draw.random() < 0.3

    def dies() -> int | None:
        return deaths.pop() if deaths else None

    sizes = random.Random(seed)
    engines = {
        name: Copyist(dies_after=dies, careless=careless, sizes=lambda: sizes.randint(1, 4))
        for name in "ab"
    }
    wanted = asked(stop=stops)
    if draw.random() < 0.4:
        body = {"prompt": "q", "max_tokens": 500, "stop": stops}
        wanted = replace(wanted, route=Route.COMPLETIONS, body=body)
    async with open_pool({**engines}) as pool:
        text, _ = await read(pool, wanted)
        await told(pool)
    first = min((TEXT.find(stop) for stop in stops if stop in TEXT), default=len(TEXT))
    slack = max(map(len, stops), default=1) - 1 if careless else 0
    assert TEXT.startswith(text)
    assert first <= len(text) <= first + slack


async def test_a_stop_string_across_the_seam_ends_the_answer() -> None:
    """Its beginning was sent by a careless engine that died; the next one does not know of it."""
    at = TEXT.index("END") // 3 + 1  # chunks until its first letters are out
    assert TEXT[: 3 * at].endswith("EN")
    engines = {"a": Copyist(dies_after=once(at), careless=True), "b": Copyist()}
    async with open_pool({**engines}) as pool:
        text, pieces = await read(pool, asked(stop=["END"]))
        assert text == TEXT[: 3 * at]
        assert [piece.finish for piece in pieces if piece.finish] == ["stop"]
        receipt = await told(pool)
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FINISHED, at)


async def test_the_rest_keeps_to_the_longest_answer() -> None:
    """What was said counts, and so does an end that only the dead node's finish was missing to."""
    for dies_after in (5, 8):
        async with open_pool({"a": Copyist(dies_after=once(dies_after))}) as pool:
            wanted = replace(asked(max_tokens=8), output_tokens_max=8)
            text, pieces = await read(pool, wanted)
            assert text == TEXT[:24]
            assert pieces[-1].finish == "length" or pieces[-2].finish == "length"
            receipt = await told(pool)
            assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FINISHED, 8)
            assert len(receipt.leases) == (2 if dies_after == 5 else 1)


async def test_limits_count_both_leases() -> None:
    """A member's daily tokens are charged with the whole answer, whoever wrote it."""
    settings = MemberSettings(tokens_per_day=10_000)
    left: list[int] = []
    for engine in (Copyist(), Copyist(dies_after=once(5))):
        async with open_pool({"a": engine}, member_settings=settings) as pool:
            await read(pool, asked())
            left.append(int(pool.members.limits_left(OWNER)["x-ratelimit-remaining-tokens"]))
    assert left[0] == pytest.approx(left[1], abs=1)


# Where nobody goes on


async def test_an_answer_ends_where_its_tries_end() -> None:
    """After as many nodes as a request may have, the error is told; what was said is charged."""
    async with open_pool({name: Copyist(dies_after=lambda: 2) for name in "abcd"}) as pool:
        got: list[Piece] = []
        with pytest.raises(EngineBroken):
            await read(pool, asked(), into=got)
        assert "".join(piece.text for piece in got) == TEXT[:18]
        receipt = await told(pool)
        assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FAILED, 6)
        assert len(receipt.leases) == 3


async def test_an_engine_that_cannot_go_on_is_passed_over() -> None:
    """It is not its fault, and one that can has the rest; where all cannot, that is told."""

    class Stubborn(Copyist):
        """Takes no turn of the assistant's as the last one."""

        async def _write(self, call: Call, left: int | None) -> AsyncGenerator[bytes]:
            if _begun(call):
                raise EngineRefused("The last message must be the user's.")
            async for chunk in super()._write(call, left):
                yield chunk

    for refusing in (Copyist(kind=EngineKind.OPENAI), Stubborn()):
        engines = {"a": Copyist(dies_after=once(4)), "b": refusing}
        async with open_pool({**engines}) as pool:
            text, _ = await read(pool, asked())
            assert text == TEXT
            receipt = await told(pool)
            assert [lease.node for lease in receipt.leases][:1] in (["a"], ["b"])


async def test_half_a_tool_call_is_told_honestly() -> None:
    """What cannot be gone on with ends in its node's error, as it was said."""
    engines = {"a": Copyist(dies_after=once(4)), "b": Copyist()}
    async with open_pool({**engines}) as pool:
        with pytest.raises(EngineBroken, match="It died"):
            await read(pool, asked(tools=[{}]))
        receipt = await told(pool)
        assert (receipt.outcome, len(receipt.leases)) == (Outcome.FAILED, 1)


async def test_each_lease_pays_its_own_part_only() -> None:
    """Also where the second node dies in something that nobody can go on with."""

    class Calling(Copyist):
        """Goes on with a tool call, and dies."""

        async def _write(self, call: Call, left: int | None) -> AsyncGenerator[bytes]:
            if _begun(call):
                calls = [{"index": 0, "function": {"name": "f", "arguments": "{"}}]
                choice = {"index": 0, "delta": {"tool_calls": calls}, "finish_reason": None}
                yield json.dumps({"choices": [choice]}).encode()
                raise EngineBroken("It died too.")
            async for chunk in super()._write(call, left):
                yield chunk

    async with open_pool({"a": Calling(dies_after=once(4))}) as pool:
        with pytest.raises(EngineBroken, match="too"):
            await read(pool, asked())
        receipt = await told(pool)
        assert receipt.usage == Usage(prompt_tokens=4, completion_tokens=5)
        assert keys_paid(pool) == price(fresh=4, output=5, factor_milli=1_000)


async def test_a_request_of_ones_own_fault_is_not_gone_on_with() -> None:
    """What an engine refuses in mid-stream, another would refuse as well."""

    class Refusing(Copyist):
        async def _write(self, call: Call, left: int | None) -> AsyncGenerator[bytes]:
            del left
            yield _chunk(call, "a", role=True)
            raise EngineRefused("The context is full.")

    async with open_pool({"a": Refusing(), "b": Refusing()}) as pool:
        with pytest.raises(EngineRefused):
            await read(pool, asked())
        assert len((await told(pool)).leases) == 1


# While it waits for another node


async def test_who_leaves_at_the_seam_pays_for_what_was_said() -> None:
    """Its slot is free, and its receipt says cancelled, with what was delivered."""

    class Stuck(Copyist):
        """Reads the rest's prompt for ever."""

        async def _write(self, call: Call, left: int | None) -> AsyncGenerator[bytes]:
            if _begun(call):
                await asyncio.sleep(60)
            async for chunk in super()._write(call, left):
                yield chunk

    async with open_pool({"a": Stuck(dies_after=once(4))}) as pool:
        task = asyncio.ensure_future(read(pool, asked()))
        async with asyncio.timeout(5):
            while not pool.gateway.stats.retries:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [receipt] = await pool.receipts()
        assert receipt.outcome is Outcome.CANCELLED
        assert (receipt.usage.prompt_tokens, receipt.usage.completion_tokens) == (4, 4)
        assert pool.gateway.scheduler.running == pool.gateway.scheduler.queued == 0


def in_virtual_time(main: Callable[[MemoryClock], Coroutine[Any, Any, None]]) -> None:
    """Run on a clock that jumps from timer to timer."""
    clock = MemoryClock()
    virtual.run(lambda: main(clock), clock=clock, jumped=lambda: None)


def test_a_deadline_is_for_the_first_token() -> None:
    """A request that has had it in time is gone on with after its deadline."""

    async def main(clock: MemoryClock) -> None:
        engines = {"a": Copyist(dies_after=once(9)), "b": Copyist()}
        async with open_pool({**engines}, clock=clock) as pool:
            assert await slowly(pool, replace(asked(), deadline=clock.now() + 0.3)) == TEXT

    in_virtual_time(main)


def test_patience_begins_anew_at_the_seam() -> None:
    """However long an answer has taken, its rest may wait as long as any request."""

    async def main(clock: MemoryClock) -> None:
        settings, dies = GatewaySettings(queue_timeout_s=0.8), once(9)
        engines = {name: Copyist(dies_after=dies, slots=1, pause_s=_busy_s) for name in "ab"}
        async with open_pool({**engines}, settings=settings, clock=clock) as pool:
            ours = asyncio.ensure_future(slowly(pool, asked()))
            await asyncio.sleep(0.05)
            other = asyncio.ensure_future(read(pool, replace(asked(), id="busy")))  # about 1.1 s
            assert await ours == TEXT
            await other

    in_virtual_time(main)


def _busy_s(call: Call) -> float:
    return 0.05 if call.lease.startswith("busy") else 0.0


async def slowly(pool: Pool, wanted: Any) -> str:
    """What a client reads that stops in the middle for half a second."""
    pieces: list[Piece] = []
    async with pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
            if len(pieces) == 5:
                await asyncio.sleep(0.5)
    return "".join(piece.text for piece in pieces)
