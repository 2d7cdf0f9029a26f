"""The fleet with real adapters: nodes listed, asked, watched, drained and removed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from anser.adapters.clock import SystemClock
from anser.adapters.engine_http import HttpEngine
from anser.adapters.memory import MemoryStore
from anser.config import GatewaySettings
from anser.core.errors import (
    Conflict,
    EngineBroken,
    EngineRefused,
    EngineUnreachable,
    NoNode,
    NotFound,
    Overloaded,
)
from anser.core.events import NodeChanged, NodeGone
from anser.core.fleet import EngineKind, EngineReport, Node, ServedModel
from anser.core.health import NodeState
from anser.core.limits import NODES_MAX
from anser.ports import Engine
from anser.services.fleet import Fleet
from tests.hostile import Hostile, Talk, answer

pytestmark = pytest.mark.anyio

SETTINGS = GatewaySettings(probe_interval_s=0.05)


@dataclass(slots=True)
class Listing:
    """An engine that only lists its models; `status` 0 is silence."""

    models: tuple[str, ...] = ("m",)
    status: int = 200
    asked: int = 0
    fields: dict[str, object] = field(default_factory=lambda: {"owned_by": "lmdeploy"})

    async def __call__(self, talk: Talk) -> None:
        """Answer on one connection."""
        while True:
            await talk.request()
            self.asked += 1
            if not self.status:
                await talk.gone()
                return
            data = [{"id": name, **self.fields} for name in self.models]
            body = json.dumps({"data": data}).encode()
            await talk.say(answer(body, status=f"{self.status} X"))


@dataclass(slots=True)
class Watcher:
    """A subscriber, as the gateway is one."""

    told: list[NodeChanged | NodeGone] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, change: NodeChanged | NodeGone) -> None:
        """Note a change."""
        self.told.append(change)
        self.news.set()

    async def until(self, node: str, slots: int) -> None:
        """Wait until a node has so many usable slots."""
        async with asyncio.timeout(10):
            while self.slots(node) != slots:
                self.news.clear()
                await self.news.wait()

    def slots(self, node: str) -> int | None:
        """What was told last of a node's slots."""
        of_node = [change for change in self.told if change.node == node]
        last = of_node[-1] if of_node else None
        return last.slots if isinstance(last, NodeChanged) else None


@asynccontextmanager
async def fleet_of(
    store: MemoryStore | None = None, *, run: bool = True
) -> AsyncGenerator[tuple[Fleet, Watcher]]:
    fleet = Fleet(store or MemoryStore(), SystemClock(), SETTINGS, HttpEngine)
    await fleet.load()
    watcher = Watcher()
    fleet.subscribe(watcher)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run()) if run else None
        try:
            yield fleet, watcher
            fleet.validate()
        finally:
            if running is not None:
                running.cancel()
            await fleet.aclose()
            await fleet.aclose()


async def test_nodes_are_taken_up_again_after_a_restart() -> None:
    """Stored nodes are starting until they have been asked; drained ones stay drained."""
    store = MemoryStore()
    async with Hostile(Listing()) as one, Hostile(Listing(("x",))) as two:
        await store.put_node(Node(id="one", url=one.url, model="m", slots=2))
        await store.put_node(Node(id="two", url=two.url, draining=True))
        async with fleet_of(store, run=False) as (fleet, watcher):
            states = [status.state for status in fleet.statuses()]
            assert states == [NodeState.STARTING, NodeState.DRAINING]
            assert set(fleet.models()) == {"m"}
        async with fleet_of(store) as (fleet, watcher):
            await watcher.until("one", 2)
            assert watcher.slots("two") == 0


async def test_a_node_that_falls_silent_is_down_and_keeps_its_models() -> None:
    """Two unanswered questions take the slots away, not the models; one answer brings all back."""
    listing = Listing()
    async with Hostile(listing) as hostile, fleet_of() as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url, slots=4))
        listing.status = 500
        await watcher.until("n", 0)
        assert fleet.status("n").state is NodeState.DOWN
        assert "status 500" in (fleet.status("n").error or "")
        assert set(fleet.models()) == {"m"}
        listing.status = 200
        await watcher.until("n", 4)


async def test_changed_models_are_noticed() -> None:
    """An engine that has loaded another model offers that one from the next question on."""
    listing = Listing(("old",))
    async with Hostile(listing) as hostile, fleet_of() as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url, slots=1))
        listing.models = ("new",)
        watcher.news.clear()
        async with asyncio.timeout(5):
            await watcher.news.wait()
        assert watcher.told[-1] == NodeChanged(node="n", slots=1, models=frozenset({"new"}))
        assert set(fleet.models()) == {"new"}
        with pytest.raises(NoNode):
            fleet.offer("n", "old")


