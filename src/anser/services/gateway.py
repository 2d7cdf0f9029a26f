"""The gateway: admits requests, and carries each from its admission to its receipt.

Theory of operation. The scheduler decides (`Scheduler.handle`), the gateway acts. An answer passes
through a `Flight`, which is moved by calls and owns no task; whoever would rather wait for pieces
than be told of them reads them from an `Answer`. Embeddings, which come whole, are made in the task
of their caller.

Invariants: each admitted request leaves exactly one receipt; a slot is reported free only after
its engine has stopped; between a decision and what relies on it there is no await.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from anser.config import GatewaySettings
from anser.core.errors import AnserError, ModelNotFound, Overloaded, ShuttingDown
from anser.core.events import Request
from anser.core.ledger import Outcome, Usage
from anser.core.scheduler import Scheduler
from anser.ports import Clock
from anser.services.answer import Answer
from anser.services.attempts import Attempts
from anser.services.chunks import Tally, read_embedding_usage
from anser.services.dispatch import Dispatch
from anser.services.fairness import Fairness
from anser.services.fleet import Fleet
from anser.services.flight import Crew, Flight, Reader
from anser.services.hedge import Hedging
from anser.services.ledger import Ledger
from anser.services.lengths import Lengths
from anser.services.members import Members
from anser.services.reservation import Reservation
from anser.services.run import Demand, Patience, Run
from anser.services.seam import Said
from anser.services.settlement import Settlement
from anser.services.stats import NodeRow, Snapshot, Stats
from anser.services.why import Whys

__all__ = ["Answer", "Demand", "Embedded", "Gateway", "NodeRow", "Snapshot"]

_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """An embeddings answer as the engine gave it."""

    data: bytes
    node: str
    lease: str
    limits: dict[str, str]
    usage: Usage


@dataclass(slots=True, kw_only=True)
class Gateway:
    """All requests in flight on this platform."""

    scheduler: Scheduler
    members: Members
    fleet: Fleet
    ledger: Ledger
    clock: Clock
    settings: GatewaySettings
    factor_of: Callable[[str], int] = lambda _: 1_000  # a model's price factor, in thousandths
    stats: Stats = field(default_factory=Stats)
    lengths: Lengths = field(default_factory=Lengths)
    draining: bool = False
    _dispatch: Dispatch = field(init=False)
    _attempts: Attempts = field(init=False)
    _settlement: Settlement = field(init=False)
    _crew: Crew = field(init=False)

    def __post_init__(self) -> None:
        self._dispatch = Dispatch(
            scheduler=self.scheduler,
            clock=self.clock,
            hopeless=self.fleet.hopeless,
            weight_of=self.members.weight,
        )
        self._attempts = Attempts(
            dispatch=self._dispatch, fleet=self.fleet, settings=self.settings, stats=self.stats
        )
        self._settlement = Settlement(
            dispatch=self._dispatch, fleet=self.fleet, stats=self.stats, lengths=self.lengths
        )
        self._crew = Crew(
            attempts=self._attempts,
            hedging=Hedging(self._attempts),
            settlement=self._settlement,
            ledger=self.ledger,
        )
        self.members.subscribe(self._dispatch.weighed)
        self.fleet.subscribe(self._dispatch.fleet_changed)

    def __repr__(self) -> str:
        return f"<Gateway draining={self.draining} {self._dispatch!r}>"

    def validate(self) -> None:
        """Assert the invariants: the scheduler knows no request that the gateway does not."""
        self._dispatch.validate()
        self._crew.hedging.validate()

    @property
    def whys(self) -> Whys:
        """Why the newest requests waited, and went where they went."""
        return self._dispatch.whys

    @property
    def fairness(self) -> Fairness:
        """How evenly service goes round."""
        return self._dispatch.fairness

    @property
    def empty(self) -> asyncio.Event:
        """Set while no request is in flight."""
        return self._dispatch.empty

    def start(self, demand: Demand, reader: Reader, place: Reservation | None = None) -> Flight:
        """Admit and start `demand`, in a `place` if it has one; `reader` is told of its answer.

        Raises LimitReached, ModelNotFound, NoNode, Overloaded and ShuttingDown at once; all else is
        told to `reader`, after this has returned.
        """
        flight = Flight(self._crew, self._admit(demand, place), reader)
        flight.begin()
        return flight

    @asynccontextmanager
    async def answer(
        self, demand: Demand, place: Reservation | None = None
    ) -> AsyncGenerator[Answer]:
        """Admit, queue and start `demand`, in a `place` if it has one; yields at its first chunk.

        Leaving the context before the pieces end cancels the request. Raises LimitReached,
        ModelNotFound, EngineError, EngineRefused, and each Unavailable.
        """
        answer = Answer()
        answer.flight = self.start(demand, answer, place)
        try:
            await answer.opening()
            yield answer
        except AnserError as error:
            await answer.leave(error)
            raise
        finally:
            await answer.leave()

    async def embed(self, demand: Demand, place: Reservation | None = None) -> Embedded:
        """Admit, queue and answer an embeddings demand. Raises as `answer` does."""
        run = self._admit(demand, place)
        try:
            data = await self._attempts.embed(run)
            usage = read_embedding_usage(data, run.tally)
            run.tally.usage = usage
            lease = run.lease
            assert lease is not None
            limits = run.reservation.headers()
            await self.ledger.record(self._settlement.close(run, Outcome.FINISHED, None))
        except AnserError as error:
            if not run.closed:
                with suppress(AnserError):  # its client is told of `error`
                    await self.ledger.record(self._settlement.close(run, Outcome.FAILED, error))
            raise
        finally:
            if not run.closed:
                self.ledger.enqueue(self._settlement.close(run, Outcome.CANCELLED, None))
        return Embedded(data=data, node=lease.node, lease=lease.id, limits=limits, usage=usage)

    def snapshot(self) -> Snapshot:
        """What is waiting and running now."""
        busy: dict[str, int] = {}
        for run in self._dispatch.runs.values():
            if run.lease is not None:
                busy[run.lease.node] = busy.get(run.lease.node, 0) + 1
        return Snapshot(
            queued=self.scheduler.queued,
            running=self.scheduler.running,
            tokens_per_s=self.stats.tokens_per_s(self.clock.now()),
            draining=self.draining,
            nodes=tuple(NodeRow(node=node, running=count) for node, count in sorted(busy.items())),
        )

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True

    # Admission

    def _admit(self, demand: Demand, place: Reservation | None) -> Run:
        if self.draining:
            raise ShuttingDown("This platform is stopping.", retry_after_s=_RETRY_AFTER_S)
        self._check_model(demand.model)
        if len(self._dispatch.runs) >= self.ledger.room:
            message = "Too many receipts wait for the disk."
            raise Overloaded(message, retry_after_s=_RETRY_AFTER_S)
        reservation = place or self.members.reserve(
            demand.member,
            prompt_tokens=demand.prompt_tokens,
            output_tokens_max=demand.output_tokens_max,
        )
        timeouts = self.settings.timeouts(demand.model)
        run = Run(
            demand=demand,
            reservation=reservation,
            timeouts=timeouts,
            patience=Patience(self.clock.now(), timeouts.queue_s),
            queued_ms=self._dispatch.wall_ms(),
            ready=asyncio.get_running_loop().create_future(),
            tally=Tally(demand.prompt_tokens, demand.prompt_bytes),
            said=Said.of(demand.body),
            factor_milli=self.factor_of(demand.model),
        )
        try:
            self._dispatch.submit(run, self._request(run))
        except AnserError:
            run.reservation.withdraw()
            raise
        return run

    def _request(self, run: Run) -> Request:
        demand = run.demand
        return Request(
            id=demand.id,
            member=demand.member,
            model=demand.model,
            prompt_tokens=demand.prompt_tokens,
            output_tokens_max=demand.output_tokens_max,
            factor_milli=run.factor_milli,
            batch=demand.batch,
            chain=demand.chain,
            text_bytes=demand.prompt_bytes,
            deadline=demand.deadline,
        )

    def _check_model(self, model: str) -> None:
        states = self._attempts.states(model)
        if not states:
            raise ModelNotFound(f"There is no model {model!r} here.", param="model")
        hopeless = self.fleet.hopeless(model)
        if hopeless is not None:
            raise hopeless
