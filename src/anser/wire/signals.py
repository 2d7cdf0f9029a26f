"""What the operator tells a platform that runs: to stop, to be quick, to read its settings anew.

Theory of operation. The first SIGINT or SIGTERM asks for an orderly end: readiness fails, nothing
new is admitted, and what runs may finish within `server.drain_s`; a second one cuts it short.
SIGHUP asks for the settings to be read anew. It is also what the system sends when a terminal goes
away; whoever started the platform in that terminal then wants it to end, so where it was started
in one that is there no more, SIGHUP is an orderly end, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["Signals"]


class Signals:
    """The operator's wishes, each an event."""

    def __init__(self) -> None:
        self.first = asyncio.Event()  # an orderly end
        self.second = asyncio.Event()  # a quick one
        self.reread = asyncio.Event()  # the settings; whoever obeys clears it
        self._terminal = _terminal()

    def __repr__(self) -> str:
        return f"<Signals first={self.first.is_set()} second={self.second.is_set()}>"

    @classmethod
    @contextmanager
    def watched(cls) -> Generator[Signals]:
        """Listen for signals while the context is open."""
        loop, wishes = asyncio.get_running_loop(), cls()
        obeyed = {signal.SIGINT: wishes.stop, signal.SIGTERM: wishes.stop}
        obeyed[signal.SIGHUP] = wishes.hang_up
        for number, action in obeyed.items():
            loop.add_signal_handler(number, action)
        try:
            yield wishes
        finally:
            for number in obeyed:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """One more wish to stop."""
        (self.second if self.first.is_set() else self.first).set()

    def hang_up(self) -> None:
        """Read anew, or stop if it is the terminal that has gone."""
        gone = self._terminal is not None and not os.isatty(self._terminal)
        (self.first if gone else self.reread).set()


def _terminal() -> int | None:
    """The file descriptor of the terminal that this process ends with, if there is one."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return None  # nohup: it is to outlive its terminal
    return next((number for number in range(3) if os.isatty(number)), None)
