"""The composition root: one Config becomes adapters, services and applications.

Theory of operation. `open_platform` owns everything through one exit stack and one task group: the
data folder's lock first, then the store, the services' loops, and last the engine, which loads
while requests already queue. Leaving closes in the opposite order, the ledger after whatever still
writes receipts. `serve` adds the sockets (serving.py): the public one, the admin one in the data
folder, and a separate admin listener if one is set.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from starlette.types import ASGIApp

from anser.adapters.blobs import DiskBlobs
from anser.adapters.clock import SystemClock
from anser.adapters.datadir import DataDir
from anser.adapters.engine_http import HttpEngine
from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.adapters.mirrors import mirrors_for
from anser.adapters.model_file import examine
from anser.adapters.process import harden, open_files_max
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.api.app import admin_app, public_app
from anser.api.context import Services
from anser.config import Config, Loaded, split_address
from anser.core.errors import AnserError, ConfigError, DataDirInUse, SourceError
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.hub import Model
from anser.core.limits import ABORT_WAIT_S, CONNECTIONS_MAX, FILES_RESERVED, RETRIES_MAX
from anser.core.scheduler import Scheduler
from anser.ports import Engine, Progress
from anser.services.contribution import Contribution
from anser.services.fleet import Fleet
from anser.services.gateway import Gateway
from anser.services.hub import Hub
from anser.services.ledger import Ledger
from anser.services.members import OWNER, Members, Spent
from anser.serving import BUILTIN, Doors, collect_rarely, first_looks, is_open
from anser.wire.doors import listen, listen_unix, url_of
from anser.wire.handover import SOURCE, inherited
from anser.wire.signals import Signals
from anser.wire.tls import Identity

__all__ = [
    "BUILTIN",
    "Listening",
    "Platform",
    "examine",
    "identity_of",
    "open_platform",
    "serve",
]

_DAY_MS, _HOUR_MS = 86_400_000, 3_600_000
_START_KEY_LIFETIME_S = 30 * 86_400.0
_SUCCESSION_S = 10.0  # beyond its time to drain, for a predecessor to end
_SUCCESSION_POLL_S = 0.05
_FETCH_AGAIN_S = 5.0
_FETCH_AGAIN_MAX_S = 300.0
_log = structlog.get_logger("anser")


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """A platform without sockets: its services, and the applications that speak for them."""

    services: Services
    public_app: ASGIApp
    admin_app: ASGIApp
    data_dir: DataDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where a platform that serves is reached; `key` is fresh and shown nowhere else.

    `model` is one to ask: that of this process, else the first that the nodes offer.
    """

    url: str
    admin_socket: Path
    admin_url: str | None
    key: str | None
    model: str | None
    anonymous: bool


@asynccontextmanager
async def open_platform(
    settings: Loaded | Config,
    *,
    engine: bool = True,
    progress: Progress | None = None,
    scheduler: Callable[[int, int], Scheduler] = Scheduler,
) -> AsyncGenerator[Platform]:
    """Open the data folder and all services. Raises ConfigError, StoreError.

    `settings` are those that were read, or a Config made by hand. With `engine`, the built-in
    engine is fetched and loaded in the background. `scheduler` makes the scheduler of how many may
    wait and how often each is tried; a measurement gives another to compare it to.
    """
    loaded = settings if isinstance(settings, Loaded) else Loaded.of(settings)
    config = loaded.config
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(DataDir.open(config.data_dir))
        store = await stack.enter_async_context(SqliteStore.open(folder.store))
        clock = SystemClock()
        members = Members(store, clock, folder.pepper(), config.members, is_open(config))
        await members.load()
        signer = KeyFileSigner.open(folder.signing_key)
        own_key = signer.public_key.hex()
        fleet = Fleet(store, clock, config.gateway, _engine_for, own_key=own_key)
        await fleet.load()
        stack.push_async_callback(fleet.aclose)
        ledger = Ledger(store, signer, clock)
        hub = Hub(mirrors_for(config.engine.mirrors), DiskBlobs(folder.path / "blobs"))
        gateway = Gateway(
            scheduler=scheduler(config.gateway.queued_max, RETRIES_MAX),
            members=members,
            fleet=fleet,
            ledger=ledger,
            clock=clock,
            settings=config.gateway,
            factor_of=hub.factor_milli,
        )
        services = Services(
            loaded=loaded,
            clock=clock,
            members=members,
            contribution=_contribution(config, gateway),
            fleet=fleet,
            gateway=gateway,
            ledger=ledger,
            hub=hub,
        )
        await _restore_days(services)
        await services.contribution.load()
        await stack.enter_async_context(_loops(services))
        if engine and config.engine.enabled:
            await stack.enter_async_context(_builtin(services, progress))
        yield Platform(
            services=services,
            public_app=public_app(services),
            admin_app=admin_app(services),
            data_dir=folder,
        )


