"""How well a node is, and how many of its slots may be used.

Theory of operation. `Health` is one node's state machine: it is told what was seen (an answer to
the question what it serves, the end of a whole stream, the passing of time) and says which state
the node is in and how many of its slots may be used. Its breaker opens after a few failures in a
row, or when too many of the last streams failed, so that a node which fails fast does not draw all
traffic; after a back-off that doubles each time it lets one request in at a time, and closes after
a few good ones. What the client did wrong is never told to it. A node that declines (its key, its
rate, its models) is not at fault, but draws traffic all the same: it is set aside, without a word
to the breaker, for as long as it asks or for a pause that doubles; then it is tried with one
request at a time until one is answered. Of several such nodes one is tried at a time, or a
request could use up all its tries on them.

Invariants: the breaker is open exactly while `retry_at` is set; a node that is draining, down,
set aside or behind an open breaker has no slots.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

__all__ = [
    "Answered",
    "Drained",
    "Health",
    "HealthEvent",
    "HealthRules",
    "NodeState",
    "Resumed",
    "Silent",
    "Spared",
    "StreamDeclined",
    "StreamFailed",
    "StreamFinished",
    "Ticked",
]


class NodeState(Enum):
    """Where a node is in its life."""

    STARTING = "starting"  # not asked yet, or its engine still loads
    UP = "up"
    SUSPECT = "suspect"  # its breaker is open or it has declined; let in again by trickle
    DRAINING = "draining"  # finishes what runs, takes nothing new
    DOWN = "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRules:
    """When a breaker opens and closes."""

    failures_max: int = 3  # in a row
    window: int = 20  # streams that the ratio looks at
    window_min: int = 10  # and how many it needs to say anything
    ratio: float = 0.5  # of failed streams, at which the breaker opens
    backoff_s: float = 2.0  # the first, which then doubles
    backoff_max_s: float = 120.0
    aside_max_s: float = 3_600.0  # that a node may ask for
    trials: int = 3  # good streams in a row that close it
    silent_max: int = 2  # questions unanswered in a row that make a node down


@dataclass(frozen=True, slots=True)
class Answered:
    """Asked what it serves, it told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """Asked what it serves, it did not tell. `loading`: its engine is known to be starting."""

    loading: bool = False


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """A stream came to its proper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFailed:
    """A stream failed by the node's fault. `jitter`, 0 to 1, adds up to 1/4 to the back-off."""

    jitter: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamDeclined:
    """It would not take a request now. `pause_s` is what it asks for; `jitter` as of a failure."""

    pause_s: float | None = None
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Spared:
    """Another node has just declined: one that is on trial for the same waits a little more."""


@dataclass(frozen=True, slots=True)
class Drained:
    """It shall take nothing new."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """It shall take requests again."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


HealthEvent = (
    Answered
    | Silent
    | StreamFinished
    | StreamFailed
    | StreamDeclined
    | Spared
    | Drained
    | Resumed
    | Ticked
)


class _Reach(Enum):
    UNKNOWN = "unknown"
    GOOD = "good"
    LOST = "lost"


class _Breaker(Enum):
    CLOSED = "closed"
    OPEN = "open"
    TRIAL = "trial"


