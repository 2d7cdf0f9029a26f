"""What a piece of work costs, in a unit that is the same on a fast and on a slow machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STEPS = 100_000


@dataclass(slots=True)
class Cost:
    """What the work under `measured` cost, in millions of steps of an empty loop."""

    million_steps: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the work inside by this thread's clock, against an empty loop before and after it.

    Work that grows with the square of a hostile input costs thousands. Counting covered lines makes
    honest work up to ten times dearer; a bound of some hundreds holds on every machine.
    """
    cost = Cost()
    before_s = _yardstick_s()
    began_s = time.thread_time()
    yield cost
    took_s = time.thread_time() - began_s
    step_s = max(before_s, _yardstick_s()) / STEPS
    cost.million_steps = took_s / step_s / 1e6


def _yardstick_s() -> float:
    """Return the processor seconds of `STEPS` steps of an empty loop, here and now."""
    began_s = time.thread_time()
    for _ in range(STEPS):
        pass
    return time.thread_time() - began_s
