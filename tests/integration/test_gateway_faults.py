"""Nodes that are gone, that hardly speak HTTP, flood, stall, lie or claim too much, each behind a
real socket: what a client of the gateway sees of it, and what the pool makes of the node.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from anser.config import GatewaySettings
from anser.core.errors import EngineRefused, EngineStalled
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.services.chunks import Piece
from anser.services.gateway import Demand
from tests.hostile import SSE_HEAD, Talk, answer, delta, event, stream
from tests.integration.test_gateway_upstream import DONE, pool_over, read
from tests.integration.test_upstream_faults import FLOODS, HARDLY_HTTP
from tests.pool import Pool, demand

pytestmark = pytest.mark.anyio

TRIES_MAX = 8
CROWD = 5  # more than the second node has slots: the first is asked each time
WELL = stream("all ", "well")

Script = Callable[[Talk], Awaitable[None]]


def text_of(pieces: list[Piece]) -> str:
    """What a client reads."""
    chunks = [json.loads(piece.data)["choices"] for piece in pieces]
    return "".join(choices[0]["delta"].get("content", "") for choices in chunks if choices)


async def well_until_marked(pool: Pool) -> None:
    """Ask until the first node is known to be ill; no client sees a thing of it."""
    for number in range(TRIES_MAX):
        crowd = (read(pool, f"{number}-{index}") for index in range(CROWD))
        for pieces, error in await asyncio.gather(*crowd):
            assert (text_of(pieces), error) == ("all well", None)
        if pool.fleet.status("n0").state is not NodeState.UP:
            break
    assert pool.fleet.status("n0").state is not NodeState.UP
    assert pool.fleet.status("n1").state is NodeState.UP
    receipts = await pool.receipts()
    assert all(receipt.outcome is Outcome.FINISHED for receipt in receipts)
    assert {lease.node for receipt in receipts for lease in receipt.leases} == {"n0", "n1"}
    assert all(receipt.leases[-1].node == "n1" for receipt in receipts)


# No connection


async def test_a_node_that_resets_is_replaced_and_marked() -> None:
    """A reset in the place of an answer is never the client's to see."""

    async def resetting(talk: Talk) -> None:
        talk.reset()
        raise ConnectionResetError

    async with pool_over(resetting, WELL) as (pool, _):
        await well_until_marked(pool)


async def test_a_node_that_has_gone_is_replaced_and_marked() -> None:
    """Where nobody listens any more another node answers, and the one that has gone is down."""
    settings = GatewaySettings(probe_interval_s=60)
    async with pool_over(WELL, WELL, settings=settings) as (pool, hostiles):
        await hostiles[0].__aexit__(None, None, None)
        await well_until_marked(pool)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_requests_own_fault_marks_no_node(status: int) -> None:
    """What an engine finds wrong with a request is told at once, and no other node is tried."""
    bad = answer(b'{"error": {"message": "No"}}', status=f"{status} Bad")
    async with pool_over(bad, bad) as (pool, _):
        for number in range(12):
            with pytest.raises(EngineRefused, match="No") as caught:
                async with pool.gateway.answer(demand(str(number))):
                    pass
            assert caught.value.status == status
        states = {pool.fleet.status(name).state for name in ("n0", "n1")}
        receipts = await pool.receipts()
    assert states == {NodeState.UP}
    assert all(len(receipt.leases) == 1 for receipt in receipts)


# What is hardly HTTP, and floods


@pytest.mark.parametrize("parts", HARDLY_HTTP)
async def test_a_node_that_hardly_speaks_http_is_replaced_and_marked(parts: list[bytes]) -> None:
    """Before the first token nothing that a node sends reaches a client, however odd it is."""

    async def odd(talk: Talk) -> None:
        await talk.say(*parts)
        await talk.gone()

    async with pool_over(odd, WELL) as (pool, _):
        await well_until_marked(pool)


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_node_that_floods_is_replaced_and_marked(flood: bytes) -> None:
    """Bytes without end that bring no token are cut off; the next node answers."""

    async def flooding(talk: Talk) -> None:
        await talk.say(SSE_HEAD)
        while True:
            await talk.say(flood)

    async with pool_over(flooding, WELL) as (pool, _):
        await well_until_marked(pool)


# Silence


async def stalling(talk: Talk) -> None:
    """Two words, and then nothing."""
    await talk.say(SSE_HEAD, delta("all "), delta("well"))
    await talk.gone()


