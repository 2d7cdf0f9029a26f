"""The public application over an engine in memory, asked as an ASGI server asks it: no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message

from anser.adapters.blobs import DiskBlobs
from anser.adapters.clock import SystemClock
from anser.adapters.memory_engine import Fault, MemoryEngine, Pace
from anser.api.app import public_app
from anser.api.context import Services
from anser.config import Config, GatewaySettings, Loaded, MemberSettings, ServerSettings
from anser.ports import Call
from anser.services.hub import Hub
from tests.pool import Pool, open_pool

__all__ = ["Client", "Stage", "stage"]


@dataclass(slots=True)
class Client:
    """An ASGI server's side of one request: what it gives the application, and what it gets."""

    app: ASGIApp
    sent: list[Message] = field(default_factory=list)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    parts: list[bytes] = field(default_factory=list)

    async def receive(self) -> Message:
        if self.parts:
            body = self.parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self.parts)}
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, method: str, path: str, *parts: bytes, **headers: str) -> Client:
        """Let the application answer, to its end."""
        self.parts = list(parts) or [b""]
        lines = {"host": "127.0.0.1", "content_type": "application/json", **headers}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in lines.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
        }
        await self.app(scope, self.receive, self.send)
        return self

    async def post(self, body: object, path: str = "/v1/chat/completions") -> Client:
        """A call with this body, a chat completion if nothing else is said."""
        return await self.ask("POST", path, json.dumps(body, separators=(",", ":")).encode())

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


@dataclass(slots=True)
class Stage:
    """A pool with an application before it."""

    pool: Pool
    services: Services

    def client(self, app: ASGIApp | None = None) -> Client:
        return Client(app or public_app(self.services))


@asynccontextmanager
async def stage(
    folder: Path,
    *,
    slots: int = 4,
    fault: Callable[[Call], Fault | None] = lambda _: None,
    member_settings: MemberSettings | None = None,
    settings: GatewaySettings | None = None,
) -> AsyncGenerator[Stage]:
    """Services over one engine in memory."""
    engine = MemoryEngine(slots=slots, pace=Pace(step_s=0.001), fault_of=fault)
    gateway = settings or GatewaySettings(probe_interval_s=0.05)
    async with open_pool(
        {"one": engine}, member_settings=member_settings, settings=gateway
    ) as pool:
        server = ServerSettings(body_bytes_max=10_000)
        services = Services(
            loaded=Loaded.of(Config(data_dir=folder, server=server, gateway=gateway)),
            clock=SystemClock(),
            members=pool.members,
            contribution=pool.contribution,
            fleet=pool.fleet,
            gateway=pool.gateway,
            ledger=pool.ledger,
            hub=Hub((), DiskBlobs(folder)),
        )
        yield Stage(pool, services)
