"""services.run: how long a request waits for its slot, under virtual time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import MemoryEngine
from anser.config import GatewaySettings
from anser.core.errors import EngineUnreachable, QueueTimeout
from anser.core.fleet import EngineReport, Node
from anser.core.ledger import Outcome
from anser.core.limits import START_WAIT_S
from anser.services.run import Patience
from tests.pool import demand, open_pool
from tests.simulation import virtual


class Late(MemoryEngine):
    """An engine of this process that has loaded at a moment of its own."""

    def __init__(self, clock: MemoryClock, loaded_at: float) -> None:
        super().__init__()
        self.clock = clock
        self.loaded_at = loaded_at

    async def inspect(self) -> EngineReport:
        """What it serves, once it has loaded."""
        if self.clock.now() < self.loaded_at:
            raise EngineUnreachable("It still loads.")
        return await super().inspect()


def waited(loaded_at: float, *, queue_timeout_s: float = 120.0) -> float:
    """How many seconds of virtual time a request takes that comes before the model is there."""
    clock = MemoryClock()
    settings = GatewaySettings(queue_timeout_s=queue_timeout_s)

    async def live() -> float:
        async with open_pool({}, settings=settings, clock=clock) as pool:
            node = Node(id="late", url="builtin:", model="memory")
            pool.fleet.attach(node, Late(clock, loaded_at))
            begun = clock.now()
            late: Any = nullcontext()
            if loaded_at > START_WAIT_S:
                late = pytest.raises(QueueTimeout, match="memory is still being fetched or loaded")
            with late:
                async with pool.gateway.answer(demand()) as answer:
                    assert [piece async for piece in answer]
            [receipt] = await pool.receipts()
            assert (receipt.outcome is Outcome.FINISHED) == (clock.now() < START_WAIT_S)
            return clock.now() - begun

    return virtual.run(live, clock=clock, jumped=lambda: None)


@pytest.mark.parametrize("queue_timeout_s", [0.1, 120.0])
def test_a_model_that_still_loads_has_no_queue_to_wait_in(queue_timeout_s: float) -> None:
    """A first download longer than the queue's time limit costs nobody the answer."""
    took_s = waited(1_000.0, queue_timeout_s=queue_timeout_s)
    assert 999.0 < took_s < 1_002.0


def test_a_model_that_never_comes_is_told_so() -> None:
    """The wait for a model has an end of its own, and the refusal says what was waited for."""
    assert waited(START_WAIT_S + 100) == pytest.approx(START_WAIT_S, abs=1.0)


def test_the_clock_runs_from_when_the_model_can_be_asked() -> None:
    """Once a node has started, all of the queue's time is left, and it stands still no more."""
    patience = Patience(10.0, 120.0)
    assert patience.left_s(10.0, starting=True) == 5.0
    assert patience.left_s(500.0, starting=False) == 120.0
    assert patience.left_s(560.0, starting=True) == 60.0
    assert patience.left_s(620.0, starting=False) == 0.0
