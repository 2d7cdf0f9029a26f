"""An answer of real engines that survives its node: two llama.cpp servers, and a third to compare.

`ANSER_SEAM_KILLS` sets how many answers are cut (3).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from anser.adapters.engine_http import HttpEngine
from anser.core.fleet import Node
from anser.core.ledger import Outcome
from anser.ports import Call, Route
from anser.services.chunks import Piece, Tally
from tests.cutter import Cutter, cutter
from tests.llama_server import LlamaServer, llama_server
from tests.pool import Pool, demand, open_pool

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

KILLS = int(os.environ.get("ANSER_SEAM_KILLS", "3"))
TOKENS = 40


@dataclass(frozen=True, slots=True)
class Stage:
    """A platform over a node that can be cut and one that is well; `control` is no node of it."""

    pool: Pool
    door: Cutter
    control: HttpEngine


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that the engines are loaded once."""
    return "asyncio"


@pytest.fixture(scope="module")
async def servers() -> AsyncGenerator[list[LlamaServer]]:
    """Three servers with the same model."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        yield [await enter(llama_server(alias="memory", slots=1)) for _ in range(3)]


@pytest.fixture
async def stage(servers: list[LlamaServer]) -> AsyncGenerator[Stage]:
    """A platform of its own for each test: a node that was cut is not asked for a while."""
    async with AsyncExitStack() as stack:
        door = await stack.enter_async_context(cutter(servers[0].url))
        nodes = [Node(id="a", url=door.url, slots=2), Node(id="b", url=servers[1].url, slots=1)]
        engines = {node.id: HttpEngine(node) for node in nodes}
        control = HttpEngine(Node(id="c", url=servers[2].url))
        pool = await stack.enter_async_context(open_pool({}, more={**engines}))
        for node in nodes:
            await pool.fleet.add(node)
        yield Stage(pool, door, control)
        await pool.fleet.aclose()
        await control.aclose()


def question(route: Route, number: int, **more: object) -> dict[str, Any]:
    """A body that is answered greedily; its beginning is nobody else's."""
    text = f"{number}: what do the wild geese number {number} see? 用一句话，带表情符号 🪿。"
    asked = {"messages": [{"role": "user", "content": text}]}
    common = {"max_tokens": TOKENS, "temperature": 0, **more}
    return (asked if route is Route.CHAT else {"prompt": f"{text} They see"}) | common


async def ask(pool: Pool, route: Route, name: int, body: dict[str, Any]) -> list[Piece]:
    """The pieces of an answer."""
    wanted = demand(f"r{name}", route=route, body=body, output_tokens_max=TOKENS)
    async with pool.gateway.answer(wanted) as answer:
        return [piece async for piece in answer]


async def rest(stage: Stage, route: Route, body: dict[str, Any], begun: str, tokens: int) -> str:
    """What an unharmed node says after this beginning."""
    body = {**body, "model": "memory", "max_tokens": TOKENS - tokens, "stream": True}
    if route is Route.CHAT:
        body["messages"] = [*body["messages"], {"role": "assistant", "content": begun}]
    else:
        body["prompt"] += begun
    tally, text = Tally(1, 1), ""
    async with stage.control.generate(Call(lease="c", route=route, body=body)) as chunks:
        async for chunk in chunks:
            text += tally.read(chunk)[0].text
    return text


def text_of(pieces: list[Piece], tokens: int | None = None) -> str:
    """The text of so many pieces that have any."""
    return "".join([piece.text for piece in pieces if piece.text][:tokens])


@pytest.mark.parametrize("number", range(KILLS))
async def test_the_rest_is_what_an_unharmed_node_says(stage: Stage, number: int) -> None:
    """Cut at any byte: what was said, and then to the letter what another says after that."""
    draw = random.Random(number)
    route = draw.choice([Route.CHAT, Route.CHAT, Route.COMPLETIONS])
    body = question(route, number)
    event, tokens, leases = draw.randint(2, TOKENS), 0, 0
    pieces: list[Piece] = []
    while leases < 2:  # or this answer has fewer events
        stage.door.event = event
        pieces = await ask(stage.pool, route, event, body)
        receipts = await stage.pool.receipts()
        [receipt] = [one for one in receipts if one.request == f"r{event}"]
        assert receipt.outcome is Outcome.FINISHED
        tokens, leases = receipt.leases[0].completion_tokens, len(receipt.leases)
        event = max(2, event // 2)
    begun = text_of(pieces, tokens)
    assert "\ufffd" not in text_of(pieces)
    assert text_of(pieces) == begun + await rest(stage, route, body, begun, tokens)


async def test_a_killed_engine_is_survived(stage: Stage, servers: list[LlamaServer]) -> None:
    """SIGKILL in mid-answer: the client reads on, with one finish, and the receipt tells both."""
    body = question(Route.CHAT, 1_000)
    wanted = demand("killed", route=Route.CHAT, body=body, output_tokens_max=TOKENS)
    pieces: list[Piece] = []
    async with asyncio.timeout(60), stage.pool.gateway.answer(wanted) as answer:
        async for piece in answer:
            pieces.append(piece)
            if len(text_of(pieces)) > 8:
                servers[0].kill()
    assert [piece.finish for piece in pieces if piece.finish]
    [receipt] = await stage.pool.receipts()
    assert [lease.node for lease in receipt.leases] == ["a", "b"]
    assert receipt.outcome is Outcome.FINISHED
