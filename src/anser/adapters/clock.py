"""The machine's own clocks."""

from __future__ import annotations

import time

__all__ = ["SystemClock"]


class SystemClock:
    """Time as the operating system gives it."""

    def now(self) -> float:
        """Monotonic seconds since an arbitrary origin."""
        return time.monotonic()

    def wall(self) -> float:
        """Unix seconds; may jump."""
        return time.time()  # noqa: TID251  the one place that asks
