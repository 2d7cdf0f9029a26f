"""The machines behind the nodes: engines in memory that go wrong as planned, and count."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from anser.adapters.memory_engine import Fault, MemoryEngine
from anser.core.fleet import EngineReport
from anser.ports import Call
from tests.simulation.plan import MachinePlan, draw_fault

__all__ = ["Machine"]


class Machine:
    """One node's machine: it lasts while its node is removed and listed again."""

    def __init__(self, plan: MachinePlan, seed: int) -> None:
        self.plan = plan
        self.open = 0
        self._seed = seed
        self._engine = self._boot()

    def connect(self) -> Machine._Connection:
        """Its engine, as the platform sees it from now on."""
        self._engine = self._boot()
        return Machine._Connection(self, self._engine)

    def crash(self) -> None:
        """Lose all that runs, and answer nothing."""
        self._engine.go_down()

    def recover(self) -> None:
        """Answer again."""
        self._engine.come_up()

    def validate(self) -> None:
        """No answer waits for a slot in the engine: the scheduler has given each its own."""
        self._engine.validate()
        assert 0 <= self.open <= self.plan.slots

    def _boot(self) -> MemoryEngine:
        plan = self.plan
        return MemoryEngine(plan.model, slots=plan.slots, pace=plan.pace, fault_of=self._fault)

    def _fault(self, call: Call) -> Fault | None:
        return draw_fault(random.Random(f"{self._seed} {call.lease}"), self.plan.faults)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        self.open += 1
        self.validate()
        try:
            yield
        finally:
            self.open -= 1

    class _Connection:
        """Fills the Engine port."""

        def __init__(self, machine: Machine, engine: MemoryEngine) -> None:
            self._machine, self._engine = machine, engine

        async def inspect(self) -> EngineReport:
            return await self._engine.inspect()

        @asynccontextmanager
        async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
            with self._machine._slot():
                try:
                    async with self._engine.generate(call) as chunks:
                        yield chunks
                finally:
                    await asyncio.sleep(self._machine.plan.stop_s)

        async def embed(self, call: Call) -> bytes:
            with self._machine._slot():
                return await self._engine.embed(call)

        async def aclose(self) -> None:
            await self._engine.aclose()
