"""One thing that is to happen once, unless it is stopped before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Timer"]


class Timer:
    """On the event loop's time."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Timer running={self.running}>"

    @property
    def running(self) -> bool:
        """Whether it is still to happen."""
        return self._handle is not None

    def start(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do it in `delay_s` seconds, counted from now."""
        self.stop()
        self._handle = self._loop.call_later(delay_s, self._fire, action)

    def stop(self) -> None:
        """Do not do it."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self, action: Callable[[], None]) -> None:
        self._handle = None
        action()
