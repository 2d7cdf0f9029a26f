"""The gateway: carries one request from its admission to its receipt.

Theory of operation. A request lives in the task of its caller; the gateway owns no task. The
scheduler decides (`Scheduler.handle`), the gateway acts: a `Start` wakes the request's own task,
which opens the stream at the node. Until the first chunk a node's failure is not seen by the
client: the scheduler puts the request back at the front and it starts elsewhere. The chunk that
ends the answer is held back until the receipt is durable, so whoever has seen an end finds its
receipt. Leaving early cancels: in the queue at once, at the engine before the slot is free again.

Invariants: each admitted request leaves exactly one receipt; a slot is reported free only after
its engine has stopped; between a decision and what relies on it there is no await.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field

from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    DeadlineUnreachable,
    EngineBroken,
    EngineError,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
    ModelNotFound,
    NoNode,
    Overloaded,
    ShuttingDown,
)
from anser.core.events import (
    Failed,
    Finished,
    Lease,
    Progressed,
    Request,
)
from anser.core.health import NodeState
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.scheduler import Scheduler
from anser.ports import Call, Clock, Engine, Route
from anser.services.chunks import Ending, Piece, Tally, read_embedding_usage, read_opening
from anser.services.dispatch import Dispatch
from anser.services.fairness import Fairness
from anser.services.fleet import Fleet
from anser.services.ledger import Ledger
from anser.services.lengths import Lengths
from anser.services.members import Members
from anser.services.reservation import Reservation
from anser.services.run import Demand, Patience, Run, call_for, come_back_s
from anser.services.stats import NodeRow, Snapshot, Stats
from anser.services.why import Whys

__all__ = ["Answer", "Demand", "Embedded", "Gateway", "NodeRow", "Snapshot"]

_COALESCE_S = 0.1  # SCHEDULER rule 4: output is charged per token, told at most this often
_RETRY_AFTER_S = 5.0
_OVERRUN_SLACK = 1  # the rest of the last token may come in a chunk of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """An embeddings answer as the engine gave it."""

    data: bytes
    node: str
    lease: str
    limits: dict[str, str]
    usage: Usage


@dataclass(frozen=True, slots=True)
class _Chunks:
    """An open stream: what came up to its first token, counted, and the rest."""

    opening: list[tuple[Piece, int]]
    rest: AsyncIterator[bytes]


@dataclass(slots=True)
class Answer:
    """An answer under way: iterate its pieces; `usage` is known at the end."""

    node: str
    lease: str
    limits: dict[str, str]
    _pieces: AsyncGenerator[Piece]
    _tally: Tally

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self._tally.settled()


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

    def __post_init__(self) -> None:
        self._dispatch = Dispatch(
            scheduler=self.scheduler,
            clock=self.clock,
            hopeless=self.fleet.hopeless,
            weight_of=self.members.weight,
        )
        self.members.subscribe(self._dispatch.weighed)
        self.fleet.subscribe(self._dispatch.fleet_changed)

    def __repr__(self) -> str:
        return f"<Gateway draining={self.draining} {self._dispatch!r}>"

    def validate(self) -> None:
        """Assert the invariants: the scheduler knows no request that the gateway does not."""
        self._dispatch.validate()

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

    @asynccontextmanager
    async def answer(
        self, demand: Demand, place: Reservation | None = None
    ) -> AsyncGenerator[Answer]:
        """Admit, queue and start `demand`, in a `place` if it has one; yields at its first chunk.

        Leaving the context before the pieces end cancels the request. Raises LimitReached,
        ModelNotFound, EngineError, EngineRefused, and each Unavailable.
        """
        run = self._admit(demand, place)
        async with AsyncExitStack() as stream:
            try:
                chunks = await self._first_chunk(run, stream)
                assert run.lease is not None
                async with aclosing(self._pieces(run, chunks, stream)) as pieces:
                    yield Answer(
                        node=run.lease.node,
                        lease=run.lease.id,
                        limits=run.reservation.headers(),
                        _pieces=pieces,
                        _tally=run.tally,
                    )
            except AnserError as error:
                await stream.aclose()
                await self._fail(run, error)
                raise
            finally:
                if not run.closed:
                    try:
                        await stream.aclose()
                    finally:  # also when cancelled once more meanwhile
                        self._cancel(run)

    async def embed(self, demand: Demand, place: Reservation | None = None) -> Embedded:
        """Admit, queue and answer an embeddings demand. Raises as `answer` does."""
        run = self._admit(demand, place)
        try:
            data = await self._embed(run)
            usage = read_embedding_usage(data, run.tally)
            run.tally.usage = usage
            lease = run.lease
            assert lease is not None
            limits = run.reservation.headers()
            await self._end(run, Outcome.FINISHED, None)
        except AnserError as error:
            await self._fail(run, error)
            raise
        finally:
            if not run.closed:
                self._cancel(run)
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
        run = Run(
            demand=demand,
            reservation=reservation,
            patience=Patience(self.clock.now(), self.settings.queue_timeout_s),
            queued_ms=self._dispatch.wall_ms(),
            ready=asyncio.get_running_loop().create_future(),
            tally=Tally(demand.prompt_tokens, demand.prompt_bytes),
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
        states = self._states(model)
        if not states:
            raise ModelNotFound(f"There is no model {model!r} here.", param="model")
        hopeless = self.fleet.hopeless(model)
        if hopeless is not None:
            raise hopeless

    def _states(self, model: str) -> set[NodeState]:
        """The states that the nodes of this model are in."""
        offers = self.fleet.models().get(model, ())
        return {self.fleet.status(offer.node).state for offer in offers}

    # From the queue to the first chunk

    async def _first_chunk(self, run: Run, stream: AsyncExitStack) -> _Chunks:
        """Start on node after node until one gives a first token; the stream stays open."""
        while True:
            lease = await self._lease(run)
            try:
                async with asyncio.timeout(self._first_token_s(run)):
                    chunks = await stream.enter_async_context(self._open(run, lease))
                    opening = await read_opening(run.tally, chunks)
                run.began = True
                return _Chunks(opening, chunks)
            except TimeoutError:
                self._check_deadline(run)
                error: EngineError = EngineStalled("The engine gave no first token in time.")
            except EngineRefused:
                raise
            except EngineError as raised:
                error = raised
            await stream.aclose()
            self._failed_before_first(run, lease, error)

    def _open(self, run: Run, lease: Lease) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        engine, call = self._call(run, lease)
        return engine.generate(call)

    def _call(self, run: Run, lease: Lease) -> tuple[Engine, Call]:
        """The lease's engine and the question in its own names. Raises EngineUnreachable."""
        run.opened = True
        try:
            offer = self.fleet.offer(lease.node, run.demand.model)
            run.owner = offer.member
            return self.fleet.engine(lease.node), call_for(run.demand, lease, offer)
        except NoNode as gone:
            raise EngineUnreachable(gone.message) from None

    async def _embed(self, run: Run) -> bytes:
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
            self._failed_before_first(run, lease, error)

    async def _lease(self, run: Run) -> Lease:
        """Wait for a slot. Raises Unavailable, or the last node's error."""
        lease = await run.started(
            self.clock,
            starting=lambda: self._states(run.demand.model) == {NodeState.STARTING},
            wait_s=lambda: self._wait_s(run.demand),
        )
        run.reservation.started()
        self.stats.queue_s.observe(self.clock.now() - run.queued_at)
        return lease

    def _wait_s(self, demand: Demand) -> float:
        return self.scheduler.wait_s(demand.member, demand.model)

    def _first_token_s(self, run: Run) -> float:
        """How long an engine has for the first token."""
        left_s = run.demand.left_s(self.clock.now())
        return max(0.0, min(self.settings.first_token_timeout_s, left_s))

    def _check_deadline(self, run: Run) -> None:
        """Raise DeadlineUnreachable once it has passed: no node is to blame, none is tried."""
        if run.demand.left_s(self.clock.now()) <= 0:
            run.late = True
            message = "No first token came by the request's deadline."
            raise DeadlineUnreachable(message, retry_after_s=come_back_s(self._wait_s(run.demand)))

    def _failed_before_first(self, run: Run, lease: Lease, error: EngineError) -> None:
        """Tell scheduler and fleet; the run waits again, or its future holds the refusal."""
        self.fleet.failed(lease.node, error)
        run.close_lease(error.code, tokens=run.tally.tokens, wall_ms=self._dispatch.wall_ms())
        run.opened = False
        run.ready = asyncio.get_running_loop().create_future()
        run.tally = Tally(run.demand.prompt_tokens, run.demand.prompt_bytes)
        run.reservation.requeued()
        self.stats.retries += 1
        again = self._dispatch.lost(run, lease, error)
        if run.ready.done():
            return
        if not again or (run.lease is None and self.fleet.hopeless(run.demand.model)):
            run.ready.set_exception(error)

    # From the first chunk to the receipt

    async def _pieces(
        self, run: Run, chunks: _Chunks, stream: AsyncExitStack
    ) -> AsyncGenerator[Piece]:
        """Count and pass on each chunk; hold the end until the receipt is durable."""
        ending = Ending(run.demand.output_tokens_max)
        counted = chunks.opening
        while counted:
            for piece, tokens in counted:
                self._progress(run, tokens)
                if run.tally.tokens > ending.tokens_max + _OVERRUN_SLACK:
                    run.blame = EngineBroken("The engine went past the longest answer asked for.")
                    run.tally.cut(run.delivered)
                    ending.cut(piece)
                    break
                if not ending.holds(piece, tokens, counted=run.tally.tokens):
                    self._deliver(run, tokens)
                    yield piece
            counted = [] if run.blame else await self._next(run, chunks.rest)
        if not ending.finished:
            raise EngineBroken("The engine ended its stream without a finish_reason.")
        await stream.aclose()  # the engine's slot is free before the scheduler gives it away
        await self._end(run, Outcome.FINISHED, None)
        for piece in ending.pieces:
            yield piece

    async def _next(self, run: Run, chunks: AsyncIterator[bytes]) -> list[tuple[Piece, int]]:
        """The next chunk, counted; nothing at the end. Raises EngineError.

        Chunks without a token are silence as well; the time that the client takes is not.
        """
        left_s, asked_at = self.settings.token_gap_timeout_s - run.silent_s, self.clock.now()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                data = await anext(chunks, None)
        except TimeoutError:
            raise EngineStalled("The engine went silent in mid-answer.") from None
        if data is None:
            return []
        piece, tokens = run.tally.read(data)
        run.silent_s = 0.0 if tokens else run.silent_s + self.clock.now() - asked_at
        return [(piece, tokens)]

    def _deliver(self, run: Run, tokens: int) -> None:
        run.delivered += tokens
        if tokens and run.first_token_ms is None:
            run.first_token_ms = run.moment(self._dispatch.wall_ms())
            self.stats.first_token_s.observe(self.clock.now() - run.queued_at)

    def _progress(self, run: Run, tokens: int) -> None:
        """Charge what was generated, told to the scheduler at most every 100 ms."""
        now = self.clock.now()
        self.stats.produced(tokens, now)
        untold = run.tally.tokens - run.told
        if untold and now - run.told_at >= _COALESCE_S and run.lease is not None:
            run.told, run.told_at = run.tally.tokens, now
            self._dispatch.tell(Progressed(lease=run.lease.id, tokens=untold))

    # The end

    async def _end(self, run: Run, outcome: Outcome, error: AnserError | None) -> None:
        """Free the slot, settle the limits, and wait until the receipt is durable."""
        if not run.closed:
            await self.ledger.record(self._close(run, outcome, error))

    async def _fail(self, run: Run, error: AnserError) -> None:
        """End it as failed. Its client is told of `error`, not of what the store may say then."""
        with suppress(AnserError):
            await self._end(run, Outcome.FAILED, error)

    def _cancel(self, run: Run) -> None:
        """The client has left and the engine has stopped: free all, and leave the receipt."""
        self.ledger.enqueue(self._close(run, Outcome.CANCELLED, None))

    def _close(self, run: Run, outcome: Outcome, error: AnserError | None) -> Receipt:
        run.closed = True
        generated, delivered = run.generated(outcome), run.received(outcome)
        lease = run.lease
        self._report_node(run, outcome, error)
        code, wall_ms = None if error is None else error.code, self._dispatch.wall_ms()
        run.close_lease(code, tokens=generated.completion_tokens, wall_ms=wall_ms)
        self._dispatch.remove(run)
        if lease is None:
            self._dispatch.left(run, code)
        elif outcome is Outcome.FAILED and isinstance(error, EngineError):
            self._dispatch.tell(Failed(lease=lease.id, delivered=delivered, retry=False))
        else:
            self._dispatch.tell(Finished(lease=lease.id, usage=generated))
        run.reservation.settle(
            prompt_tokens=generated.prompt_tokens,
            completion_tokens=generated.completion_tokens,
            typical=outcome is Outcome.FINISHED and run.demand.route is not Route.EMBEDDINGS,
        )
        self._count(run, outcome, delivered)
        return run.receipt(outcome, error, wall_ms=wall_ms)

    def _report_node(self, run: Run, outcome: Outcome, error: AnserError | None) -> None:
        """A whole stream tells about its node; the client's own fault or leaving does not."""
        if run.lease is None:
            return
        blame = run.blame or error
        if isinstance(blame, EngineError) and not isinstance(blame, EngineRefused):
            self.fleet.failed(run.lease.node, blame)
        elif outcome is Outcome.FINISHED:
            self.fleet.succeeded(run.lease.node)

    def _count(self, run: Run, outcome: Outcome, delivered: Usage) -> None:
        self.stats.outcomes[run.demand.route.name.lower(), outcome.value] += 1
        self.stats.tokens["prompt"] += delivered.prompt_tokens
        if run.tally.usage is not None:
            prompt, size_bytes = run.tally.usage.prompt_tokens, run.demand.prompt_bytes
            self.lengths.observe(run.demand.model, tokens=prompt, size_bytes=size_bytes)
        self.stats.tokens["cached"] += delivered.cached_tokens
        self.stats.tokens["completion"] += delivered.completion_tokens
        self.stats.duration_s.observe(self.clock.now() - run.queued_at)
