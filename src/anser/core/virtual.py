"""Virtual time: how far those who are served have come in one pool.

A *pool* is a set of models that compete for slots, because a node serves two of them, or two of
them share a third. Fairness is promised among those who wait for the same slots; keys of different
pools have nothing to do with each other, since one pool may serve in a second what another serves
in an hour.

Sources: start-time fair queueing (Goyal, Vin, Cheng, 1996) for virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

__all__ = ["Pool", "Virtual"]

_HORIZON_S = 60.0


class Pool:
    """Models that compete for the same slots, directly or by way of others. It is an identity.

    Batch requests have keys of their own, in the pool's `batch`: what waits there, served only when
    there is nothing better to do, says nothing of where a newcomer should stand.
    """

    __slots__ = ("batch", "number")

    def __init__(self, number: int, *, batch: bool = False) -> None:
        self.number = number
        self.batch = self if batch else Pool(number, batch=True)

    def __repr__(self) -> str:
        return f"<Pool {self.number}>"


@dataclass(slots=True)
class Virtual:
    """The virtual time of one pool among the children of one account."""

    now: int = 0  # the largest key ever dispatched, in micro-credits per share
    _former: int = 0  # what it was one to two horizons ago
    _marked: int = 0
    _marked_at: float = -inf

    def advance(self, key: int, at: float) -> int:
        """A child with this key was given a slot at `at`, in monotonic seconds; tells the reach."""
        if self.now < key:
            self.now = key
        if at - self._marked_at >= _HORIZON_S:
            self._former, self._marked, self._marked_at = self._marked, self.now, at
        return self.reach

    @classmethod
    def joint(cls, former: Iterable[Virtual]) -> Virtual:
        """One that goes on from several: as far as the furthest, and at the pace of the fastest."""
        all_ = list(former)
        now = max(one.now for one in all_)
        return cls(
            now=now,
            _former=now - max(one.now - one._former for one in all_),
            _marked=now - max(one.now - one._marked for one in all_),
            _marked_at=max(one._marked_at for one in all_),
        )

    @property
    def reach(self) -> int:
        """Ahead of virtual time by what it has grown in the last minute or two."""
        return 2 * self.now - self._former
