"""An answer for whoever waits for its pieces: the reader of a flight that is read from.

Theory of operation. What the flight tells is kept until it is asked for; while anything is kept,
the flight is paused, so an engine is never further ahead than its reader is behind.

Invariants: what is kept is what one call of the engine brought, and the end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from anser.core.errors import AnserError
from anser.core.ledger import Usage
from anser.services.chunks import Piece
from anser.services.flight import Flight

__all__ = ["Answer"]


class Answer:
    """An answer under way: iterate its pieces; `usage` is known at the end."""

    __slots__ = ("_begun", "_error", "_kept", "_over", "_waiter", "flight")

    def __init__(self) -> None:
        self.flight: Flight  # whose reader this is
        self._kept: deque[Piece] = deque()
        self._begun = self._over = False
        self._error: AnserError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Answer kept={len(self._kept)} over={self._over}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert self._begun or not self._kept, self

    @property
    def node(self) -> str:
        """The first node that answered."""
        return self.flight.node

    @property
    def lease(self) -> str:
        """Its lease."""
        return self.flight.lease

    @property
    def limits(self) -> dict[str, str]:
        """The x-ratelimit headers of the member who asks."""
        return self.flight.limits

    @property
    def usage(self) -> Usage:
        """What the answer has cost so far."""
        return self.flight.usage

    # What the flight tells

    def began(self) -> None:
        """It has begun."""
        self._begun = True
        self._wake()

    def piece(self, piece: Piece) -> None:
        """The next piece."""
        self._kept.append(piece)
        self.flight.pause()
        self._wake()

    def ended(self) -> None:
        """That was all."""
        self._over = True
        self._wake()

    def failed(self, error: AnserError) -> None:
        """There is no more of it."""
        self._over, self._error = True, error
        self._wake()

    # Reading

    async def opening(self) -> None:
        """Return when it has begun. Raises what keeps it from beginning."""
        while not self._begun:
            self._check()
            await self._wait()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            while self._kept:
                yield self._kept.popleft()
            self._check()
            if self._over:
                return
            self.flight.resume()  # which may bring the next one at once
            if not self._kept:
                await self._wait()

    async def leave(self, error: AnserError | None = None) -> None:
        """Read no more, because of this error, if any; idempotent.

        Returns when the engine has stopped and the slot is free.
        """
        self.flight.unread(sum(piece.tokens for piece in self._kept))
        self._kept.clear()
        if error is None or error is self._error:
            self.flight.leave()
        else:
            self.flight.spoil(error)
        cut: asyncio.CancelledError | None = None
        while not self.flight.over:
            try:
                await self.flight.gone()
            except asyncio.CancelledError as cancelled:  # once more: the server ends
                cut = cancelled
                if not self.flight.hurry():
                    break
        if cut is not None:
            raise cut

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
