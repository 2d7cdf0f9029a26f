"""Nodes that are added to a fleet: asked, stored, or refused."""

from __future__ import annotations

import asyncio
import json

import pytest

from anser.adapters.clock import SystemClock
from anser.adapters.engine_http import HttpEngine
from anser.adapters.memory import MemoryStore
from anser.core.errors import (
    Conflict,
    InvalidField,
    StoreFull,
)
from anser.core.events import NodeChanged
from anser.core.fleet import EngineKind, Node
from anser.core.health import NodeState
from anser.core.limits import NODE_MODELS_MAX
from anser.services.entry import NodeStatus
from anser.services.fleet import Fleet
from tests.hostile import Hostile, Talk, answer
from tests.integration.test_fleet import SETTINGS, Listing, fleet_of

pytestmark = pytest.mark.anyio


async def test_adding_a_node_asks_it_and_stores_it() -> None:
    """What was found is reported at once, and the node's offers can be used from then on."""
    store = MemoryStore()
    async with Hostile(Listing(("a", "b"))) as hostile, fleet_of(store) as (fleet, watcher):
        status = await fleet.add(Node(id="", url=f"{hostile.url}/v1", jurisdiction="de"))
        id_ = f"127.0.0.1:{hostile.port}"
        assert (status.node.id, status.state, status.error) == (id_, NodeState.UP, None)
        assert (status.kind, status.slots, status.usable) == (EngineKind.LMDEPLOY, 32, 32)
        assert status.latency_s is not None
        assert [offer.model for offer in status.offers] == ["a", "b"]
        assert fleet.statuses() == [status]
        assert set(fleet.models()) == {"a", "b"}
        assert fleet.offer(id_, "a").jurisdiction == "DE"
        assert isinstance(fleet.engine(id_), HttpEngine)
        assert watcher.told == [
            NodeChanged(node=id_, slots=32, models=frozenset({"a", "b"})),
        ]
        assert await store.nodes() == [status.node]
        assert repr(fleet) == "<Fleet up=1>"


async def test_a_list_that_is_cut_is_told() -> None:
    """More models than are offered: the node says so, though it is up."""
    names = tuple(f"m{number}" for number in range(NODE_MODELS_MAX + 1))
    async with Hostile(Listing(names)) as hostile, fleet_of() as (fleet, _):
        status = await fleet.add(Node(id="n", url=hostile.url))
        assert (status.state, len(status.offers)) == (NodeState.UP, NODE_MODELS_MAX)
        assert status.error == "It has 257 models, of which 256 are offered; name one of them."


async def test_a_node_that_declines_to_list_its_models_stays_up() -> None:
    """It was heard before, and lives: its rate or its key is no reason to call it down."""
    listing = Listing()
    async with Hostile(listing) as hostile, fleet_of() as (fleet, _):
        await fleet.add(Node(id="n", url=hostile.url))
        listing.status, before = 429, listing.asked
        async with asyncio.timeout(10):
            while listing.asked < before + 4:
                await asyncio.sleep(0.01)
        status = fleet.status("n")
        assert (status.state, status.error) == (NodeState.UP, "The engine is busy (429).")
        assert status.usable


