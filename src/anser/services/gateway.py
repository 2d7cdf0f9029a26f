"""The gateway: carries one request from its admission to its receipt.

Theory of operation. A request lives in the task of its caller; the gateway owns no task. The
scheduler decides (`Scheduler.handle`), the gateway acts: a `Start` wakes the request's own task,
which opens the stream at the node. Until the first chunk a node's failure is not seen by the
client: the scheduler puts the request back at the front and it starts elsewhere (`attempts`).
Later, another node goes on from what the client has (`seam`), or the stream ends in an error. The
chunk that ends the answer is held back until the receipt is durable, so whoever has seen an end
finds its receipt. Leaving early cancels: in the queue at once, at the engine before the slot is
free again.

Invariants: each admitted request leaves exactly one receipt; a slot is reported free only after
its engine has stopped; between a decision and what relies on it there is no await.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import (
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field, replace

from anser.config import GatewaySettings
from anser.core.errors import (
    AnserError,
    EngineBroken,
    EngineError,
    EngineRefused,
    EngineStalled,
    ModelNotFound,
    Overloaded,
    ShuttingDown,
)
from anser.core.events import (
    Failed,
    Finished,
    Progressed,
    Request,
)
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.scheduler import Scheduler
from anser.ports import Clock, Route
from anser.services.attempts import Attempts, Opened
from anser.services.chunks import Ending, Piece, Tally, read_embedding_usage
from anser.services.dispatch import Dispatch
from anser.services.fairness import Fairness
from anser.services.fleet import Fleet
from anser.services.ledger import Ledger
from anser.services.lengths import Lengths
from anser.services.members import Members
from anser.services.reservation import Reservation
from anser.services.run import Demand, Patience, Run
from anser.services.seam import Said, without_role
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


@dataclass(slots=True)
class Answer:
    """An answer under way: iterate its pieces; `usage` is known at the end."""

    node: str
    lease: str
    limits: dict[str, str]
    _pieces: AsyncGenerator[Piece]
    _run: Run

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self._run.whole(self._run.settled())


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
                chunks = await self._attempts.open(run, stream)
                assert run.lease is not None
                async with aclosing(self._pieces(run, chunks, stream)) as pieces:
                    yield Answer(
                        node=run.lease.node,
                        lease=run.lease.id,
                        limits=run.reservation.headers(),
                        _pieces=pieces,
                        _run=run,
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
            data = await self._attempts.embed(run)
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

    # From the first chunk to the receipt

    async def _pieces(
        self, run: Run, opened: Opened, stream: AsyncExitStack
    ) -> AsyncGenerator[Piece]:
        """Pass on the answer, of node after node; hold its end until the receipt is durable."""
        ending = Ending(run.demand.output_tokens_max)
        while not ending.finished:
            try:
                async with aclosing(self._relay(run, opened, ending)) as pieces:
                    async for piece in pieces:
                        yield piece
            except EngineError as error:
                if not self._is_whole(run, ending, error):
                    await stream.aclose()
                    opened = await self._go_on(run, error, stream)
                    ending = Ending(run.demand.output_tokens_max)
        await stream.aclose()  # the engine's slot is free before the scheduler gives it away
        await self._end(run, Outcome.FINISHED, None)
        usage = run.whole(run.settled())
        for piece in ending.pieces:
            yield piece if piece.usage is None else replace(piece, usage=usage)

    async def _relay(self, run: Run, opened: Opened, ending: Ending) -> AsyncGenerator[Piece]:
        """Count and pass on the chunks of one lease, but for the end. Raises EngineError."""
        counted = opened.opening
        while counted:
            for piece, tokens in counted:
                self._progress(run, tokens)
                total = run.before + run.tally.tokens
                if self._is_too_long(run, total) or run.said.stops_in(piece):
                    run.tally.cut(run.delivered - run.before)
                    ending.cut(piece, "length" if run.blame else "stop")
                    return
                if not ending.holds(piece, tokens, counted=total):
                    self._deliver(run, piece, tokens)
                    yield piece
            counted = await self._next(run, opened.rest)
        if not ending.finished:
            raise EngineBroken("The engine ended its stream without a finish_reason.")

    @staticmethod
    def _is_too_long(run: Run, tokens: int) -> bool:
        """Whether its engine has gone past the longest answer asked for."""
        if tokens <= run.demand.output_tokens_max + _OVERRUN_SLACK:
            return False
        run.blame = EngineBroken("The engine went past the longest answer asked for.")
        return True

    @staticmethod
    def _is_whole(run: Run, ending: Ending, error: EngineError) -> bool:
        """Whether its node has died when nothing of the answer was missing but the usage."""
        full = run.delivered >= run.demand.output_tokens_max
        if not ending.finished and full and run.said.last is not None:
            run.tally.cut(run.delivered - run.before)
            ending.cut(run.said.last)
        if ending.finished:
            run.blame = error
        return ending.finished

    async def _go_on(self, run: Run, error: EngineError, stream: AsyncExitStack) -> Opened:
        """Let another node go on from what the client has. Raises AnserError where none can."""
        if isinstance(error, EngineRefused) or not self.settings.continue_answers:
            raise error
        if not run.said.open:
            raise error
        delivered = run.delivered - run.before
        run.go_on(Patience(self.clock.now(), self.settings.queue_timeout_s))
        self._attempts.failed(run, error, delivered=delivered)
        opened = await self._attempts.open(run, stream)
        self.stats.continued += 1
        opening = [(without_role(piece), tokens) for piece, tokens in opened.opening]
        return Opened([(piece, tokens) for piece, tokens in opening if piece], opened.rest)

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

    def _deliver(self, run: Run, piece: Piece, tokens: int) -> None:
        run.delivered += tokens
        run.said.add(piece)
        if tokens and run.first_token_ms is None:
            run.first_token_ms = run.moment(self._dispatch.wall_ms())
            self.stats.first_token_s.observe(self.clock.now() - run.admitted_at)

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
            usage = run.part(delivered)
            self._dispatch.tell(Failed(lease=lease.id, delivered=usage, retry=False))
        else:
            self._dispatch.tell(Finished(lease=lease.id, usage=generated))
        spent = run.spent(generated, delivered)
        run.reservation.settle(
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
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
        if run.tally.usage is not None and not run.before:
            prompt, size_bytes = run.tally.usage.prompt_tokens, run.demand.prompt_bytes
            self.lengths.observe(run.demand.model, tokens=prompt, size_bytes=size_bytes)
        self.stats.tokens["cached"] += delivered.cached_tokens
        self.stats.tokens["completion"] += delivered.completion_tokens
        self.stats.duration_s.observe(self.clock.now() - run.admitted_at)
