"""One answer on its way: from the queue through engine after engine to its receipt, by calls alone.

Theory of operation. A flight has no task. The scheduler gives it a slot, an engine tells it of each
chunk, one timer tells it that it is late, the ledger tells it that its receipt is durable; each of
these calls moves it from state to state, and it tells its reader what has come:

    QUEUED -> OPENING -> RELAYING -> STOPPING -> SETTLING -> ENDED
       ^---------+-----------+  (its node has failed)

Until its first token a node's failure is not seen by the client: it waits again, at the front.
Later, another node goes on from what the client has (`seam`), or the answer ends in an error. The
chunk that ends it is held back until the receipt is durable, so whoever has seen an end finds its
receipt. A client that leaves stops the engine first; then the slot is free.

Invariants: an admitted request leaves exactly one receipt; its slot is given back only after its
engine has stopped; its reader hears nothing before `Gateway.start` has returned, nothing after
`ended` or `failed`, and nothing once it has left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum

from anser.core.errors import AnserError, EngineBroken, EngineError, EngineRefused
from anser.core.events import Lease, Progressed
from anser.core.ledger import Outcome, Usage
from anser.core.limits import RECORD_TIMEOUT_S, STREAM_BUFFER_MAX
from anser.ports import Stream
from anser.services.alarm import Alarm
from anser.services.bugs import bug
from anser.services.chunks import Ending, Piece
from anser.services.crew import Crew, Reader
from anser.services.hedge import Hedge
from anser.services.ledger import late
from anser.services.pump import open_stream
from anser.services.run import Patience, Run, come_back_s
from anser.services.seam import without_role

__all__ = ["Crew", "Flight", "Reader"]

_COALESCE_S = 0.1  # output is charged per token, told at most this often


class _State(Enum):
    QUEUED = "queued"
    OPENING = "opening"  # its engine has been asked, and gives no token yet
    RELAYING = "relaying"
    STOPPING = "stopping"  # until its engine works on it no more
    SETTLING = "settling"  # until its receipt is durable
    ENDED = "ended"


_ENGINES_TURN = (_State.OPENING, _State.RELAYING)


class Flight:
    """One admitted request under way; `leave` it once nobody reads any more."""

    __slots__ = (
        "_alarm",
        "_attempts",
        "_clock",
        "_crew",
        "_ending",
        "_failure",
        "_gap_s",
        "_gone",
        "_hedge",
        "_left",
        "_loop",
        "_may_hedge",
        "_opening",
        "_reader",
        "_run",
        "_state",
        "_stopping",
        "_stream",
        "_told",
        "lease",
        "node",
    )

    def __init__(self, crew: Crew, run: Run, reader: Reader) -> None:
        self.node = self.lease = ""  # of the first lease that answered
        self._crew = crew
        self._attempts = crew.attempts
        self._gap_s = run.timeouts.token_gap_s
        self._run = run
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._clock = crew.attempts.dispatch.clock
        self._state = _State.QUEUED
        self._stream: Stream | None = None
        self._stopping: Stream | None = None  # told to stop, and not heard of since
        self._hedge: Hedge | None = None  # its second stream, until one of the two has a token
        self._opening: deque[tuple[Piece, int]] = deque()
        self._ending = Ending(run.demand.output_tokens_max)
        self._failure: AnserError | None = None
        self._left = self._told = self._may_hedge = False
        self._gone: asyncio.Future[None] | None = None
        self._alarm = Alarm(self._ring, early_s=self._gap_s)

    def __repr__(self) -> str:
        return f"<Flight {self._run.demand.id} {self._state.value} left={self._left}>"

    def validate(self) -> None:
        """Assert what the module's docstring says, as far as it shows between calls."""
        assert self._stream is None or self._state in _ENGINES_TURN, self
        assert self._hedge is None or self._state is _State.OPENING, self
        assert self._run.closed == (self._state in (_State.SETTLING, _State.ENDED)), self

    @property
    def over(self) -> bool:
        """Whether nothing comes after."""
        return self._state is _State.ENDED

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self._run.whole(self._run.settled())

    @property
    def limits(self) -> dict[str, str]:
        """The x-ratelimit headers of its member."""
        return self._run.reservation.headers()

    def begin(self) -> None:
        """Take the slot that it has been given, or wait for one."""
        self._state = _State.QUEUED
        ready = self._run.ready
        if ready.done():
            self._take_lease()
        else:
            ready.add_done_callback(self._is_ready)
            self._wait_on()

    def pause(self) -> None:
        """Its reader cannot take more now; the time that it takes is nobody's silence."""
        if not self._alarm.held:
            self._alarm.hold()
            if self._stream is not None:
                self._stream.pause()

    def resume(self) -> None:
        """Its reader can take more."""
        if self._alarm.held:
            self._alarm.go_on()
            self._safely(self._resume)

    def _resume(self) -> None:
        self._relay_opening()
        if self._stream is not None and not self._alarm.held:  # it may have had enough again
            self._stream.resume()

    def leave(self) -> None:
        """Its reader has left: stop the engine, free the slot, leave the receipt. Idempotent."""
        if self._left or self._state is _State.ENDED:
            return
        self._left = True
        if self._state is _State.QUEUED:
            self._cancel()
        elif self._state in _ENGINES_TURN:
            self._stop(self._cancel)

    def spoil(self, error: AnserError) -> None:
        """What has come cannot be passed on: it fails, and its node has done so."""
        if self._state in _ENGINES_TURN:
            self._fail(error)

    def unread(self, tokens: int) -> None:
        """Its reader has not passed on so many of the last tokens that it was told of."""
        if not self._run.closed:
            self._run.delivered -= tokens

    def hurry(self) -> bool:
        """Leave, and let the engine take no time to stop; returns whether it still has to."""
        self.leave()
        if self._stopping is not None:
            self._stopping.hurry()
        return self._stopping is not None

    async def gone(self) -> None:
        """Return when it has ended."""
        if self._state is not _State.ENDED:
            self._gone = self._gone or self._loop.create_future()
            await asyncio.shield(self._gone)

    # The queue

    def _is_ready(self, ready: asyncio.Future[Lease]) -> None:
        if self._state is _State.QUEUED and ready is self._run.ready:
            self._safely(self._take_lease)

    def _wait_on(self) -> None:
        """Wait as long as its patience and its deadline allow, and look again then."""
        run, attempts, now = self._run, self._attempts, self._clock.now()
        left_s = run.waits_s(now, starting=attempts.starts(run.demand.model))
        if left_s <= 0:
            self._fail(run.out_of_patience(now, come_back_s(attempts.wait_s(run.demand))))
        else:
            self._alarm.set(left_s)

    def _take_lease(self) -> None:
        run, attempts = self._run, self._attempts
        try:
            lease = run.taken()
        except AnserError as refused:
            self._fail(refused)
            return
        attempts.leased(run)
        self._state = _State.OPENING
        self._opening.clear()
        try:
            engine, call = attempts.call(run, lease)
        except EngineError as error:
            self._not_opened(error)
            return
        self._stream = open_stream(engine, call, self)
        if self._alarm.held:
            self._stream.pause()
        late_s, longest_s = self._crew.hedging.late_s(run), attempts.first_token_s(run)
        self._may_hedge = late_s < longest_s
        self._alarm.set(min(late_s, longest_s))

    # The engine, whose Receiver it is

    def chunk(self, data: bytes) -> None:
        """A chunk has come."""
        try:
            piece, tokens = self._run.tally.read(data)
            if self._state is _State.RELAYING:
                self._relay(piece, tokens)
            elif self._state is _State.OPENING:
                self._open_with(piece, tokens)
        except AnserError as error:
            self.failed(error)
        except Exception as error:  # noqa: BLE001 - as in _safely
            self._break(error)

    def ended(self) -> None:
        """The engine has ended its stream."""
        self._safely(self._end_stream)

    def failed(self, error: AnserError) -> None:
        """The engine has failed, or what it sent is no answer."""
        self._safely(lambda: self._fail_stream(error))

    def _end_stream(self) -> None:
        if self._state is _State.OPENING:
            self.failed(EngineBroken("The engine ended before its first token."))
        elif self._ending.finished:
            self._stop(self._settle)
        else:
            self.failed(EngineBroken("The engine ended its stream without a finish_reason."))

    def _fail_stream(self, error: AnserError) -> None:
        if self._state not in _ENGINES_TURN:
            return
        if self._state is _State.RELAYING and self._run.is_whole(self._ending, error):
            self._stop(self._settle)
        elif not isinstance(error, EngineError):
            self._fail(error)
        elif self._state is _State.OPENING:
            self._not_opened(error)
        else:
            self._stop(lambda: self._go_on(error))

    # Up to the first token

    def _open_with(self, piece: Piece, tokens: int) -> None:
        """Keep what comes before the first token: nothing of it has reached the client."""
        self._opening.append((piece, tokens))
        run = self._run
        if not run.tally.tokens and run.tally.finish is None:
            if len(self._opening) >= STREAM_BUFFER_MAX:
                raise EngineBroken("The engine sent chunk after chunk without a token.")
            return
        run.began = True
        self._state = _State.RELAYING
        self._alarm.set(self._gap_s)
        self._lose_second(None)
        self._crew.hedging.began(run)
        if run.before:
            self._attempts.stats.continued += 1
            opening = [(without_role(each), count) for each, count in self._opening]
            self._opening = deque((each, count) for each, count in opening if each is not None)
        else:
            assert run.lease is not None
            self.node, self.lease = run.lease.node, run.lease.id
            self._reader.began()
        self._relay_opening()

    def _relay_opening(self) -> None:
        try:
            while self._opening and self._state is _State.RELAYING and not self._alarm.held:
                self._relay(*self._opening.popleft())
        except EngineError as error:
            self.failed(error)

    def _not_opened(self, error: EngineError) -> None:
        if isinstance(error, EngineRefused) and not self._run.before:
            self._fail(error)
        elif self._hedge is not None:
            self._take_second(error)
        else:
            self._stop(lambda: self._try_again(error))

    def _try_again(self, error: EngineError) -> None:
        self._attempts.failed(self._run, error)
        self.begin()

    # A second lease

    def _ask_second(self) -> None:
        """Its first token is late: let another node try as well, if one can now."""
        self._may_hedge = False
        self._alarm.set(self._attempts.first_token_s(self._run))
        self._hedge = self._crew.hedging.ask(
            self._run,
            first=lambda: self._safely(lambda: self._take_second(None)),
            lost=lambda error: self._safely(lambda: self._lose_second(error)),
        )

    def _lose_second(self, error: AnserError | None) -> None:
        """The second lease has failed, or is not needed, if there is one."""
        hedge, self._hedge = self._hedge, None
        if hedge is not None:
            hedge.lose(error)

    def _take_second(self, error: EngineError | None) -> None:
        """Go on with the second lease: the first has failed, or is slower."""
        hedge, self._hedge = self._hedge, None
        assert hedge is not None
        self._stream = hedge.take(self._stream, error)
        self._opening.clear()
        if self._alarm.held:
            self._stream.pause()
        self._alarm.set(self._attempts.first_token_s(self._run))
        hedge.tell(self)

    # Piece by piece

    def _relay(self, piece: Piece, tokens: int) -> None:
        """Count it and pass it on, unless it belongs to the end."""
        run = self._run
        if tokens:
            self._progress(tokens)
        total = run.before + run.tally.tokens
        if run.is_too_long(total) or run.said.stops_in(piece):
            run.tally.cut(run.delivered - run.before)
            self._ending.cut(piece, "length" if run.blame else "stop")
            self._stop(self._settle)
        elif not self._ending.holds(piece, tokens, counted=total):
            self._deliver(piece, tokens)

    def _deliver(self, piece: Piece, tokens: int) -> None:
        run = self._run
        run.delivered += tokens
        run.said.add(piece)
        if tokens and run.first_token_ms is None:
            run.first_token_ms = run.moment(self._attempts.dispatch.wall_ms())
            self._attempts.stats.first_token_s.observe(self._clock.now() - run.admitted_at)
        try:
            self._reader.piece(piece)
        except AnserError as error:
            self._fail(error)

    def _progress(self, tokens: int) -> None:
        """Charge what was generated, told to the scheduler at most every 100 ms."""
        run, attempts, now = self._run, self._attempts, self._clock.now()
        self._alarm.set(min(self._gap_s, run.over_at - now))
        attempts.stats.produced(tokens, now)
        untold = run.tally.tokens - run.told
        if now - run.told_at >= _COALESCE_S and run.lease is not None:
            run.told, run.told_at = run.tally.tokens, now
            attempts.dispatch.tell(Progressed(lease=run.lease.id, tokens=untold))

    # A node that dies

    def _go_on(self, error: EngineError) -> None:
        """Let another node go on from what the client has, where one can."""
        run, settings = self._run, self._attempts.settings
        if isinstance(error, EngineRefused) or not settings.continue_answers or not run.said.open:
            self._fail(error)
            return
        delivered = run.delivered - run.before
        run.go_on(Patience(self._clock.now(), run.timeouts.queue_s))
        self._ending = Ending(run.demand.output_tokens_max)
        self._attempts.failed(run, error, delivered=delivered)
        self.begin()

    # The end

    def _stop(self, then: Callable[[], None]) -> None:
        """Stop its engine; `then` is next, unless the client has left meanwhile."""
        self._state = _State.STOPPING
        self._alarm.unset()
        self._lose_second(None)
        stream, self._stream = self._stream, None
        if stream is None:
            self._stopped(then)
        else:
            self._stopping = stream
            stream.abort(lambda: self._stopped(then))

    def _stopped(self, then: Callable[[], None]) -> None:
        self._stopping = None
        self._safely(self._cancel if self._left else then)

    def _cancel(self) -> None:
        """The client has left and the engine has stopped: free all, and leave the receipt."""
        crew = self._crew
        crew.ledger.enqueue(crew.settlement.close(self._run, Outcome.CANCELLED, None))
        self._end()

    def _fail(self, error: AnserError) -> None:
        """End it as failed. Its client is told of `error`, not of what the store may say then."""
        self._failure = error
        self._stop(self._settle)

    def _settle(self) -> None:
        """Free the slot, settle the limits, and wait until the receipt is durable."""
        outcome = Outcome.FINISHED if self._failure is None else Outcome.FAILED
        receipt = self._crew.settlement.close(self._run, outcome, self._failure)
        self._state = _State.SETTLING
        self._alarm.set(RECORD_TIMEOUT_S)
        try:
            self._crew.ledger.tell(receipt, self._recorded)
        except AnserError as error:
            self._loop.call_soon(self._recorded, error)

    def _recorded(self, error: AnserError | None) -> None:
        if self._state is not _State.SETTLING:
            return
        self._end()
        if self._left:
            return
        failure = self._failure or error
        if failure is None:
            self._safely(self._tell_end)
        else:
            self._safely(lambda: self._tell_failure(failure))

    def _tell_end(self) -> None:
        """The pieces that were held back, and that they were the last."""
        try:
            for piece in self._ending.pieces:
                if piece.usage is not None:
                    piece.usage = self.usage
                self._reader.piece(piece)
        except AnserError as error:
            self._tell_failure(error)
        else:
            self._reader.ended()
            self._told = True

    def _tell_failure(self, error: AnserError) -> None:
        self._told = True
        self._reader.failed(error)

    def _end(self) -> None:
        self._state = _State.ENDED
        self._alarm.cancel()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    # What nobody expects

    def _safely(self, step: Callable[[], None]) -> None:
        """Whoever calls serves others, too: what goes wrong is this request's alone."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._break(error)

    def _break(self, error: Exception) -> None:
        known = bug(error, request=self._run.demand.id)
        if self._failure is None and self._state not in (_State.SETTLING, _State.ENDED):
            self._fail(known)
        elif not (self._told or self._left):
            self._end()
            self._tell_failure(known)

    def _ring(self) -> None:
        self._safely(self._be_late)

    def _be_late(self) -> None:
        if self._state is _State.QUEUED:  # it may have been told of a slot just now
            (self._take_lease if self._run.ready.done() else self._wait_on)()
        elif self._state is _State.RELAYING:
            self.failed(self._run.too_slow(self._clock.now()))
        elif self._state is _State.SETTLING:
            self._recorded(late())
        elif self._may_hedge:
            self._ask_second()
        else:
            self.failed(self._attempts.too_late(self._run))
