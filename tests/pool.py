"""A whole gateway over engines in memory: real services, real scheduler, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anser.adapters.clock import SystemClock
from anser.adapters.memory import MemoryStore
from anser.adapters.signer import KeyFileSigner
from anser.config import GatewaySettings, MemberSettings
from anser.core.fleet import Node
from anser.core.health import NodeState
from anser.core.ledger import Receipt
from anser.core.scheduler import Scheduler
from anser.ports import Clock, Engine, Route
from anser.services.contribution import Contribution
from anser.services.fleet import Fleet
from anser.services.gateway import Demand, Gateway
from anser.services.ledger import Ledger
from anser.services.members import OWNER, Members

__all__ = ["Pool", "demand", "open_pool"]


@dataclass(slots=True)
class Pool:
    """The parts of a pool that tests look at."""

    gateway: Gateway
    members: Members
    contribution: Contribution
    fleet: Fleet
    ledger: Ledger
    store: MemoryStore

    async def receipts(self) -> list[Receipt]:
        """All receipts, the newest first, once what was enqueued is stored."""
        async with asyncio.timeout(5):
            while "pending=0 kept=0 writing=0" not in repr(self.ledger):
                await asyncio.sleep(0.001)
        return await self.ledger.recent(limit=1_000)

    def validate(self) -> None:
        """Assert every part's invariants, and that nothing is left behind when it is idle."""
        for part in (self.gateway, self.members, self.contribution, self.fleet, self.ledger):
            part.validate()
        if self.gateway.empty.is_set():
            assert self.gateway.scheduler.queued == self.gateway.scheduler.running == 0


@asynccontextmanager
async def open_pool(
    engines: dict[str, Engine],
    *,
    settings: GatewaySettings | None = None,
    member_settings: MemberSettings | None = None,
    queued_max: int = 1_000,
    clock: Clock | None = None,
    more: dict[str, Engine] | None = None,
) -> AsyncGenerator[Pool]:
    """A pool over `engines`, each a node that is up; `more` are what nodes added later run."""
    store, clock = MemoryStore(), clock or SystemClock()
    settings = settings or GatewaySettings(probe_interval_s=0.05)
    member_settings = member_settings or MemberSettings()
    members = Members(store, clock, b"p" * 32, member_settings, anonymous=True)
    await members.load()
    fleet = Fleet(store, clock, settings, lambda node: {**engines, **(more or {})}[node.id])
    for name, engine in engines.items():
        fleet.attach(Node(id=name, url="builtin:", model="memory"), engine)
    ledger = Ledger(store, KeyFileSigner(Ed25519PrivateKey.generate()), clock)
    gateway = Gateway(
        scheduler=Scheduler(queued_max, 3),
        members=members,
        fleet=fleet,
        ledger=ledger,
        clock=clock,
        settings=settings,
    )
    contribution = Contribution(
        ledger=ledger,
        members=members,
        scheduler=gateway.scheduler,
        clock=clock,
        public_share=member_settings.public_share,
    )
    await contribution.load()
    pool = Pool(gateway, members, contribution, fleet, ledger, store)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ledger.run())
        probing = tasks.create_task(fleet.run())
        try:
            async with asyncio.timeout(5):
                while any(row.state is NodeState.STARTING for row in fleet.statuses()):
                    await asyncio.sleep(0.001)
            yield pool
        finally:
            probing.cancel()
            await ledger.aclose()
    pool.validate()


def demand(name: str = "r", **more: object) -> Demand:
    """A short chat of the owner; any field may be given."""
    base = Demand(
        id=name,
        member=OWNER,
        route=Route.CHAT,
        model="memory",
        body={"messages": [{"role": "user", "content": f"hello {name}"}], "max_tokens": 5},
        prompt_tokens=4,
        prompt_bytes=40,
        output_tokens_max=5,
    )
    return replace(base, **more)  # type: ignore[arg-type]
