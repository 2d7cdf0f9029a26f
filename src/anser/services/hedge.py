"""The second lease of a request whose first one is slow (Dean, Barroso: The Tail at Scale, 2013).

Theory of operation. Of each node it is remembered, by model, how long its last first tokens took
from the opening of their streams. A request whose first lease has given none by its node's own 95th
percentile may have a second lease, if a slot was free for it, or its member was light: a shadow of
it is submitted to the scheduler, as one more request of its member. The shadow goes on only if it
starts at once, on another node, with a slot that nobody waits for; else it is withdrawn within the
same call, and nobody has waited for it. Whichever lease has a token first is the request's own from
then on (`Dispatch.swap`). The other is stopped at its engine, has delivered nothing, and costs
nothing.

A node that is only slower is not blamed. What it took until the other had a token is remembered as
if it had been its own time, so a node that is always slow is soon waited for longer.

A request has one second lease at most, and twenty requests together have one: each that starts adds
a twentieth to what is saved, up to _SAVED_MAX.

Invariants: at most FIRST_TOKENS_MAX nodes' models are remembered, the last _WINDOW times of each;
what is saved is between nothing and _SAVED_MAX.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from anser.core.errors import AnserError, EngineBroken, EngineError, EngineRefused
from anser.core.events import Cancelled, Failed, Lease, Request, Rule, Submitted
from anser.core.ledger import Usage
from anser.core.limits import FIRST_TOKENS_MAX, STREAM_BUFFER_MAX
from anser.ports import Receiver, Stream
from anser.services.attempts import Attempts
from anser.services.chunks import Tally
from anser.services.pump import open_stream
from anser.services.run import Run

__all__ = ["HEDGED", "FirstTokens", "Hedge", "Hedging"]

HEDGED = "hedged"  # in the place of an error's code: the other lease was faster
_LIGHT = (Rule.FREE, Rule.LIGHT)
_WINDOW, _ENOUGH = 64, 16  # times that are remembered, and how many say something
_LATE = 0.95  # of them are below what is late
_LATE_MIN_S = 0.2
_SHARE, _SAVED_MAX = 0.05, 8.0


@dataclass(slots=True)
class FirstTokens:
    """How long the last first tokens of each node took, by model. Times in seconds."""

    _times: dict[tuple[str, str], deque[float]] = field(
        default_factory=dict[tuple[str, str], "deque[float]"]
    )

    def __repr__(self) -> str:
        return f"<FirstTokens of {len(self._times)}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert len(self._times) <= FIRST_TOKENS_MAX, self
        assert all(1 <= len(times) <= _WINDOW for times in self._times.values()), self

    def observe(self, lease: Lease, took_s: float) -> None:
        """The first token of this lease has come, or another was faster than it after so long."""
        place = lease.node, lease.model
        times = self._times.pop(place, None) or deque[float](maxlen=_WINDOW)
        times.append(took_s)
        self._times[place] = times  # the last of those that are remembered
        if len(self._times) > FIRST_TOKENS_MAX:
            del self._times[next(iter(self._times))]

    def late_s(self, lease: Lease) -> float:
        """From when on this lease's first token is late; never, while too little is known."""
        times = self._times.get((lease.node, lease.model), ())
        if len(times) < _ENOUGH:
            return math.inf
        return max(_LATE_MIN_S, sorted(times)[math.ceil(_LATE * len(times)) - 1])


@dataclass(slots=True)
class Hedging:
    """Gives requests their second leases, and takes back the one that is slower."""

    attempts: Attempts
    first_tokens: FirstTokens = field(default_factory=FirstTokens)
    saved: float = 0.0  # second leases that may be given

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        self.first_tokens.validate()
        assert 0.0 <= self.saved <= _SAVED_MAX, self

    def late_s(self, run: Run) -> float:
        """How long its lease, which begins now, has for a first token before it has a second."""
        lease = run.lease
        if not self.attempts.settings.hedge or lease is None or lease.attempt > 1:
            return math.inf
        self.saved = min(self.saved + _SHARE, _SAVED_MAX)
        if run.rule not in _LIGHT or run.demand.batch:
            return math.inf
        return self.first_tokens.late_s(lease)

    def began(self, run: Run) -> None:
        """Its first token has come, or another lease was faster."""
        if self.attempts.settings.hedge and run.lease is not None and not run.before:
            took_s = self.attempts.dispatch.clock.now() - run.opened_at
            self.first_tokens.observe(run.lease, took_s)

    def ask(
        self, run: Run, *, first: Callable[[], None], lost: Callable[[AnserError], None]
    ) -> Hedge | None:
        """Give it a second lease and ask its engine, if there is one for it now.

        `first` is called when its first token has come, `lost` when it fails before.
        """
        shadow = self._second(run)
        if shadow is None:
            return None
        hedge = Hedge(self, run, shadow, first, lost)
        try:
            hedge.open()
        except EngineError as error:
            hedge.lose(error)
            return None
        return hedge

    def _second(self, run: Run) -> Run | None:
        """Its shadow, which has a slot on another node; None where there is none for it now."""
        dispatch = self.attempts.dispatch
        scheduler = dispatch.scheduler
        if self.saved < 1.0 or scheduler.queued >= scheduler.queued_max:
            return None  # or somebody else would be sent away for it
        shadow = run.shadow(dispatch.wall_ms())
        dispatch.add(shadow)
        dispatch.tell(Submitted(request=_request(shadow)))
        if shadow.lease is None:
            dispatch.withdraw(shadow, Cancelled(request=shadow.job))
        elif self._is_for(run, shadow):
            self.saved -= 1.0
            self.attempts.stats.hedged += 1
            return shadow
        else:
            dispatch.withdraw(shadow, _nothing(shadow.lease))
        return None

    def lose(self, run: Run, loser: Run, stream: Stream | None, error: AnserError | None) -> None:
        """The one lease of `run` has failed of `error`, or was slower: `loser` has it.

        Its slot is free once its engine has stopped.
        """
        lease, dispatch = loser.lease, self.attempts.dispatch
        assert lease is not None
        if isinstance(error, EngineError) and not isinstance(error, EngineRefused):
            self.attempts.fleet.failed(lease.node, error)
        code = HEDGED if error is None else error.code
        run.leases.append(loser.record(code, tokens=0, wall_ms=run.moment(dispatch.wall_ms())))
        dispatch.ended_early(run, lease, code)

        def stopped() -> None:
            dispatch.tell(_nothing(lease))
            dispatch.remove(loser)

        if stream is None:
            stopped()
        else:
            stream.abort(stopped)

    @staticmethod
    def _is_for(run: Run, shadow: Run) -> bool:
        """Whether the shadow's slot is one that nobody waits for, on another node."""
        assert run.lease is not None
        assert shadow.lease is not None
        return shadow.rule is Rule.FREE and shadow.lease.node != run.lease.node


