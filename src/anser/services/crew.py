"""What a flight works with: whoever its answer is for, and what all flights have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from anser.core.errors import AnserError
from anser.services.attempts import Attempts
from anser.services.chunks import Piece
from anser.services.hedge import Hedging
from anser.services.ledger import Ledger
from anser.services.settlement import Settlement

__all__ = ["Crew", "Reader"]


class Reader(Protocol):
    """Who an answer is for, told of it as it comes."""

    def began(self) -> None:
        """The first piece comes next; the flight's `node`, `lease` and `limits` are known."""
        ...

    def piece(self, piece: Piece) -> None:
        """The next piece. Raises AnserError where it is none that can be passed on."""
        ...

    def ended(self) -> None:
        """That was all, and the receipt is durable."""
        ...

    def failed(self, error: AnserError) -> None:
        """There is no answer, or no more of it; the receipt says why."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What all flights of a gateway have in common."""

    attempts: Attempts
    hedging: Hedging
    settlement: Settlement
    ledger: Ledger