def _contribution(config: Config, gateway: Gateway) -> Contribution:
    return Contribution(
        ledger=gateway.ledger,
        members=gateway.members,
        scheduler=gateway.scheduler,
        clock=gateway.clock,
        public_share=config.members.public_share,
    )


def _engine_for(node: Node) -> Engine:
    return HttpEngine(node)


async def _restore_days(services: Services) -> None:
    """Count what was used hour by hour, so that a restart gives nobody a fresh daily limit."""
    if not services.members.counts_days:
        return
    now_ms, spent = int(services.clock.wall() * 1_000), list[Spent]()
    for hours in reversed(range(48)):
        since_ms = now_ms - (hours + 1) * _HOUR_MS
        until_ms = since_ms + (_HOUR_MS if hours else _DAY_MS)  # the clock may have been set back
        for row in await services.ledger.usage(since_ms=since_ms, until_ms=until_ms, member=None):
            tokens = row.prompt_tokens + row.completion_tokens
            spent.append(Spent(member=row.member, tokens=tokens, ago_s=hours * 3_600.0))
    services.members.restore_days(spent)


@asynccontextmanager
async def _loops(services: Services) -> AsyncGenerator[None]:
    """The services' own loops: probing while open, receipts until the last one is written."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(services.ledger.run())
        probing = tasks.create_task(services.fleet.run())
        weighing = tasks.create_task(services.contribution.run())
        try:
            yield
        finally:
            probing.cancel()
            weighing.cancel()
            await services.ledger.aclose()


@asynccontextmanager
async def _builtin(services: Services, progress: Progress | None) -> AsyncGenerator[None]:
    """The engine of this process as a node; it is known at once and serves when it has loaded."""
    settings = services.config.engine
    model = await asyncio.to_thread(services.hub.resolve, settings.model)
    if model.file.path is not None and services.hub.find(model) is None:
        message = f"engine.model: there is no file {model.file.path}."
        raise ConfigError(message, param="engine.model")
    engine = LlamaCppEngine(model.id, settings)
    node = Node(id=BUILTIN, url="builtin:", model=model.id, slots=settings.slots)
    services.fleet.attach(node, engine)
    async with asyncio.TaskGroup() as tasks:
        loading = tasks.create_task(_load(services, engine, model, progress))
        try:
            yield
        finally:
            loading.cancel()
            await engine.aclose()


async def _load(
    services: Services, engine: LlamaCppEngine, model: Model, progress: Progress | None
) -> None:
    """Fetch and load the model; a failure is the node's state, not the platform's end.

    What could not be had is tried again, ever more rarely: a laptop may come back to its network.
    """
    pause_s = _FETCH_AGAIN_S
    while True:
        try:
            path = await services.hub.ensure(model, progress or _silent)
            await engine.start(path)
        except SourceError as error:
            words = f"{error.message} It is tried again in {pause_s:.0f} s."
            _log.warning("the model could not be fetched", model=model.id, reason=words)
            await engine.fail(SourceError(words))
        except AnserError as error:
            _log.error("the built-in engine cannot serve", model=model.id, reason=error.message)
            await engine.fail(error)
            return
        else:
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _FETCH_AGAIN_MAX_S)


def _silent(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""


async def serve(
    loaded: Loaded,
    *,
    announce: Callable[[Listening], None],
    progress: Progress | None = None,
    mint_key: bool = True,
    stopping: Callable[[], None] | None = None,
    reread: Callable[[], Loaded] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs; a second signal makes it quick.

    `announce` is called once, when all sockets are open, `stopping` at the first signal, and
    `reread`, in a thread, at each SIGHUP. Raises ConfigError, StoreError.
    """
    harden()
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(Signals.watched())
        shown, trouble = identity_of(loaded)
        if trouble is not None:
            _log.warning("clients will refuse the certificate", reason=trouble)
        handed = inherited(os.environ)
        address = None if handed is None else handed.getsockname()[:2]
        loaded = loaded.at(address, SOURCE)
        config = loaded.config
        public = stack.enter_context(handed or listen(config.server.host, config.server.port))
        patience_s = 0.0 if handed is None else config.server.drain_s + _SUCCESSION_S
        platform = await _opened(stack, loaded, progress, signals, patience_s=patience_s)
        inner = stack.enter_context(listen_unix(platform.data_dir.socket))
        outer = None
        if config.server.admin_listen:
            outer = stack.enter_context(listen(*split_address(config.server.admin_listen)))
        doors = Doors.on(
            (platform.public_app, public),
            [(platform.admin_app, sock) for sock in (inner, outer) if sock],
            platform.services,
            identity=shown,
            handed=handed is not None,
            connections_max=_connections_max(open_files_max()),
        )
        listening = await _listening(platform, url_of(public, shown), outer, mint_key=mint_key)
        if handed is not None:  # somebody waits there already, for models of nodes, too
            await first_looks(platform.services.fleet)
        async with asyncio.TaskGroup() as tasks:
            for door in doors.all:
                tasks.create_task(door.serve())
            for door in doors.all:
                await door.opened.wait()
            collect_rarely()
            announce(listening)
            obeying = tasks.create_task(doors.obey(signals, reread or (lambda: loaded)))
            await signals.first.wait()
            obeying.cancel()
            if stopping is not None:
                stopping()
            await doors.drain(signals)
            for door in doors.all:
                door.close(quickly=signals.second.is_set())
        with suppress(TimeoutError):  # what was cut short still stops its engines
            async with asyncio.timeout(ABORT_WAIT_S):
                await platform.services.gateway.empty.wait()