class Hedge:
    """The stream of a second lease: kept back up to its first token, then passed on."""

    __slots__ = (
        "_early",
        "_first",
        "_hedging",
        "_lost",
        "_run",
        "_shadow",
        "_stream",
        "_tally",
        "_to",
    )

    def __init__(
        self,
        hedging: Hedging,
        run: Run,
        shadow: Run,
        first: Callable[[], None],
        lost: Callable[[AnserError], None],
    ) -> None:
        self._hedging, self._run, self._shadow = hedging, run, shadow
        self._first, self._lost = first, lost
        self._stream: Stream | None = None
        self._early: list[bytes] = []
        self._tally = Tally(run.demand.prompt_tokens, run.demand.prompt_bytes)
        self._to: Receiver | None = None

    def __repr__(self) -> str:
        return f"<Hedge {self._shadow.job} early={len(self._early)} own={self._to is not None}>"

    def open(self) -> None:
        """Ask its engine. Raises EngineError."""
        assert self._shadow.lease is not None
        engine, call = self._hedging.attempts.call(self._shadow, self._shadow.lease)
        self._stream = open_stream(engine, call, self)

    def lose(self, error: AnserError | None) -> None:
        """It has failed, or it is not needed."""
        self._hedging.lose(self._run, self._shadow, self._stream, error)

    def take(self, stream: Stream | None, error: EngineError | None) -> Stream:
        """Its lease becomes the request's own, for the first one, of `stream`, has failed or is
        slower; returns its stream.
        """
        assert self._stream is not None
        if error is None:
            self._hedging.began(self._run)
        else:
            self._hedging.attempts.stats.retries += 1
        self._hedging.attempts.dispatch.swap(self._run, self._shadow)
        self._hedging.lose(self._run, self._shadow, stream, error)
        return self._stream

    def tell(self, receiver: Receiver) -> None:
        """From now on `receiver` is told, first of what has come so far."""
        self._to = receiver
        early, self._early = self._early, []
        for data in early:
            receiver.chunk(data)

    def chunk(self, data: bytes) -> None:
        """A chunk has come."""
        if self._to is not None:
            self._to.chunk(data)
            return
        self._early.append(data)
        try:
            self._tally.read(data)
        except AnserError as error:
            self._lost(error)
            return
        if self._tally.tokens or self._tally.finish is not None:
            self._first()
        elif len(self._early) >= STREAM_BUFFER_MAX:
            self._lost(EngineBroken("The engine sent chunk after chunk without a token."))

    def ended(self) -> None:
        """The engine has ended its stream."""
        if self._to is not None:
            self._to.ended()
        else:
            self._lost(EngineBroken("The engine ended before its first token."))

    def failed(self, error: AnserError) -> None:
        """The engine has failed."""
        if self._to is not None:
            self._to.failed(error)
        else:
            self._lost(error)


def _request(shadow: Run) -> Request:
    """What the scheduler is told of it: its prompt's blocks would draw it to its first node."""
    demand = shadow.demand
    return Request(
        id=shadow.job,
        member=demand.member,
        model=demand.model,
        prompt_tokens=demand.prompt_tokens,
        output_tokens_max=demand.output_tokens_max,
        factor_milli=shadow.factor_milli,
    )


def _nothing(lease: Lease) -> Failed:
    """It has ended, and nothing was delivered: all that was charged for it is given back."""
    return Failed(lease=lease.id, delivered=Usage(), retry=False)
