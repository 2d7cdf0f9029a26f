"""The sockets of a platform that serves: who comes in where, until the last one has left.

Theory of operation. Each application is behind a door (wire/doors.py), and what the doors let in is
what the settings in force say. When the operator wants settings to be read anew, they are checked
whole, certificate included, and then put in force at once, in all places that do not read them
at each use; a mistake changes nothing. At the end nothing new is admitted and what runs may finish.
Where the public socket was handed over and stays open elsewhere, who comes is left to the
successor, and only who is here already is served to the end.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog
from starlette.types import ASGIApp

from anser.api.context import Services
from anser.config import Config, Loaded, Reread
from anser.core.errors import ConfigError
from anser.core.health import NodeState
from anser.services.fleet import Fleet
from anser.wire.cors import Cors
from anser.wire.doors import Door, is_loopback
from anser.wire.handover import SOURCE
from anser.wire.proxies import Proxies
from anser.wire.server import GuardSettings
from anser.wire.signals import Signals
from anser.wire.tls import Identity

__all__ = ["BUILTIN", "Doors", "collect_rarely", "first_looks", "is_open"]

BUILTIN = "builtin"
"""The node that is the engine of this process."""

_FIRST_LOOK_S = 0.02
_FIRST_LOOKS = 50  # at nodes that have not said what they serve
_log = structlog.get_logger("anser")


@dataclass(slots=True, kw_only=True)
class Doors:
    """The open sockets of a platform, and what is shown there."""

    services: Services
    public: Door
    admin: list[Door]
    identity: Identity | None
    address: tuple[str, int] | None  # of the public socket, if it stays open elsewhere
    connections_max: int

    @classmethod
    def on(
        cls,
        public: tuple[ASGIApp, socket.socket],
        admin: Sequence[tuple[ASGIApp, socket.socket]],
        services: Services,
        *,
        identity: Identity | None,
        handed: bool,
        connections_max: int,
    ) -> Doors:
        """A door for each application on its socket; `handed` is whether the public one stays."""
        app, sock = public
        config = services.config
        guard, public_guard = _guards(config, connections_max)
        front = Door(
            app,
            sock,
            public_guard,
            tls=None if identity is None else identity.context,
            proxy_protocol=config.server.proxy_protocol,
        )
        return cls(
            services=services,
            public=front,
            admin=[Door(each, inner, guard) for each, inner in admin],
            identity=identity,
            address=sock.getsockname()[:2] if handed else None,
            connections_max=connections_max,
        )

    @property
    def all(self) -> list[Door]:
        """Every door, the public one first."""
        return [self.public, *self.admin]

    async def obey(self, signals: Signals, read: Callable[[], Loaded]) -> None:
        """Take up what `read` reads, in a thread, at each wish; what has a mistake is only told."""
        while True:
            await signals.reread.wait()
            signals.reread.clear()
            try:
                self.take_up(await asyncio.to_thread(read))
            except ConfigError as error:
                _log.error("settings stay as they were", reason=error.message)

    def take_up(self, new: Loaded) -> None:
        """Put in force what may change of these settings, all of it or nothing.

        Raises ConfigError.
        """
        services = self.services
        found = Reread.of(services.loaded, new.at(self.address, SOURCE))
        identity = found.loaded.identity()
        trouble = None if identity is None else identity.trouble(services.clock.wall())
        if trouble is not None and identity != self.identity:
            raise ConfigError(trouble)
        found.put_in_force(services.loaded)
        self.identity = identity
        self._let_all_know()
        _log.info("settings were read anew", changed=found.changed)
        if found.waiting:
            _log.warning("settings wait for a restart", settings=found.waiting)

    def _let_all_know(self) -> None:
        """Tell the settings in force to those who do not read them at each use."""
        services, config = self.services, self.services.config
        guard, public_guard = _guards(config, self.connections_max)
        shown = None if self.identity is None else self.identity.context
        self.public.change(public_guard, tls=shown)
        for door in self.admin:
            door.change(guard)
        services.members.anonymous = is_open(config)
        services.members.take_up_limits()
        services.contribution.public_share = config.members.public_share
        services.gateway.scheduler.queued_max = config.gateway.queued_max

    async def drain(self, signals: Signals) -> None:
        """Admit nothing new, let what runs finish: for `server.drain_s`, or to a second signal."""
        with suppress(TimeoutError):
            async with (
                asyncio.timeout(self.services.config.server.drain_s),
                asyncio.TaskGroup() as tasks,
            ):
                waits = {
                    tasks.create_task(self._leave()),
                    tasks.create_task(signals.second.wait()),
                }
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
        self.services.gateway.drain()

    async def _leave(self) -> None:
        if self.address is not None:
            await self.public.retire()
        self.services.gateway.drain()
        await self.services.gateway.empty.wait()


def collect_rarely() -> None:
    """Let Python look for garbage in cycles rarely: a request leaves none, and makes much else.

    What has been loaded by now is there to stay, and is looked at no more. It saves a request a
    fourteenth of its time in the services.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def is_open(config: Config) -> bool:
    """Whether use without a key is allowed: a setting, by default on loopback only."""
    wish = config.members.anonymous
    return wish == "on" or (wish == "auto" and is_loopback(config.server.host))


async def first_looks(fleet: Fleet) -> None:
    """Wait, for a moment, for the stored nodes to say what they serve."""
    for _ in range(_FIRST_LOOKS):
        waits = (s.state is NodeState.STARTING for s in fleet.statuses() if s.node.id != BUILTIN)
        if not any(waits):
            return
        await asyncio.sleep(_FIRST_LOOK_S)


def _guards(config: Config, connections_max: int) -> tuple[GuardSettings, GuardSettings]:
    """What the admin sockets take from clients, and what the public one takes."""
    server = config.server
    guard = GuardSettings(
        head_bytes_max=server.head_bytes_max,
        head_timeout_s=server.head_timeout_s,
        body_timeout_s=server.body_timeout_s,
        write_timeout_s=server.write_timeout_s,
        proxies=Proxies(server.trusted_proxies),
        connections_max=connections_max,
    )
    return guard, replace(guard, cors=Cors(server.cors_origins))
