"""The nodes of this platform: listed, asked what they serve, and watched.

Theory of operation. Each node has an engine behind the Engine port and a `Health`
(core/fleet.py), which is told two things: whether the engine answers when it is asked what it
serves (`run` asks every few seconds), and how whole streams ended (the gateway says so). Whoever
subscribes hears of a node when its usable slots or its models have truly changed, and when it goes
down, never else; a new subscriber hears at once how things stand.

A node that is listed stays listed, whatever its state: what it serves is remembered while it is
down, so that its models still exist. Adding one asks it first, so that a mistake is seen at once.

Invariants: `models` holds exactly the offers of all nodes; what was told to subscribers is what a
node's health says; no two nodes share an id or a place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import count

from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    Conflict,
    EngineDeclined,
    EngineError,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
    InvalidField,
    NoNode,
    NotFound,
    Overloaded,
)
from anser.core.events import NodeChanged, NodeGone
from anser.core.fleet import (
    EngineKind,
    EngineReport,
    Node,
    Offer,
    check_node,
    offers,
    parse_endpoint,
)
from anser.core.health import (
    Answered,
    Drained,
    Health,
    HealthEvent,
    NodeState,
    Resumed,
    Silent,
    Spared,
    StreamDeclined,
    StreamFailed,
    StreamFinished,
    Ticked,
)
from anser.core.limits import INSPECT_TIMEOUT_S, INSPECTIONS_MAX, NODES_MAX
from anser.ports import Clock, Engine, NodeStore
from anser.services.entry import Entry, NodeStatus, lacking, promised

__all__ = ["Fleet"]

_LOADING_INTERVAL_S = 0.2  # how often an engine of this process is asked while it loads
_SOONEST_S = 1.0  # a failing node is asked again no sooner than this
_SHORT_S = 5.0  # requests wait for a node that is set aside no longer than this


Callback = Callable[[NodeChanged | NodeGone], None]


class Fleet:
    """All nodes of this platform."""

    def __init__(
        self,
        store: NodeStore,
        clock: Clock,
        settings: GatewaySettings,
        engine_for: Callable[[Node], Engine],
        *,
        own_key: str | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._engine_for = engine_for
        self._own_key = own_key
        self._entries: dict[str, Entry] = {}
        self._statuses: dict[str, NodeStatus] = {}
        self._models: dict[str, tuple[Offer, ...]] = {}
        self._adding: dict[str, Node] = {}
        self._callbacks: list[Callback] = []
        self._changing = asyncio.Lock()  # or one change could be stored after another's undoing
        self._wake = asyncio.Event()
        self._looks = asyncio.Semaphore(INSPECTIONS_MAX)
        self._failures = count()

    def __repr__(self) -> str:
        states = [status.state.value for status in self._statuses.values()]
        shown = " ".join(f"{state}={states.count(state)}" for state in sorted(set(states)))
        return f"<Fleet {shown or 'empty'}>"

    def validate(self) -> None:
        """Assert the invariants."""
        assert set(self._entries) == set(self._statuses), self
        every = [offer for entry in self._entries.values() for offer in entry.offers.values()]
        known = [offer for row in self._models.values() for offer in row]
        assert sorted(map(repr, every)) == sorted(map(repr, known)), self
        for entry in self._entries.values():
            entry.health.validate()
            assert entry.status() == self._statuses[entry.node.id], entry
            assert entry.told is not None, entry
            assert entry.told.slots == entry.health.slots(entry.slots or 0), entry
        places = [_place(entry.node) for entry in self._entries.values() if not entry.attached]
        assert len(places) == len(set(places)), self

    # What operators do

    async def load(self) -> None:
        """Take up the stored nodes; each is asked as soon as `run` runs."""
        for node in await self._store.nodes():
            self._enter(Entry(node=node, engine=self._engine_for(node)))

    def attach(self, node: Node, engine: Engine) -> None:
        """Take up an engine of this process; it is not stored, and not closed from here."""
        assert node.id not in self._entries, node.id
        self._enter(Entry(node=node, engine=engine, attached=True))

    async def add(self, node: Node) -> NodeStatus:
        """List a node: ask it what it serves, store it, and use it from now on.

        A node that does not answer is listed all the same, and tried again. Raises InvalidField,
        Conflict, Overloaded, StoreError.
        """
        node = check_node(node)
        self._check_room(node)
        self._adding[node.id] = node
        try:
            entry = Entry(node=node, engine=self._engine_for(node))
            try:
                error = await self._look(entry)
                if error is not None and not isinstance(error, EngineError):
                    raise error  # it is the operator's word that is wrong
                self._refuse_itself(entry)
                await self._store.put_node(node)
            except BaseException:
                await entry.engine.aclose()
                raise
        finally:
            del self._adding[node.id]
        self._enter(entry)
        return self.status(node.id)

    async def drain(self, id_: str) -> None:
        """Let a node finish what runs on it and give it nothing new. Raises NotFound."""
        await self._keep(id_, draining=True)

    async def resume(self, id_: str) -> None:
        """Give a drained node requests again; one that is not drained stays. Raises NotFound."""
        await self._keep(id_, draining=False)

    async def _keep(self, id_: str, *, draining: bool) -> None:
        async with self._changing:
            entry = self._find(id_)
            node = replace(entry.node, draining=draining)
            if not entry.attached:
                await self._store.put_node(node)
            entry.node = node
            self._tell(entry, Drained() if draining else Resumed())

    async def remove(self, id_: str) -> None:
        """Forget a node and cut off what runs on it. Raises NotFound, Conflict."""
        async with self._changing:
            entry = self._find(id_)
            if entry.attached:
                raise Conflict("This is the engine of the platform itself: see engine.enabled.")
            await self._store.forget_node(id_)
            del self._entries[id_], self._statuses[id_]
        self._index()
        self._publish(NodeGone(node=id_))
        await entry.engine.aclose()

    async def aclose(self) -> None:
        """Close the engines of all listed nodes; idempotent."""
        for entry in self._entries.values():
            if not entry.attached:
                await entry.engine.aclose()

    # What the gateway and the API ask

    def statuses(self) -> list[NodeStatus]:
        """All nodes as they stand, by id."""
        return [self._statuses[id_] for id_ in sorted(self._statuses)]

    def status(self, id_: str) -> NodeStatus:
        """One node as it stands. Raises NotFound."""
        self._find(id_)
        return self._statuses[id_]

    def models(self) -> dict[str, tuple[Offer, ...]]:
        """Every model that a node offers, also while that node takes nothing. Not to be changed."""
        return self._models

    def engine(self, id_: str) -> Engine:
        """The engine of a node. Raises NoNode when the node is gone."""
        return self._present(id_).engine

    def offer(self, id_: str, model: str) -> Offer:
        """A node's offer of a model. Raises NoNode when it has gone in the meantime."""
        offer = self._present(id_).offers.get(model)
        if offer is None:
            raise NoNode(f"The node {id_} does not serve {model} any more.", param="model")
        return offer

    def hopeless(self, model: str) -> NoNode | None:
        """Why no node will take a request for this model soon; None while one may."""
        entries = [self._entries[offer.node] for offer in self._models.get(model, ())]
        now = self._clock.now()
        if any(_may_take(entry.health, now) for entry in entries):
            return None
        errors = (self._statuses[entry.node.id].error for entry in entries)
        why = next((f": {error}" for error in errors if error), ".")
        waits = [e.health.aside_until - now for e in entries if e.health.aside_until is not None]
        retry_after_s = min(waits, default=_SHORT_S)
        return NoNode(
            f"No node serves {model} now{why}", param="model", retry_after_s=retry_after_s
        )

    def subscribe(self, callback: Callback) -> None:
        """Be told of every change of usable slots and models, and now of how they stand."""
        self._callbacks.append(callback)
        for entry in self._entries.values():
            assert entry.told is not None
            callback(entry.told)

    def succeeded(self, id_: str) -> None:
        """A stream of this node came to its proper end."""
        entry = self._entries.get(id_)
        if entry is not None:
            self._tell(entry, StreamFinished())

    def failed(self, id_: str, error: AnserError) -> None:
        """A stream of this node failed. What the request itself had wrong is passed over.

        A 4xx is never the node's failure: one that declines is set aside for a while, and asked
        again what it serves.
        """
        entry = self._entries.get(id_)
        if entry is None or isinstance(error, EngineRefused) or not isinstance(error, EngineError):
            return
        entry.failure = error.own_words
        jitter = self._jitter(id_)
        if isinstance(error, EngineDeclined):
            self._tell(entry, StreamDeclined(pause_s=error.retry_after_s, jitter=jitter))
            for other in self._entries.values():
                if other is not entry and other.offers.keys() & entry.offers.keys():
                    self._tell(other, Spared())
        else:
            self._tell(entry, StreamFailed(jitter=jitter))
        if isinstance(error, EngineUnreachable | EngineDeclined):
            entry.ask_at = min(entry.ask_at, entry.asked_at + _SOONEST_S)
            self._wake.set()

    # Watching

    async def run(self) -> None:
        """Ask each node at its times, and let back-offs end; until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                now = self._clock.now()
                for entry in list(self._entries.values()):
                    wake_at = entry.health.wake_at
                    if wake_at is not None and now >= wake_at:
                        self._tell(entry, Ticked())
                    if now >= entry.ask_at and not entry.asking:
                        entry.asking = True
                        group.create_task(self._watch(entry))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s(now)):
                        await self._wake.wait()

    def _pause_s(self, now: float) -> float:
        """Until the next thing is due; a little more than nothing, so as never to spin."""
        due = [entry.ask_at for entry in self._entries.values() if not entry.asking]
        due += [e.health.wake_at for e in self._entries.values() if e.health.wake_at is not None]
        soonest = min(due, default=now + self._settings.probe_interval_s)
        return max(soonest - now, 0.01)

    async def _watch(self, entry: Entry) -> None:
        async with self._looks:
            error = await self._look(entry)
        entry.asking = False
        if self._entries.get(entry.node.id) is entry:
            self._settle(entry)
        loading = entry.health.state is NodeState.STARTING and error is not None
        pause_s = _LOADING_INTERVAL_S if loading else self._settings.probe_interval_s
        entry.ask_at = entry.asked_at + pause_s
        self._wake.set()

    async def _look(self, entry: Entry) -> AnserError | None:
        """Ask what it serves, and note the answer, or why there is none."""
        error: AnserError
        entry.asked_at = self._clock.now()
        try:
            async with asyncio.timeout(INSPECT_TIMEOUT_S):
                report = await entry.engine.inspect()
        except TimeoutError:
            error = EngineStalled(f"It does not say what it serves within {INSPECT_TIMEOUT_S:g} s.")
        except AnserError as raised:
            error = raised
        else:
            entry.latency_s = self._clock.now() - entry.asked_at
            self._learn(entry, report)
            return None
        entry.silence = error.message
        if isinstance(error, EngineDeclined) and entry.report is not None:
            entry.health.handle(Answered(), self._clock.now())  # it lives, and was heard before
            return error
        loading = entry.attached and isinstance(error, EngineUnreachable)
        entry.health.handle(Silent(loading=loading), self._clock.now())
        return error

    def _learn(self, entry: Entry, report: EngineReport) -> None:
        entry.report = report
        entry.offers = {offer.model: offer for offer in offers(entry.node, report)}
        entry.silence = lacking(entry.node, report, len(entry.offers))
        entry.health.handle(Answered(), self._clock.now())

    # Telling

    def _enter(self, entry: Entry) -> None:
        node = entry.node
        if node.draining:
            entry.health.handle(Drained(), self._clock.now())
        if entry.report is None and node.model is not None:
            kind = EngineKind.LLAMACPP if entry.attached else EngineKind.OPENAI
            entry.offers = {node.model: promised(node, node.model, kind)}
        entry.ask_at = self._clock.now()
        if entry.asked_at:
            entry.ask_at += self._settings.probe_interval_s
        self._entries[node.id] = entry
        self._settle(entry)
        self._wake.set()

    def _tell(self, entry: Entry, event: HealthEvent) -> None:
        before = entry.health.state
        if entry.health.handle(event, self._clock.now()) is before is NodeState.UP:
            return  # it takes as much as it did
        self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Bring the index up to date, and tell subscribers what has changed for them."""
        status = entry.status()
        before = self._statuses.get(entry.node.id)
        self._statuses[entry.node.id] = status
        if before is None or before.offers != status.offers:
            self._index()
        change = NodeChanged(
            node=entry.node.id,
            slots=status.usable,
            models=frozenset(entry.offers),
            cache_tokens=None if entry.report is None else entry.report.cache_tokens,
        )
        was_down = before is None or before.state is NodeState.DOWN
        if change != entry.told or (status.state is NodeState.DOWN and not was_down):
            entry.told = change
            self._publish(change)

    def _index(self) -> None:
        rows: dict[str, list[Offer]] = {}
        for entry in self._entries.values():
            for offer in entry.offers.values():
                rows.setdefault(offer.model, []).append(offer)
        self._models = {model: tuple(row) for model, row in rows.items()}

    def _publish(self, event: NodeChanged | NodeGone) -> None:
        for callback in self._callbacks:
            callback(event)

    # Looking up

    def _find(self, id_: str) -> Entry:
        entry = self._entries.get(id_)
        if entry is None:
            raise NotFound(f"There is no node {id_[:64]!r}.", param="node")
        return entry

    def _present(self, id_: str) -> Entry:
        entry = self._entries.get(id_)
        if entry is None:
            raise NoNode(f"The node {id_} has been removed.")
        return entry

    def _refuse_itself(self, entry: Entry) -> None:
        """A platform that is its own node would hand its requests to itself for ever."""
        key = None if entry.report is None else entry.report.platform
        if key is not None and key == self._own_key:
            raise InvalidField("This is the address of this platform itself.", param="url")

    def _check_room(self, node: Node) -> None:
        if len(self._entries) + len(self._adding) >= NODES_MAX:
            raise Overloaded(f"This platform lists {NODES_MAX} nodes already.")
        if node.id in self._entries or node.id in self._adding:
            raise Conflict(f"There is a node {node.id} already.", param="id")
        listed = [entry.node for entry in self._entries.values() if not entry.attached]
        for other in (*listed, *self._adding.values()):
            if _place(other) == _place(node):
                raise Conflict(f"This engine is listed already, as {other.id}.", param="url")

    def _jitter(self, id_: str) -> float:
        """From 0 to 1, different each time, the same in each run."""
        seed = f"{id_} {next(self._failures)}".encode()
        return int.from_bytes(blake2b(seed, digest_size=4).digest()) / 0xFFFF_FFFF


def _may_take(health: Health, now: float) -> bool:
    """Whether it takes requests, or is worth waiting for."""
    if health.state in {NodeState.DOWN, NodeState.DRAINING}:
        return False
    return health.aside_until is None or health.aside_until - now <= _SHORT_S


def _place(node: Node) -> tuple[str, int, str]:
    return parse_endpoint(node.url).place