@dataclass(slots=True)
class Health:
    """One node's health: `handle(event, now)`, with `now` in monotonic seconds."""

    rules: HealthRules = HealthRules()
    retry_at: float | None = None  # when an open breaker lets the first request in
    aside_until: float | None = None  # it has declined
    _draining: bool = False
    _reach: _Reach = _Reach.UNKNOWN
    _breaker: _Breaker = _Breaker.CLOSED
    _silent: int = 0  # questions unanswered in a row
    _failed: int = 0  # streams failed in a row
    _good: int = 0  # streams finished in a row
    _opened: int = 0  # times in a row that the breaker opened: the back-off's exponent
    _declined: int = 0  # times in a row that it was set aside
    _recent: deque[bool] = field(default_factory=deque[bool])

    def __repr__(self) -> str:
        return (
            f"<Health {self.state.value} breaker={self._breaker.value} silent={self._silent}"
            f" failed={self._failed} opened={self._opened} retry_at={self.retry_at}>"
        )

    def validate(self) -> None:
        """Assert the invariants."""
        assert (self._breaker is _Breaker.OPEN) == (self.retry_at is not None), self
        assert len(self._recent) <= self.rules.window, self
        assert self._breaker is _Breaker.CLOSED or not self._recent, self
        assert min(self._silent, self._failed, self._good, self._opened) >= 0, self
        assert self._declined or self.aside_until is None, self
        assert not (self._failed and self._good), self

    @property
    def state(self) -> NodeState:
        """Where the node is in its life."""
        if self._draining:
            return NodeState.DRAINING
        if self._reach is _Reach.UNKNOWN:
            return NodeState.STARTING
        if self._reach is _Reach.LOST:
            return NodeState.DOWN
        well = self._breaker is _Breaker.CLOSED and not self._declined
        return NodeState.UP if well else NodeState.SUSPECT

    @property
    def wake_at(self) -> float | None:
        """When time alone will change something next."""
        times = [at for at in (self.retry_at, self.aside_until) if at is not None]
        return min(times, default=None)

    def slots(self, slots: int) -> int:
        """How many of the node's slots may be used now."""
        match self.state:
            case NodeState.UP:
                return slots
            case NodeState.SUSPECT if self.wake_at is None:
                return min(slots, 1)
            case _:
                return 0

    def handle(self, event: HealthEvent, now: float) -> NodeState:
        """Take what was seen at `now`; returns the state that follows."""
        self._pass_time(now)
        match event:
            case Answered():
                self._reach, self._silent = _Reach.GOOD, 0
            case Silent(loading=loading):
                self._unanswered(loading=loading)
            case StreamFinished():
                self._finished()
            case StreamFailed(jitter=jitter):
                self._fail(now, jitter)
            case StreamDeclined(pause_s=pause_s, jitter=jitter):
                self._decline(now, pause_s, jitter)
            case Spared() if self._declined and self.aside_until is None:
                self.aside_until = now + self.rules.backoff_s
            case Drained() | Resumed():
                self._draining = isinstance(event, Drained)
            case _:  # what time does is done
                pass
        return self.state

    def _pass_time(self, now: float) -> None:
        if self.retry_at is not None and now >= self.retry_at:
            self._breaker, self.retry_at = _Breaker.TRIAL, None
            self._good = self._failed = 0
        if self.aside_until is not None and now >= self.aside_until:
            self.aside_until = None

    def _unanswered(self, *, loading: bool) -> None:
        self._silent += 1
        if self._reach is _Reach.UNKNOWN:
            if not loading:
                self._reach = _Reach.LOST
        elif self._silent >= self.rules.silent_max:
            self._reach = _Reach.LOST

    def _finished(self) -> None:
        self._silent = 0  # who streams is alive, though too busy for questions
        if self.aside_until is None:
            self._declined = 0
        if self._breaker is _Breaker.OPEN:
            return  # begun before it opened
        self._failed = 0
        self._good += 1
        if self._breaker is _Breaker.CLOSED:
            self._note(good=True)
            if self._good >= self.rules.window:
                self._opened = 0
        elif self._good >= self.rules.trials:
            self._breaker, self._good = _Breaker.CLOSED, 0

    def _fail(self, now: float, jitter: float) -> None:
        assert 0.0 <= jitter <= 1.0, jitter
        if self._breaker is _Breaker.OPEN:
            return
        self._good = 0
        self._failed += 1
        if self._breaker is _Breaker.CLOSED:
            self._note(good=False)
            if self._failed < self.rules.failures_max and not self._too_many():
                return
        self.retry_at = now + self._backoff_s(self._opened, jitter)
        self._breaker = _Breaker.OPEN
        self._opened += 1
        self._recent.clear()

    def _decline(self, now: float, pause_s: float | None, jitter: float) -> None:
        if self.aside_until is not None:
            return  # begun before it was set aside
        wanted = 0.0 if pause_s is None else min(pause_s, self.rules.aside_max_s)
        self.aside_until = now + max(wanted, self._backoff_s(self._declined, jitter))
        self._declined += 1

    def _backoff_s(self, times: int, jitter: float) -> float:
        doubled = self.rules.backoff_s * 2.0 ** min(times, 32)
        return min(doubled, self.rules.backoff_max_s) * (1.0 + jitter / 4.0)

    def _note(self, *, good: bool) -> None:
        self._recent.append(good)
        if len(self._recent) > self.rules.window:
            self._recent.popleft()

    def _too_many(self) -> bool:
        failed = self._recent.count(False)
        enough = len(self._recent) >= self.rules.window_min
        return enough and failed >= self.rules.ratio * len(self._recent)
