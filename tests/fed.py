"""A guarded connection that is fed bytes by hand: no socket, no waiting.

fed = Fed(guarded(GuardSettings(), lane), app)
fed.feed(b"POST ...")
await fed.settle()
fed.transport.written
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from anser.wire.server import GuardedProtocol

__all__ = ["Fed", "Sink"]

_TURNS = 60  # of the loop: each of a few requests by ASGI takes some


class Sink(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.writes = 0
        self.reading = True
        self.closed = False
        self.peer: tuple[str, int] = ("127.0.0.1", 5)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self.peer, "sockname": ("127.0.0.1", 80)}.get(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.written += data
        self.writes += 1

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


class Fed:
    """One connection; to be made while a loop runs."""

    def __init__(self, kind: type[GuardedProtocol], app: ASGIApp) -> None:
        config = uvicorn.Config(app, interface="asgi3", log_config=None, access_log=False)
        config.load()
        self.state = ServerState()
        self.transport = Sink()
        self.protocol = kind(config=config, server_state=self.state, app_state={})
        self.protocol.connection_made(self.transport)

    def feed(self, *parts: bytes) -> None:
        """As they come, one after the other."""
        for part in parts:
            if not self.transport.closed:
                self.protocol.data_received(part)

    async def settle(self) -> None:
        """Let the loop do all that can be done without waiting."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def leave(self) -> None:
        """The client hangs up."""
        self.transport.closed = True
        self.protocol.connection_lost(None)
