"""An event loop whose time jumps to the next timer: hours pass in moments, and nothing sleeps.

Theory of operation. asyncio asks its selector to wait until the next timer is due; this one moves
the clock by that much instead and returns at once. So everything that happens "at the same time"
happens in the order in which it was scheduled, and the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from anser.adapters.memory import MemoryClock

__all__ = ["run"]

_T = TypeVar("_T")


class _Jumper(selectors.BaseSelector):
    """A selector that lets virtual time pass instead of waiting. `jumped` is told of each jump."""

    def __init__(self, clock: MemoryClock, jumped: Callable[[], None]) -> None:
        self._inner = selectors.SelectSelector()
        self._clock = clock
        self._jumped = jumped

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for somebody else: a deadlock"
        if timeout > 0:
            self._clock.advance(timeout)
            self._jumped()
        return self._inner.select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: MemoryClock, jumped: Callable[[], None]) -> None:
        super().__init__(_Jumper(clock, jumped))
        self._clock = clock

    def time(self) -> float:
        return self._clock.now()


def run(
    main: Callable[[], Coroutine[Any, Any, _T]],
    *,
    clock: MemoryClock,
    jumped: Callable[[], None],
) -> _T:
    """Run `main` to its end on `clock`, calling `jumped` whenever all that could happen has."""
    with asyncio.Runner(loop_factory=lambda: _Loop(clock, jumped)) as runner:
        return runner.run(main())
