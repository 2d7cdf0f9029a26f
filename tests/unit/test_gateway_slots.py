"""services.gateway: a slot is given away only when its engine has stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.core.errors import AnserError
from anser.ports import Call
from tests.pool import Pool, demand, open_pool

pytestmark = pytest.mark.anyio

FAST = Pace(step_s=0.001, step_each_s=0.0, prefill_tokens_s=1e6)


class CountingEngine(MemoryEngine):
    """One slot; it takes a moment to stop, and remembers how many answers were open at once."""

    def __init__(self, fault: Fault | None) -> None:
        super().__init__(slots=1, pace=FAST, fault_of=lambda _: fault)
        self.open = self.most = self.answers = 0

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """As any engine does."""
        self.open += 1
        self.answers += 1
        self.most = max(self.most, self.open)
        try:
            async with super().generate(call) as chunks:
                yield chunks
        finally:
            await asyncio.sleep(0.002)
            self.open -= 1


async def ask(pool: Pool, name: str, pieces_max: int) -> None:
    """Read some pieces of an answer, whatever becomes of it."""
    try:
        async with pool.gateway.answer(demand(name)) as answer:
            count = 0
            async for _ in answer:
                count += 1
                if count == pieces_max:
                    return
    except AnserError:
        pass


@pytest.mark.parametrize("pieces_max", [100, 1], ids=["finished", "left"])
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(kind=FaultKind.BREAK, after_tokens=2),
        Fault(kind=FaultKind.REFUSE, after_tokens=0),
    ],
    ids=["whole", "broken", "refused"],
)
async def test_a_slot_is_given_away_only_when_its_engine_has_stopped(
    fault: Fault | None, pieces_max: int
) -> None:
    """However an answer ends, the next one never waits inside the engine."""
    engine = CountingEngine(fault)
    async with open_pool({"n1": engine}) as pool, asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(ask(pool, f"r{number}", pieces_max))
    assert engine.answers >= 3
    assert engine.most == 1
