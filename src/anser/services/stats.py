"""Counters of one gateway, for metrics and for people; no member, key or prompt is in them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

__all__ = ["Histogram", "NodeRow", "Snapshot", "Stats"]

# Bucket bounds of the OpenTelemetry GenAI semantic conventions, in seconds.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_RATE_WINDOW_S = 10.0
_RATE_STEP_S = 0.25


@dataclass(slots=True)
class Histogram:
    """Counts of observations at or below each bound; the last count has no bound."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Stats:
    """What has happened since the start, and the pace of the last ten seconds."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    tokens: Counter[str] = field(default_factory=Counter[str])
    retries: int = 0
    continued: int = 0  # answers that another node went on with
    hedged: int = 0  # requests that had a second lease, for their first one was slow
    first_token_s: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_S))
    duration_s: Histogram = field(default_factory=lambda: Histogram(_DURATION_S))
    _recent: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def produced(self, tokens: int, now: float) -> None:
        """Completion tokens have been relayed at `now`."""
        if self._recent and now - self._recent[-1][0] < _RATE_STEP_S:
            at, so_far = self._recent[-1]
            self._recent[-1] = (at, so_far + tokens)
        else:
            self._recent.append((now, tokens))
        while self._recent and self._recent[0][0] < now - _RATE_WINDOW_S:
            self._recent.popleft()

    def tokens_per_s(self, now: float) -> float:
        """Completion tokens a second over the last ten seconds."""
        fresh = sum(tokens for at, tokens in self._recent if at >= now - _RATE_WINDOW_S)
        return fresh / _RATE_WINDOW_S


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """One node as people see it."""

    node: str
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The gateway at one moment."""

    queued: int
    running: int
    tokens_per_s: float
    draining: bool
    nodes: tuple[NodeRow, ...]
