"""One timer for one request's waits, one after the other.

Theory of operation. A request always waits for one thing: a slot, a token, its receipt. `set` says
how long from now; setting it again replaces that. The loop's timer is moved only when it has to
ring earlier; when it rings too early, it goes on to sleep for the rest, so that setting it for each
token costs next to nothing.

While `held`, as long as a client takes nothing, time does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

__all__ = ["Alarm"]


class Alarm:
    """Calls `ring` when what was waited for has not come in time. Times in seconds."""

    __slots__ = ("_due", "_early_s", "_held_at", "_loop", "_ring", "_timer")

    def __init__(self, ring: Callable[[], None], *, early_s: float) -> None:
        """`early_s` is how long most waits are: nothing that is set later moves the timer then."""
        self._ring = ring
        self._early_s = early_s
        self._loop = asyncio.get_running_loop()
        self._due = inf
        self._held_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Alarm in {self._due - self._loop.time():.3f} s held={self.held}>"

    @property
    def held(self) -> bool:
        """Whether time does not count."""
        return self._held_at is not None

    def set(self, seconds: float) -> None:
        """Ring in so many seconds from now."""
        now = self._loop.time()
        self._due = due = now + seconds
        timer = self._timer
        if timer is None or timer.when() > due:
            if timer is not None:
                timer.cancel()
            self._timer = self._loop.call_at(now + min(seconds, self._early_s), self._look)

    def unset(self) -> None:
        """Do not ring until it is set again."""
        self._due = inf

    def cancel(self) -> None:
        """It is needed no more, and keeps hold of nobody."""
        self._due, self._ring = inf, _nobody
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hold(self) -> None:
        """From now on time does not count."""
        self._held_at = self._loop.time()

    def go_on(self) -> None:
        """Time counts again."""
        if self._held_at is not None:
            self._due += self._loop.time() - self._held_at
            self._held_at = None

    def _look(self) -> None:
        self._timer = None
        now, due = self._loop.time(), self._due
        if self._held_at is not None:
            due += now - self._held_at
        if due == inf:
            return
        if now < due:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self._ring()


def _nobody() -> None:
    """Who is called when an alarm is needed no more."""