async def test_a_platform_is_not_its_own_node() -> None:
    """What shows this platform's own signing key is this platform: it would ask itself for ever."""
    key = "ab" * 32

    async def itself(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            told = {"public_key": key} if seen.path.endswith("key") else {"data": [{"id": "m"}]}
            await talk.say(answer(json.dumps(told).encode()))

    async with Hostile(itself) as hostile:
        for own, refused in ((key, True), ("cd" * 32, False)):
            fleet = Fleet(MemoryStore(), SystemClock(), SETTINGS, HttpEngine, own_key=own)
            if refused:
                with pytest.raises(InvalidField, match="this platform itself"):
                    await fleet.add(Node(id="n", url=hostile.url))
            else:
                await fleet.add(Node(id="n", url=hostile.url))
            assert len(fleet.statuses()) == (not refused)
            await fleet.aclose()


async def test_a_node_that_does_not_answer_is_listed_as_down() -> None:
    """It is added with the reason, its promised model exists, and it comes up by itself."""
    listing = Listing(("x.gguf",), status=503)
    async with Hostile(listing) as hostile, fleet_of() as (fleet, watcher):
        node = Node(id="n", url=hostile.url, model="mine", slots=3)
        status = await fleet.add(node)
        assert (status.state, status.usable) == (NodeState.DOWN, 0)
        assert status.error is not None
        assert "busy (503)" in status.error
        assert [offer.engine_model for offer in fleet.models()["mine"]] == ["mine"]
        assert watcher.told == [NodeChanged(node="n", slots=0, models=frozenset({"mine"}))]
        listing.status = 200
        await watcher.until("n", 3)
        assert fleet.status("n").error is None
        assert [offer.engine_model for offer in fleet.models()["mine"]] == ["x.gguf"]


async def test_a_node_that_serves_no_such_model() -> None:
    """A wrong --model is shown with what there is instead."""
    names = ("a", "b", "c", "d", "e", "f", "g")
    async with Hostile(Listing(names)) as hostile, fleet_of() as (fleet, _):
        status = await fleet.add(Node(id="n", url=hostile.url, model="x"))
        assert (status.state, status.offers) == (NodeState.UP, ())
        assert status.error == "It serves no model x; it has a, b, c, d, e and 2 more."
    async with Hostile(Listing(())) as hostile, fleet_of() as (fleet, _):
        status = await fleet.add(Node(id="n", url=hostile.url))
        assert status.error == "It serves no model."


async def test_a_web_server_is_no_node() -> None:
    """What answers HTTP but is no engine is listed, down, with unknown slots, and told why."""

    async def files(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(answer(b"<h1>Not found</h1>", status="404 File not found"))

    async with Hostile(files) as server, fleet_of() as (fleet, watcher):
        status = await fleet.add(Node(id="files", url=server.url))
        assert (status.state, status.slots, status.usable) == (NodeState.DOWN, None, 0)
        assert status.error is not None
        assert "no OpenAI-compatible engine" in status.error
        assert watcher.slots("files") == 0


@pytest.mark.parametrize(
    ("node", "error", "param"),
    [
        (Node(id="n", url="http://user:pw@127.0.0.1"), InvalidField, "url"),
        (Node(id="n", url="http://127.0.0.1#x"), InvalidField, "url"),
        (Node(id="N", url="http://127.0.0.1:1"), InvalidField, "id"),
        (Node(id="n", url="http://127.0.0.1:1", slots=0), InvalidField, "slots"),
        (Node(id="n", url="http://127.0.0.1:1", key_file="/none"), InvalidField, "key_file"),
        (Node(id="taken", url="http://127.0.0.1:2"), Conflict, "id"),
        (Node(id="n", url="http://127.0.0.1:9/v1/"), Conflict, "url"),
    ],
)
async def test_nodes_that_are_not_added(node: Node, error: type[Exception], param: str) -> None:
    """A wrong field, an id or an engine that is listed already: refused, and nothing is kept."""
    store = MemoryStore()
    async with fleet_of(store, run=False) as (fleet, watcher):
        taken = await fleet.add(Node(id="taken", url="http://127.0.0.1:9"))
        with pytest.raises(error) as caught:
            await fleet.add(node)
        assert getattr(caught.value, "param", None) == param
        assert fleet.statuses() == [taken]
        assert await store.nodes() == [taken.node]
        assert len(watcher.told) == 1


async def test_the_same_node_twice_at_once() -> None:
    """Between the check and the change nobody slips in: one is added, the other refused."""
    async with Hostile(Listing()) as hostile, fleet_of() as (fleet, _):
        nodes = [Node(id="a", url=hostile.url), Node(id="b", url=hostile.url)]
        results = await asyncio.gather(*map(fleet.add, nodes), return_exceptions=True)
        assert {type(result) for result in results} == {NodeStatus, Conflict}
        assert len(fleet.statuses()) == 1


async def test_a_store_that_is_full_adds_nothing() -> None:
    """What cannot be stored is not used either."""
    store = MemoryStore()
    store.fault = StoreFull("The disk is full.")
    async with Hostile(Listing()) as hostile, fleet_of(store) as (fleet, watcher):
        with pytest.raises(StoreFull):
            await fleet.add(Node(id="n", url=hostile.url))
        assert fleet.statuses() == []
        assert watcher.told == []
