"""The gateway over engines that lie, break off or never end, each behind a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from anser.adapters.engine_http import HttpEngine
from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.config import EngineSettings, GatewaySettings
from anser.core.errors import EngineBroken, EngineDeclined, EngineStalled, NoNode, SourceError
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.ledger import Outcome
from anser.services.chunks import Piece
from tests.hostile import SSE_HEAD, Hostile, Script, Talk, answer, delta, event, stream
from tests.pool import Pool, demand, open_pool

pytestmark = pytest.mark.anyio

MODELS = json.dumps({"data": [{"id": "memory", "owned_by": "vllm"}]}).encode()
DONE = event(b"[DONE]") + b"0\r\n\r\n"


@asynccontextmanager
async def pool_over(
    *scripts: bytes | Script | None, settings: GatewaySettings | None = None, slots: int = 4
) -> AsyncGenerator[tuple[Pool, list[Hostile]]]:
    """A pool of listed nodes; each answers chats as scripted, `None` with words for ever."""
    hostiles = [Hostile(_script(each)) for each in scripts]
    for hostile in hostiles:
        await hostile.__aenter__()
    nodes = {
        f"n{number}": Node(id=f"n{number}", url=hostile.url, model="memory", slots=slots - number)
        for number, hostile in enumerate(hostiles)
    }
    engines = {name: HttpEngine(node) for name, node in nodes.items()}
    try:
        async with open_pool({}, more={**engines}, settings=settings) as pool:
            for node in nodes.values():
                await pool.fleet.add(node)
            yield pool, hostiles
            await pool.fleet.aclose()
    finally:
        for hostile in hostiles:
            await hostile.__aexit__(None, None, None)


def _script(chat: bytes | Script | None) -> Script:
    async def script(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            if seen.method == "GET":
                known = seen.path.endswith("/models")
                await talk.say(answer(MODELS) if known else answer(b"", status="404 Not Found"))
            elif isinstance(chat, bytes):
                await talk.say(chat)
                return
            elif chat is not None:
                await chat(talk)
            else:
                await talk.say(SSE_HEAD)
                while True:
                    await talk.say(delta("word "))

    return script


async def read(pool: Pool, name: str = "r") -> tuple[list[Piece], Exception | None]:
    pieces: list[Piece] = []
    try:
        async with pool.gateway.answer(demand(name)) as reply:
            async for piece in reply:
                pieces += [piece]
    except (EngineBroken, EngineStalled) as error:
        return pieces, error
    return pieces, None


async def test_an_endless_answer_is_cut_at_its_length_and_its_node_is_blamed() -> None:
    """Past max_tokens the stream is cut with finish_reason length, and the engine is hung up on."""
    async with pool_over(None) as (pool, [hostile]):
        for number in range(8):
            pieces, error = await read(pool, str(number))
            if error is not None:
                break
            assert pieces[-1].finish == "length"
            assert len(pieces) <= 8
            if pool.fleet.status("n0").state is NodeState.SUSPECT:
                break
        assert pool.fleet.status("n0").state is NodeState.SUSPECT
        await asyncio.wait_for(hostile.hung_up.wait(), 5)
        for receipt in await pool.receipts():
            assert receipt.outcome is Outcome.FINISHED
            assert receipt.usage.completion_tokens <= 7


@pytest.mark.parametrize("claimed", [0, 10**12, 400])
async def test_false_usage_is_replaced_by_the_gateways_own_count(claimed: int) -> None:
    """A node that claims more than its text can be, or nothing, is counted by the gateway."""
    texts = b"".join(delta("word ") for _ in range(5))
    lying = SSE_HEAD + texts + delta(finish="stop") + delta(usage=claimed) + DONE
    async with pool_over(lying) as (pool, _):
        pieces, error = await read(pool)
        assert error is None
        [receipt] = await pool.receipts()
        assert receipt.usage.completion_tokens == 5
        assert pieces[-1].usage == receipt.usage


async def test_a_stream_that_ends_without_a_finish_is_not_an_end() -> None:
    """[DONE] without a finish_reason is the node's failure, told in mid-stream."""
    cut = SSE_HEAD + delta("half an ans") + DONE
    async with pool_over(cut, settings=GatewaySettings(continue_answers=False)) as (pool, _):
        pieces, error = await read(pool)
        assert [json.loads(piece.data)["choices"][0]["delta"] for piece in pieces] == [
            {"content": "half an ans"}
        ]
        assert isinstance(error, EngineBroken)
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, "engine_broken")
        assert receipt.usage.completion_tokens == 1