async def test_a_stall_is_gone_on_with_elsewhere() -> None:
    """A node that falls silent in mid-answer is hung up on, and another one says the rest."""
    settings = GatewaySettings(token_gap_timeout_s=0.3)
    async with pool_over(stalling, stream(", I think"), settings=settings) as (pool, hostiles):
        pieces, error = await read(pool)
        assert (text_of(pieces), error) == ("all well, I think", None)
        asked = [seen.json for seen in hostiles[1].seen if seen.method == "POST"]
        assert asked[0]["messages"][-1]["content"] == "all well"  # type: ignore[index]
        [receipt] = await pool.receipts()
    assert [lease.node for lease in receipt.leases] == ["n0", "n1"]
    assert receipt.usage.completion_tokens == 3


async def test_a_stall_is_told_where_nobody_can_go_on() -> None:
    """It is an error of its own, in time, and what was said is charged."""
    settings = GatewaySettings(token_gap_timeout_s=0.3, continue_answers=False)
    async with pool_over(stalling, settings=settings) as (pool, _):
        pieces, error = await read(pool)
        assert text_of(pieces) == "all well"
        assert isinstance(error, EngineStalled)
        [receipt] = await pool.receipts()
    assert (receipt.outcome, receipt.usage.completion_tokens) == (Outcome.FAILED, 2)


async def test_silence_before_the_first_token_is_another_nodes_turn() -> None:
    """A node that takes a question and says nothing is given up after its time."""

    async def mute(talk: Talk) -> None:
        await talk.gone()

    settings = GatewaySettings(first_token_timeout_s=0.3)
    async with pool_over(mute, WELL, settings=settings) as (pool, _):
        pieces, error = await read(pool)
        assert (text_of(pieces), error) == ("all well", None)
        [receipt] = await pool.receipts()
    assert [lease.node for lease in receipt.leases] == ["n0", "n1"]


# Lies


@pytest.mark.parametrize(
    "claim",
    [
        b'{"completion_tokens":-5,"prompt_tokens":-5}',
        b'{"completion_tokens":1,"prompt_tokens":4}',
        b'{"completion_tokens":1000000000000,"prompt_tokens":1000000000000}',
        b'{"completion_tokens":9223372036854775808}',
        b'{"completion_tokens":null}',
        b"{}",
        b"null",
    ],
)
async def test_no_claim_makes_an_answer_dearer_than_its_text(claim: bytes) -> None:
    """Usage that is negative, missing or impossible is replaced by the gateway's own count."""
    said = b"".join(delta("word ") for _ in range(5)) + delta(finish="stop")
    lying = SSE_HEAD + said + event(b'{"choices":[],"usage":' + claim + b"}") + DONE
    async with pool_over(lying) as (pool, _):
        pieces, error = await read(pool)
        assert error is None
        [receipt] = await pool.receipts()
    assert 1 <= receipt.usage.completion_tokens <= 5 + 8
    assert 0 <= receipt.usage.prompt_tokens < 5_000
    assert pieces[-1].usage in (None, receipt.usage)


# Slots that are not there


async def test_a_node_that_claims_more_than_it_serves_is_throttled() -> None:
    """Two nodes claim thousands of slots, and one of them serves one at a time: once that shows,
    nearly all requests go to the other, however many free slots are claimed.
    """
    one = asyncio.Semaphore(1)

    async def serving_one(talk: Talk) -> None:
        async with one:
            await asyncio.sleep(0.15)
            await talk.say(WELL)

    async def serving(talk: Talk) -> None:
        await asyncio.sleep(0.05)
        await talk.say(WELL)

    async def wave(name: str, count: int) -> list[str]:
        asked = [demand(f"{name}{number}", prompt_tokens=100) for number in range(count)]
        await asyncio.gather(*(answered(pool, each) for each in asked))
        receipts = await pool.receipts()
        return [r.leases[-1].node for r in receipts if r.request.startswith(name)]

    async with pool_over(serving_one, serving, slots=4_096) as (pool, _):
        first, *later = [await wave(f"{name}-", 10) for name in "abcd"]
    assert "n0" in first
    assert sum(nodes.count("n0") for nodes in later) <= 6


async def answered(pool: Pool, asked: Demand) -> None:
    """Ask, and read it all."""
    async with pool.gateway.answer(asked) as reply:
        assert text_of([piece async for piece in reply]) == "all well"