async def test_nothing_new_is_told_while_nothing_changes() -> None:
    """Subscribers hear of true changes only, however often a node is asked."""
    listing = Listing()
    async with Hostile(listing) as hostile, fleet_of() as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url))
        before = listing.asked
        async with asyncio.timeout(10):
            while listing.asked < before + 4:
                await asyncio.sleep(0.05)
        for _ in range(5):
            fleet.succeeded("n")
        assert len(watcher.told) == 1


async def test_a_late_subscriber_hears_how_things_stand() -> None:
    """Who subscribes later is told of every node at once."""
    async with Hostile(Listing()) as hostile, fleet_of() as (fleet, _):
        await fleet.add(Node(id="n", url=hostile.url, slots=2))
        late = Watcher()
        fleet.subscribe(late)
        assert late.told == [NodeChanged(node="n", slots=2, models=frozenset({"m"}))]


async def test_failed_streams_open_the_breaker_and_time_lets_one_in() -> None:
    """Streams that fail take all slots; after the back-off one comes back; good ones bring all."""
    async with Hostile(Listing()) as hostile, fleet_of() as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url, slots=4))
        for _ in range(3):
            fleet.failed("n", EngineBroken("It broke."))
        status = fleet.status("n")
        assert (status.state, status.usable, status.slots) == (NodeState.SUSPECT, 0, 4)
        assert status.error == "It broke."
        await watcher.until("n", 1)
        for _ in range(3):
            fleet.succeeded("n")
        assert watcher.slots("n") == 4
        assert fleet.status("n").error is None


async def test_the_requests_own_fault_is_never_the_nodes() -> None:
    """A refusal, and what is no engine's error at all, count for nothing."""
    async with Hostile(Listing()) as hostile, fleet_of() as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url, slots=4))
        for _ in range(50):
            fleet.failed("n", EngineRefused("No.", status=422))
            fleet.failed("n", Overloaded("Too much."))
        assert fleet.status("n").state is NodeState.UP
        assert len(watcher.told) == 1


async def test_an_unreachable_node_is_asked_again_soon() -> None:
    """A stream that found nobody there makes the next question come early, but not at once."""
    listing = Listing()
    slow = GatewaySettings(probe_interval_s=600)
    async with Hostile(listing) as hostile, AsyncExitStack() as stack:
        fleet = Fleet(MemoryStore(), SystemClock(), slow, HttpEngine)
        watcher = Watcher()
        fleet.subscribe(watcher)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        running = group.create_task(fleet.run())
        await fleet.add(Node(id="n", url=hostile.url, slots=2))
        listing.status = 500
        asked = listing.asked
        for _ in range(2):
            fleet.failed("n", EngineUnreachable("Nobody there."))
            async with asyncio.timeout(5):
                while listing.asked == asked:
                    await asyncio.sleep(0.05)
            asked = listing.asked
            await asyncio.sleep(0.2)
        await watcher.until("n", 0)
        assert fleet.status("n").state is NodeState.DOWN
        running.cancel()
        await fleet.aclose()


async def test_draining_takes_the_slots_and_is_stored() -> None:
    """A drained node keeps its engine for what runs on it, and gets nothing new."""
    store = MemoryStore()
    async with Hostile(Listing()) as hostile, fleet_of(store) as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url))
        await fleet.drain("n")
        assert (fleet.status("n").state, watcher.slots("n")) == (NodeState.DRAINING, 0)
        assert isinstance(fleet.engine("n"), HttpEngine)
        assert (await store.nodes())[0].draining
        with pytest.raises(NotFound):
            await fleet.drain("x")


async def test_resuming_gives_the_slots_back_and_is_stored() -> None:
    """A resumed node takes requests again, also after a restart."""
    store = MemoryStore()
    async with Hostile(Listing()) as hostile, fleet_of(store) as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url, slots=3))
        for _ in range(2):
            await fleet.drain("n")
            await fleet.resume("n")
            assert (fleet.status("n").state, watcher.slots("n")) == (NodeState.UP, 3)
            assert not (await store.nodes())[0].draining
        with pytest.raises(NotFound):
            await fleet.resume("x")