async def _opened(
    stack: AsyncExitStack,
    loaded: Loaded,
    progress: Progress | None,
    signals: Signals,
    *,
    patience_s: float,
) -> Platform:
    """The platform, once its data folder is free: a predecessor may still be draining there."""
    loop = asyncio.get_running_loop()
    give_up_at, told = loop.time() + patience_s, False
    while True:
        try:
            return await stack.enter_async_context(open_platform(loaded, progress=progress))
        except DataDirInUse as error:
            if loop.time() >= give_up_at or signals.first.is_set():
                raise
            if not told:
                _log.info("a predecessor is waited for", reason=error.message)
            told = True
        await asyncio.sleep(_SUCCESSION_POLL_S)


def identity_of(
    loaded: Loaded, *, soon_s: float = 0.0
) -> tuple[Identity, str | None] | tuple[None, None]:
    """What is shown in handshakes, if TLS is on, and why clients will refuse it at once or soon.

    Raises ConfigError.
    """
    found = loaded.identity()
    if found is None:
        return None, None
    return found, found.trouble(SystemClock().wall(), soon_s=soon_s)


def _connections_max(files_max: int) -> int:
    """Of each client's connection and one to a node for it, as many as there are files for."""
    return min(CONNECTIONS_MAX, max(1, (files_max - FILES_RESERVED) // 2))


async def _listening(
    platform: Platform, url: str, outer: socket.socket | None, *, mint_key: bool
) -> Listening:
    members = platform.services.members
    key = None
    if mint_key:
        key, _ = await members.create_key(OWNER, label="start", lifetime_s=_START_KEY_LIFETIME_S)
    return Listening(
        url=url,
        admin_socket=platform.data_dir.socket,
        admin_url=None if outer is None else url_of(outer),
        key=key,
        model=await _first_model(platform.services),
        anonymous=members.anonymous,
    )


async def _first_model(services: Services) -> str | None:
    """A model to try: this process's own, else one that a node serves, else one that is listed."""
    if services.config.engine.enabled:
        return services.hub.resolve(services.config.engine.model).id
    fleet = services.fleet
    await first_looks(fleet)
    up = [status.offers for status in fleet.statuses() if status.state is NodeState.UP]
    names = {offer.model for offers in up for offer in offers} or fleet.models().keys()
    return min(names, default=None)