@pytest.mark.parametrize(
    "first",
    [
        SSE_HEAD + DONE,  # nothing at all
        SSE_HEAD + event(b"[1,2]") + DONE,
        SSE_HEAD + event(b'{"choices": 7}') + DONE,  # an object, but not OpenAI's
        SSE_HEAD + delta(),  # a role, and then it dies
        SSE_HEAD + b"".join(delta() for _ in range(70)) + DONE,  # words without a token
        SSE_HEAD[:20],
        answer(b"{}", status="500 Internal Server Error"),
        answer(b"{}", status="302 Found"),
        answer(b"busy", status="503 Service Unavailable"),
        answer(b"{}", status="429 Too Many Requests"),
        answer(b"{}", status="404 Not Found"),
        b"\x00\x01\x02",
    ],
)
async def test_a_node_that_breaks_before_its_first_token_is_replaced(first: bytes) -> None:
    """Whatever it breaks with, the client sees the other node's answer and nothing else."""
    async with pool_over(first, stream("all ", "well")) as (pool, _):
        pieces, error = await read(pool)
        assert error is None
        said = [json.loads(piece.data)["choices"] for piece in pieces]
        assert said[0][0]["delta"]["content"] == "all "
        [receipt] = await pool.receipts()
        assert [lease.node for lease in receipt.leases] == ["n0", "n1"]


async def test_a_node_that_declines_is_set_aside() -> None:
    """No breaker opens, but it is seen as trouble, and nobody waits longer than it is worth."""
    busy = answer(b"{}", status="429 Too Many Requests\r\nRetry-After: 60")
    async with pool_over(busy) as (pool, _):
        with pytest.raises(EngineDeclined, match="busy"):
            async with pool.gateway.answer(demand("first")):
                pass
        status = pool.fleet.status("n0")
        assert (status.state, status.usable) == (NodeState.SUSPECT, 0)
        assert status.error == "The engine is busy (429)."
        with pytest.raises(NoNode, match="busy") as caught:
            async with pool.gateway.answer(demand("second")):
                pass
        assert caught.value.retry_after_s is not None
        assert 50 < caught.value.retry_after_s <= 60


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "429 Too Many Requests"])
async def test_nodes_that_decline_do_not_draw_the_traffic(status: str) -> None:
    """Whoever declines fastest has the most free slots: it must not be asked again and again."""
    declines = answer(b"{}", status=status)
    async with pool_over(declines, declines, stream("well")) as (pool, hostiles):
        for number in range(10):
            pieces, error = await read(pool, str(number))
            assert pieces
            assert error is None
        asked = [sum(seen.method == "POST" for seen in each.seen) for each in hostiles]
        assert asked == [1, 1, 10]


async def test_who_waits_for_a_model_that_does_not_load_is_told() -> None:
    """The last node that could have served goes down: its error is the answer, and at once."""
    engine = LlamaCppEngine("memory", EngineSettings())
    async with open_pool({}) as pool:
        pool.fleet.attach(Node(id="own", url="builtin:", model="memory", slots=1), engine)
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(_refused(pool))
            while not pool.gateway.snapshot().queued:
                await asyncio.sleep(0.01)
            await engine.fail(SourceError("There is no network."))
        assert "There is no network." in waiting.result()
        [receipt] = await pool.receipts()
        assert (receipt.outcome, receipt.error) == (Outcome.FAILED, NoNode.code)
        assert pool.gateway.snapshot().queued == 0
    await engine.aclose()


async def _refused(pool: Pool) -> str:
    with pytest.raises(NoNode) as caught:
        async with pool.gateway.answer(demand()):
            pass
    return caught.value.message
