"""How much of the service of the last minutes went to batch requests.

Theory of operation. Two sums that are halved every minute; only their ratio is asked for, so both
are kept in units of one moment, which is moved on once a second at most.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bands"]

_HALF_LIFE_S = 60.0
_STEP_S = 1.0


@dataclass(slots=True)
class Bands:
    """The service of both bands, and of batch alone, fading."""

    _all: float = 0.0
    _batch: float = 0.0
    _at: float = 0.0

    def pay(self, micro_credits: int, now: float, *, batch: bool) -> None:
        """So much was charged, or given back if negative."""
        if now - self._at >= _STEP_S:
            self._fade(now)
        self._all += micro_credits
        if batch:
            self._batch += micro_credits

    def batch_share(self, now: float) -> float:
        """Which part of all service went to batch, 0 to 1; 0 where there was none."""
        if now - self._at >= _STEP_S:
            self._fade(now)
        return self._batch / self._all if self._all > 0 else 0.0

    def _fade(self, now: float) -> None:
        faded = 0.5 ** ((now - self._at) / _HALF_LIFE_S)
        self._all *= faded
        self._batch *= faded
        self._at = now
