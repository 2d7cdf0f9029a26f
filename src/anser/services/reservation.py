"""The place of a request in the limits of its member and of all above it, until it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from anser.core.allowance import Allowance

__all__ = ["Account", "Books", "Reservation"]

_OUTPUT_FIRST_GUESS = 256.0
_OUTPUT_MEMORY = 0.2  # weight of the newest answer in the moving average


class Books(Protocol):
    """Where reservations are kept."""

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Correct a reservation to the tokens that its request took; called once."""
        ...

    def headers(self, path: tuple[Account, ...]) -> dict[str, str]:
        """The x-ratelimit headers of the tightest limits of these accounts."""
        ...


@dataclass(slots=True)
class Account:
    """What is remembered of an active member: its allowance and its usual answer's length."""

    allowance: Allowance
    output_tokens: float = _OUTPUT_FIRST_GUESS

    def learn(self, output_tokens: int) -> None:
        """Take the length of one more answer into the moving average."""
        self.output_tokens += _OUTPUT_MEMORY * (output_tokens - self.output_tokens)


@dataclass(slots=True)
class Reservation:
    """The place of one admitted request in the limits of its member and all above it."""

    members: Books
    member: str
    tokens: int
    _path: tuple[Account, ...]
    _queued: bool = True
    _settled: bool = False

    def started(self) -> None:
        """The request runs; it no longer counts as waiting."""
        if self._queued:
            self._queued = False
            for account in self._path:
                account.allowance.queued -= 1

    def requeued(self) -> None:
        """The request waits again, because its node failed."""
        if not self._queued:
            self._queued = True
            for account in self._path:
                account.allowance.queued += 1

    def settle(self, *, prompt_tokens: int, completion_tokens: int, typical: bool = False) -> None:
        """The request has ended: put what it really took in place of the estimate. Idempotent.

        `typical` is a whole answer, from which the length of the next one is guessed.
        """
        if self._settled:
            return
        self._end()
        self.members.settle(self, prompt_tokens + completion_tokens)
        if typical:
            self._path[-1].learn(completion_tokens)

    def withdraw(self) -> None:
        """The request has never been admitted: give everything back. Idempotent."""
        if not self._settled:
            self._end()
            self.members.settle(self, 0)

    def _end(self) -> None:
        self.started()
        self._settled = True

    def accounts(self) -> tuple[Account, ...]:
        """The path's accounts, the organisation's first."""
        return self._path

    def headers(self) -> dict[str, str]:
        """The x-ratelimit headers of this member's tightest limits."""
        return self.members.headers(self._path)
