"""The bound of fairness, measured: what two siblings were served apart, of what they may come to.

Theory of operation. A `Side` is one member: what it was served per share of its weight, and the
extremes of what its part of the bound is made of: U, what its running requests can still come to,
and R, what it was charged beyond what it was served, which may be taken back. A `Pair` is two of
them for as long as both wait for the same slots; what they are apart is the range of the difference
of their services in that time, so nothing hides between two moments. All are micro-credits per
share.

U and R are of a side's whole life, not of the time that both wait: who comes back owes what its
earlier requests came to.

The theorem and its proof: docs/explanation/fairness.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pair", "Side"]


@dataclass(slots=True, eq=False)
class Side:
    """One sibling."""

    served: float = 0.0
    due_most: float = 0.0
    reserved_most: float = 0.0
    reserved_least: float = 0.0

    def note(self, *, served: float, due: float, charged: float) -> None:
        """It has been served and charged so much by now, and what it runs can come to `due` more.

        `served` never falls: it leaves out what may be taken back.
        """
        self.served = served
        self.due_most = max(self.due_most, due)
        self.reserved_most = max(self.reserved_most, charged - served)
        self.reserved_least = min(self.reserved_least, charged - served)

    @property
    def reserved(self) -> float:
        """R per share: the most that was charged and taken back."""
        return self.reserved_most - self.reserved_least

    @property
    def slack(self) -> float:
        """(U + R) / phi: its part of the bound."""
        return self.due_most + self.reserved


class Pair:
    """Two siblings, from when both wait for the same slots.

    `drawn` is how far a third one had drawn them apart before: who comes is lifted to the least key
    of all that wait, which is lower by what was taken back of that one.
    """

    __slots__ = ("_drawn", "_first", "_least", "_most", "_second")

    def __init__(self, first: Side, second: Side, *, drawn: float = 0.0) -> None:
        self._first, self._second, self._drawn = first, second, drawn
        self._least = self._most = first.served - second.served

    def part(self, window: float) -> float:
        """How much of their bound they are apart: above 1.0 it is broken."""
        ahead = self._first.served - self._second.served
        self._least, self._most = min(self._least, ahead), max(self._most, ahead)
        bound = self._first.slack + self._second.slack + 2 * window + self._drawn
        return (self._most - self._least) / bound if bound else 0.0
