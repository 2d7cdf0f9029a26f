"""Two nodes that race for the first token of one request, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from anser.adapters.memory import MemoryClock
from anser.config import GatewaySettings
from anser.core.events import Lease
from anser.core.fairness import price
from anser.core.ledger import Receipt
from anser.services.flight import Flight
from anser.services.gateway import Demand
from anser.services.hedge import Hedging
from tests.pool import Pool, demand, open_pool
from tests.simulation import virtual
from tests.unit.test_flight import Caller, Ear, Line, listen

__all__ = ["LATE_S", "Race", "hedging", "paid", "race", "scarce", "taught"]

LATE_S = 0.5  # what 95 of 100 first tokens take at most, in these tests


@dataclass
class Race:
    """A request whose first lease has begun, and the nodes of its pool."""

    pool: Pool
    nodes: dict[str, Caller]
    ear: Ear
    flight: Flight
    clock: MemoryClock

    @property
    def first(self) -> Line:
        """The first lease's stream."""
        return self.nodes["a"].lines[0]

    @property
    def second(self) -> Line:
        """The second one's."""
        return self.nodes["b"].lines[0]

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return self.pool.gateway.scheduler.running

    async def late(self) -> None:
        """Wait until the first token is late."""
        await asyncio.sleep(LATE_S + 0.01)
        self.flight.validate()
        self.pool.validate()

    async def receipt(self) -> Receipt:
        """What is left of it."""
        await self.flight.gone()
        self.flight.validate()
        [found] = [one for one in await self.pool.receipts() if one.request == "r"]
        return found

    async def leases(self) -> list[tuple[str, str | None, int]]:
        """The leases of its receipt: name, error, tokens."""
        receipt = await self.receipt()
        return [(one.lease, one.error, one.completion_tokens) for one in receipt.leases]

    def blamed(self, node: str) -> bool:
        """Whether its failures count against this node."""
        return self.pool.fleet._entries[node].failure is not None


def paid(output: int = 0) -> int:
    """What a request costs with so many tokens of answer, if its prompt is paid once."""
    return price(fresh=4, output=output, factor_milli=1_000)


def hedging(pool: Pool) -> Hedging:
    """The part that is tested."""
    return pool.gateway._crew.hedging


def taught(pool: Pool, *nodes: str, took_s: float = LATE_S, times: int = 16) -> None:
    """So many first tokens of these nodes have taken so long."""
    for node in nodes:
        lease = Lease(id="", request="", node=node, model="memory", attempt=1)
        for _ in range(times):
            hedging(pool).first_tokens.observe(lease, took_s)


def race(
    story: Callable[[Race], Awaitable[None]],
    *,
    slow: bool = False,
    saved: float = 1.0,
    settings: GatewaySettings | None = None,
    wanted: Callable[[MemoryClock], Demand] = lambda _: demand(),
) -> None:
    """Tell a story of a request on node a, with a node b beside it, on a clock that jumps."""
    clock = MemoryClock()

    async def main() -> None:
        nodes = {"a": Caller(slow=slow), "b": Caller(slow=slow)}
        settled = settings or GatewaySettings(hedge=True)
        async with open_pool({**nodes}, settings=settled, clock=clock) as pool:
            taught(pool, "a", "b")
            hedging(pool).saved = saved
            ear = Ear()
            flight = listen(pool, ear, wanted(clock))
            assert [len(node.lines) for node in nodes.values()] == [1, 0]
            await story(Race(pool, nodes, ear, flight, clock))
            await asyncio.sleep(0.0)

    virtual.run(main, clock=clock, jumped=lambda: None)


def scarce(
    story: Callable[[Pool, dict[str, Caller]], Awaitable[None]],
    slots: dict[str, int],
    *,
    queued_max: int = 1_000,
) -> None:
    """A story of a pool whose nodes have so many slots."""
    clock = MemoryClock()

    async def main() -> None:
        nodes = {name: Caller(slots=count) for name, count in slots.items()}
        settings = GatewaySettings(hedge=True)
        async with open_pool(
            {**nodes}, settings=settings, clock=clock, queued_max=queued_max
        ) as pool:
            taught(pool, *nodes)
            hedging(pool).saved = 1.0
            await story(pool, nodes)

    virtual.run(main, clock=clock, jumped=lambda: None)
