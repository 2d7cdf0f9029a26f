"""Asking nodes: which engine a lease means, how long it has, and what follows when it fails.

Theory of operation. Whatever fails before the first token is another node's work, unseen by the
client: the scheduler puts the request back at the front, and it starts elsewhere. In the same way
begins the rest of an answer whose node has died (`Run.go_on`). What an engine refuses is the
request's own fault and is tried nowhere else, unless it is the way to go on that is refused.

Answers pass through a `Flight`, which asks here what to do; embeddings, which come whole, are made
here. Each failed lease is told to the scheduler, and kept in the run, once; the fleet is told of
every failure that is the node's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from math import inf

from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    DeadlineUnreachable,
    EngineError,
    EngineRefused,
    EngineUnreachable,
    FirstTokenTimeout,
    NoNode,
)
from anser.core.events import Lease
from anser.core.health import NodeState
from anser.core.ledger import Usage
from anser.ports import Call, Engine
from anser.services.dispatch import Dispatch
from anser.services.fleet import Fleet
from anser.services.run import Demand, Run, call_for, come_back_s
from anser.services.stats import Stats

__all__ = ["Attempts"]


@dataclass(slots=True, kw_only=True)
class Attempts:
    """Starts requests on nodes. Times in seconds."""

    dispatch: Dispatch
    fleet: Fleet
    settings: GatewaySettings
    stats: Stats

    def __repr__(self) -> str:
        return f"<Attempts retries={self.stats.retries}>"

    def call(self, run: Run, lease: Lease) -> tuple[Engine, Call]:
        """The lease's engine and the question in its own names.

        Raises EngineUnreachable, or EngineRefused where it cannot go on with what was begun.
        """
        run.opened, run.opened_at = True, self.dispatch.clock.now()
        try:
            offer = self.fleet.offer(lease.node, run.demand.model)
            run.owner = offer.member
            call = call_for(run.wanted(offer.engine), lease, offer)
            return self.fleet.engine(lease.node), call
        except NoNode as gone:
            raise EngineUnreachable(gone.message) from None

    def leased(self, run: Run) -> None:
        """It has a slot, and waits no longer."""
        run.reservation.started()
        now = self.dispatch.clock.now()
        self.stats.queue_s.observe(now - run.waits_since)
        if run.over_at == inf:
            run.over_at = now + run.timeouts.answer_s

    def starts(self, model: str) -> bool:
        """Whether all nodes of this model are still starting."""
        return self.states(model) == {NodeState.STARTING}

    def wait_s(self, demand: Demand) -> float:
        """How long one more request like it would wait now."""
        return self.dispatch.scheduler.wait_s(demand.member, demand.model)

    def first_token_s(self, run: Run) -> float:
        """How long its engine has from now on for the first token."""
        now = self.dispatch.clock.now()
        first_token_s = run.opened_at + run.timeouts.first_token_s - now
        return max(0.0, min(first_token_s, run.left_s(now), run.over_at - now))

    def too_late(self, run: Run) -> AnserError:
        """What it fails of without a first token.

        If its own time is over, that is no EngineError: no node is to blame, none is tried.
        """
        now = self.dispatch.clock.now()
        over = run.over(now)
        if over is None and run.left_s(now) > 0:
            return FirstTokenTimeout("The engine gave no first token in time.")
        run.late = True
        if over is not None:
            return over
        message = "No first token came by the request's deadline."
        return DeadlineUnreachable(message, retry_after_s=come_back_s(self.wait_s(run.demand)))

    async def embed(self, run: Run) -> bytes:
        """Embeddings, from one node after the other until one has made them."""
        error: EngineError
        while True:
            lease = await self._lease(run)
            try:
                engine, call = self.call(run, lease)
                async with asyncio.timeout(self.first_token_s(run)):
                    data = await engine.embed(call)
                run.began = True
                return data
            except TimeoutError:
                late = self.too_late(run)
                if not isinstance(late, EngineError):
                    raise late from None
                error = late
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

    async def _lease(self, run: Run) -> Lease:
        """Wait for a slot. Raises Unavailable, or the last node's error."""
        model = run.demand.model
        lease = await run.started(
            self.dispatch.clock,
            starting=lambda: self.starts(model),
            wait_s=lambda: self.wait_s(run.demand),
        )
        self.leased(run)
        return lease
