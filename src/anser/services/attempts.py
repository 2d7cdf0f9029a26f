"""From the queue to the first token: node after node, until one has begun to answer.

Theory of operation. A request waits in the task of its caller until the scheduler gives it a lease;
then that node is asked. Whatever fails before the first token is another node's work, unseen by the
client: the scheduler puts the request back at the front, and it starts elsewhere. In the same way
begins the rest of an answer whose node has died (`Run.go_on`). What an engine refuses is the
request's own fault and is tried nowhere else, unless it is the way to go on that is refused.

Each failed lease is told to the scheduler, and kept in the run, once; the fleet is told of every
failure that is the node's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass

from anser.config import GatewaySettings
from anser.core.errors import (
    DeadlineUnreachable,
    EngineError,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
    NoNode,
)
from anser.core.events import Lease
from anser.core.health import NodeState
from anser.core.ledger import Usage
from anser.ports import Call, Engine
from anser.services.chunks import Piece, read_opening
from anser.services.dispatch import Dispatch
from anser.services.fleet import Fleet
from anser.services.run import Demand, Run, call_for, come_back_s
from anser.services.stats import Stats

__all__ = ["Attempts", "Opened"]


@dataclass(frozen=True, slots=True)
class Opened:
    """An open stream: what came up to its first token, counted, and the rest."""

    opening: list[tuple[Piece, int]]
    rest: AsyncIterator[bytes]


@dataclass(slots=True, kw_only=True)
class Attempts:
    """Starts requests on nodes. Times in seconds."""

    dispatch: Dispatch
    fleet: Fleet
    settings: GatewaySettings
    stats: Stats

    def __repr__(self) -> str:
        return f"<Attempts retries={self.stats.retries}>"

    async def open(self, run: Run, stream: AsyncExitStack) -> Opened:
        """Start on node after node until one gives a first token; the stream stays open."""
        while True:
            lease = await self._lease(run)
            try:
                async with asyncio.timeout(self._first_token_s(run)):
                    chunks = await stream.enter_async_context(self._generate(run, lease))
                    opening = await read_opening(run.tally, chunks)
                run.began = True
                return Opened(opening, chunks)
            except TimeoutError:
                self._check_deadline(run)
                error: EngineError = EngineStalled("The engine gave no first token in time.")
            except EngineRefused as raised:
                if not run.before:
                    raise
                error = raised
            except EngineError as raised:
                error = raised
            await stream.aclose()
            self.failed(run, error)

    async def embed(self, run: Run) -> bytes:
        """Embeddings, from one node after the other until one has made them."""
        while True:
            lease = await self._lease(run)
            try:
                engine, call = self._call(run, lease)
                async with asyncio.timeout(self._first_token_s(run)):
                    data = await engine.embed(call)
                run.began = True
                return data
            except TimeoutError:
                self._check_deadline(run)
                error: EngineError = EngineStalled("The engine gave no embeddings in time.")
            except EngineRefused:
                raise
            except EngineError as raised:
                error = raised
            self.failed(run, error)

    def states(self, model: str) -> set[NodeState]:
        """The states that the nodes of this model are in."""
        offers = self.fleet.models().get(model, ())
        return {self.fleet.status(offer.node).state for offer in offers}

    def failed(self, run: Run, error: EngineError, *, delivered: int = 0) -> None:
        """Its lease has failed after so many tokens that have reached the client.

        Scheduler and fleet are told; the run waits again, or its `ready` holds the refusal.
        """
        lease = run.lease
        assert lease is not None
        if not isinstance(error, EngineRefused):
            self.fleet.failed(lease.node, error)
        run.close_lease(error.code, tokens=delivered, wall_ms=self.dispatch.wall_ms())
        run.again()
        run.reservation.requeued()
        self.stats.retries += 1
        # The prompt is paid for once, by the lease that ends the answer.
        usage = Usage(completion_tokens=delivered)
        again = self.dispatch.lost(run, lease, error, delivered=usage)
        if run.ready.done():
            return
        if not again or (run.lease is None and self.fleet.hopeless(run.demand.model)):
            run.ready.set_exception(error)

    def _generate(
        self, run: Run, lease: Lease
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        engine, call = self._call(run, lease)
        return engine.generate(call)

    def _call(self, run: Run, lease: Lease) -> tuple[Engine, Call]:
        """The lease's engine and the question in its own names. Raises EngineUnreachable."""
        run.opened = True
        try:
            offer = self.fleet.offer(lease.node, run.demand.model)
            run.owner = offer.member
            call = call_for(run.wanted(offer.engine), lease, offer)
            return self.fleet.engine(lease.node), call
        except NoNode as gone:
            raise EngineUnreachable(gone.message) from None

    async def _lease(self, run: Run) -> Lease:
        """Wait for a slot. Raises Unavailable, or the last node's error."""
        clock, model = self.dispatch.clock, run.demand.model
        lease = await run.started(
            clock,
            starting=lambda: self.states(model) == {NodeState.STARTING},
            wait_s=lambda: self._wait_s(run.demand),
        )
        run.reservation.started()
        self.stats.queue_s.observe(clock.now() - run.waits_since)
        return lease

    def _wait_s(self, demand: Demand) -> float:
        return self.dispatch.scheduler.wait_s(demand.member, demand.model)

    def _first_token_s(self, run: Run) -> float:
        """How long an engine has for the first token."""
        left_s = run.left_s(self.dispatch.clock.now())
        return max(0.0, min(self.settings.first_token_timeout_s, left_s))

    def _check_deadline(self, run: Run) -> None:
        """Raise DeadlineUnreachable once it has passed: no node is to blame, none is tried."""
        if run.left_s(self.dispatch.clock.now()) <= 0:
            run.late = True
            message = "No first token came by the request's deadline."
            raise DeadlineUnreachable(message, retry_after_s=come_back_s(self._wait_s(run.demand)))
