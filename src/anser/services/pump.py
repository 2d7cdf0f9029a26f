"""The stream of an engine that has to be asked for each chunk: a task asks, and tells of them.

Theory of operation. Engines that run a model in this process, or a memory of one, give an iterator
over their chunks (`Engine.generate`). `open_stream` makes a Stream of it: one task holds the
engine's context open, takes chunk after chunk and tells its receiver. To stop is to cancel that
task, which leaves the context, on which the engine stops. Whoever opened the stream owns the task,
and hears of its end: `ended`, `failed`, or what was given to `abort`.

Engines that tell of their chunks by themselves (`Starter`) need no such task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from anser.core.errors import AnserError
from anser.ports import Call, Engine, Receiver, Starter, Stream
from anser.services.bugs import bug

__all__ = ["open_stream"]


def open_stream(engine: Engine, call: Call, receiver: Receiver) -> Stream:
    """Open one answer; whatever fails is told to `receiver`, after this has returned."""
    if isinstance(engine, Starter):
        return engine.start(call, receiver)
    return _Pump(engine.generate(call), receiver)


class _Pump:
    """One answer that a task asks for."""

    __slots__ = ("_context", "_open", "_receiver", "_stopped", "_task")

    def __init__(
        self, context: AbstractAsyncContextManager[AsyncIterator[bytes]], receiver: Receiver
    ) -> None:
        self._context = context
        self._receiver: Receiver | None = receiver
        self._stopped: Callable[[], None] | None = None
        self._open: asyncio.Event | None = None  # while paused: set when it goes on
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._end)

    def __repr__(self) -> str:
        paused = self._open is not None
        return f"<_Pump paused={paused} told={self._receiver is not None}>"

    def pause(self) -> None:
        """Ask for no more."""
        if self._open is None:
            self._open = asyncio.Event()

    def resume(self) -> None:
        """Go on."""
        if self._open is not None:
            self._open.set()
            self._open = None

    def abort(self, stopped: Callable[[], None]) -> None:
        """Leave the engine's context; `stopped` is called when that is done."""
        self._receiver = None
        if self._task.done():
            stopped()
        else:
            self._stopped = stopped
            self._task.cancel()

    def hurry(self) -> None:
        """Cut short what the engine does when its context is left."""
        self._task.cancel()

    async def _run(self) -> None:
        """Tell of every chunk; returns when the engine's context has been left."""
        async with self._context as chunks:
            async for data in chunks:
                if self._receiver is None:
                    break
                self._receiver.chunk(data)
                while self._open is not None:
                    await self._open.wait()
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    def _end(self, task: asyncio.Task[None]) -> None:
        receiver, self._receiver = self._receiver, None
        error = None if task.cancelled() else task.exception()
        if receiver is None:
            if self._stopped is not None:
                self._stopped()
        elif error is None and not task.cancelled():
            receiver.ended()
        elif isinstance(error, AnserError):
            receiver.failed(error)
        else:
            receiver.failed(bug(error))