async def test_removing_forgets_everything() -> None:
    """A removed node is gone from the store, the models and the subscribers, and can come back."""
    store = MemoryStore()
    async with Hostile(Listing()) as hostile, fleet_of(store) as (fleet, watcher):
        await fleet.add(Node(id="n", url=hostile.url))
        engine = fleet.engine("n")
        await fleet.remove("n")
        assert (fleet.statuses(), fleet.models(), await store.nodes()) == ([], {}, [])
        assert watcher.told[-1] == NodeGone(node="n")
        for ask in (fleet.engine, fleet.status):
            with pytest.raises((NoNode, NotFound)):
                ask("n")
        with pytest.raises(NotFound):
            await fleet.remove("n")
        with pytest.raises(EngineUnreachable):
            await engine.inspect()
        fleet.succeeded("n")
        fleet.failed("n", EngineBroken("late"))
        assert (await fleet.add(Node(id="n", url=hostile.url))).state is NodeState.UP


async def test_draining_and_removing_at_once() -> None:
    """Whichever comes first, a removed node is not stored again by the other."""
    for order in (("drain", "remove"), ("remove", "drain")):
        store = MemoryStore()
        async with Hostile(Listing()) as hostile, fleet_of(store) as (fleet, _):
            await fleet.add(Node(id="n", url=hostile.url))
            changes = [getattr(fleet, verb)("n") for verb in order]
            await asyncio.gather(*changes, return_exceptions=True)
            assert (fleet.statuses(), await store.nodes()) == ([], [])


async def test_nodes_at_the_limit_and_one_above() -> None:
    """No more nodes are listed than the limit says."""
    store = MemoryStore()
    for index in range(NODES_MAX - 1):
        await store.put_node(Node(id=f"n{index}", url=f"http://10.0.0.1:{index + 1}"))
    async with Hostile(Listing()) as hostile, fleet_of(store, run=False) as (fleet, _):
        await fleet.add(Node(id="last", url=hostile.url))
        with pytest.raises(Overloaded):
            await fleet.add(Node(id="above", url="http://127.0.0.1:1"))


@dataclass(slots=True)
class Loading:
    """An engine of this process that still loads."""

    ready: bool = False
    closed: bool = False

    async def inspect(self) -> EngineReport:
        """What it serves, once it does."""
        if not self.ready:
            raise EngineUnreachable("The model still loads.")
        model = ServedModel(name="own", context_tokens=4_096)
        return EngineReport(
            kind=EngineKind.LLAMACPP, version="1", models=(model,), slots=4, cache_tokens=9_000
        )

    async def aclose(self) -> None:
        """Release everything."""
        self.closed = True


async def test_the_engine_of_this_process() -> None:
    """While it loads its model exists; then it is up at once; it is neither stored nor removed."""
    store = MemoryStore()
    loading = Loading()
    engine: Engine = loading  # type: ignore[assignment]
    async with fleet_of(store) as (fleet, watcher):
        fleet.attach(Node(id="builtin", url="builtin:", model="own", slots=2), engine)
        await asyncio.sleep(0.5)
        status = fleet.status("builtin")
        assert (status.state, status.usable) == (NodeState.STARTING, 0)
        assert status.error == "The model still loads."
        assert fleet.models()["own"][0].engine is EngineKind.LLAMACPP
        loading.ready = True
        await watcher.until("builtin", 2)
        assert watcher.told[-1].cache_tokens == 9_000
        assert fleet.models()["own"][0].context_tokens == 4_096
        await fleet.drain("builtin")
        assert watcher.slots("builtin") == 0
        with pytest.raises(Conflict):
            await fleet.remove("builtin")
        assert await store.nodes() == []
    assert not loading.closed


async def test_a_model_on_several_nodes_has_several_offers() -> None:
    """Each node that serves a model offers it; one that leaves takes only its own with it."""
    async with Hostile(Listing()) as one, Hostile(Listing()) as two, fleet_of() as (fleet, _):
        await fleet.add(Node(id="one", url=one.url))
        await fleet.add(Node(id="two", url=two.url))
        assert [offer.node for offer in fleet.models()["m"]] == ["one", "two"]
        await fleet.remove("one")
        assert [offer.node for offer in fleet.models()["m"]] == ["two"]


async def test_silent_nodes_do_not_hold_up_others() -> None:
    """Nodes that take a question and never answer delay nobody else's."""
    store = MemoryStore()
    async with Hostile(Listing(status=0)) as mute, Hostile(Listing()) as quick:
        for index in range(10):
            await store.put_node(Node(id=f"mute{index}", url=f"{mute.url}/{index}"))
        await store.put_node(Node(id="quick", url=quick.url, slots=1))
        async with fleet_of(store) as (_, watcher):
            async with asyncio.timeout(5):
                await watcher.until("quick", 1)
