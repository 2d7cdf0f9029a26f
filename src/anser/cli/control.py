"""The way from a command to a platform.

Theory of operation. With `--url` a command asks that platform, with the key given. Without it, the
platform that runs on this machine's data folder is asked over its Unix socket, which only its
owner can open. Where nothing listens, the command opens the data folder itself and asks the same
application in this process. All three speak the same HTTP, so a command is written once.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx

from anser.cli.common import Place
from anser.cli.messages import tr
from anser.config import Config, Loaded
from anser.core.errors import (
    AnserError,
    DataDirInUse,
    InvalidField,
    Unauthenticated,
    Unavailable,
)
from anser.core.limits import CONNECT_TIMEOUT_S
from anser.ports import Progress
from anser.wire.sse import SseDecoder

__all__ = ["Control", "connect", "over_socket", "running", "socket_of"]

_ANSWER_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 5.0  # for a platform that holds the folder and does not listen yet
_START_POLL_S = 0.1
_STREAM_TIMEOUT_S = 600.0  # between two parts of a streamed answer
_ANSWER_BYTES_MAX = 64 * 1024 * 1024
_Query = Mapping[str, str | float]


@dataclass(slots=True)
class Control:
    """A platform that answers; `where` says which way it is reached."""

    client: httpx.AsyncClient
    where: str  # "remote" | "socket" | "store"

    def __repr__(self) -> str:
        return f"<Control {self.where} {self.client.base_url}>"

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, object]
    ) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
        """The events of a streamed answer as JSON objects; leaving early stops the answer."""
        timeout = httpx.Timeout(_STREAM_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            async with self.client.stream("POST", path, json=body, timeout=timeout) as response:
                if not response.is_success:
                    raise _refusal(response.status_code, await _whole(response))
                yield _events(response)
        except httpx.HTTPError as error:
            raise self._silent(error) from error

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: _Query | None = None,
        body: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that answers this. Raises AnserError as the platform told it."""
        try:
            request = self.client.stream(method, path, params=query, json=body)
            async with request as response:
                content = await _whole(response)
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        if not response.is_success:
            refusal = _refusal(response.status_code, content)
            if self.where == "remote" and refusal.status == 404 and path.startswith("/admin/"):
                refusal.message = f"{refusal.message} {tr('error.not_admin')}"
            raise refusal
        return _object(content)

    def _silent(self, error: httpx.HTTPError) -> Unavailable:
        reason = str(error) or type(error).__name__
        if self.where == "remote":
            return Unavailable(tr("error.silent", place=self.client.base_url, reason=reason))
        return Unavailable(tr("error.silent_here", reason=reason))


@asynccontextmanager
async def connect(
    place: Place, *, engine: bool = False, progress: Progress | None = None
) -> AsyncGenerator[Control]:
    """The platform that `place` names; with `engine`, one opened in this process can answer."""
    async with AsyncExitStack() as stack:
        if place.url:
            yield await stack.enter_async_context(_remote(place.url, place.key))
            return
        loaded = place.load()
        if engine:
            loaded.check_model()
        yield await _nearby(loaded, stack, engine=engine, progress=progress)


def socket_of(config: Config) -> Path:
    """Where the platform of this data folder listens for commands."""
    return config.data_dir / "anser.sock"


async def running(config: Config) -> bool:
    """Whether a platform answers on this data folder's socket."""
    try:
        if not stat.S_ISSOCK(os.stat(socket_of(config)).st_mode):
            return False
    except OSError:
        return False
    async with over_socket(config) as control:
        try:
            await control.client.get("/health", timeout=CONNECT_TIMEOUT_S)
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:
            return True  # it is there, and the command will hear why it does not answer
    return True


@asynccontextmanager
async def _remote(url: str, key: str | None) -> AsyncGenerator[Control]:
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidField(tr("error.key_letters"), param="key")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        client = httpx.AsyncClient(base_url=base, headers=headers, timeout=_timeout())
    except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:  # proxy, certificates
        raise Unavailable(tr("error.silent", place=url, reason=str(error))) from error
    async with client:
        yield Control(client, "remote")


@asynccontextmanager
async def over_socket(config: Config) -> AsyncGenerator[Control]:
    """The platform that listens on this data folder's socket."""
    transport = httpx.AsyncHTTPTransport(uds=str(socket_of(config)), verify=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=_timeout()
    ) as client:
        yield Control(client, "socket")


async def _nearby(
    loaded: Loaded, stack: AsyncExitStack, *, engine: bool, progress: Progress | None
) -> Control:
    """The platform of this data folder, running or opened here; one that just starts is awaited."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + _START_TIMEOUT_S
    while True:
        if await running(loaded.config):
            return await stack.enter_async_context(over_socket(loaded.config))
        try:
            here = _in_process(loaded, engine=engine, progress=progress)
            return await stack.enter_async_context(here)
        except DataDirInUse:
            if loop.time() > give_up_at:
                raise
        await asyncio.sleep(_START_POLL_S)


@asynccontextmanager
async def _in_process(
    loaded: Loaded, *, engine: bool, progress: Progress | None
) -> AsyncGenerator[Control]:
    from anser.cli.logs import log_to_stderr
    from anser.cli.transport import AppTransport
    from anser.platform import open_platform

    log_to_stderr(quiet=True)
    async with AsyncExitStack() as stack:
        opened = open_platform(loaded, engine=engine, progress=progress)
        platform = await stack.enter_async_context(opened)
        transport = AppTransport(platform.admin_app)
        client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=_timeout()
        )
        yield Control(await stack.enter_async_context(client), "store")


def _timeout() -> httpx.Timeout:
    return httpx.Timeout(_ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)


async def _whole(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > _ANSWER_BYTES_MAX:
            raise Unavailable(tr("error.not_anser", status=response.status_code))
    return b"".join(parts)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    decoder = SseDecoder()
    async for part in response.aiter_bytes():
        for data in decoder.feed(part):
            if data == b"[DONE]":
                return
            event = _object(data)
            if "error" in event:
                raise _refusal(response.status_code, data)
            yield event


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unavailable(tr("error.not_anser", status=200))
    return cast("dict[str, Any]", value)


def _refusal(status: int, content: bytes) -> AnserError:
    """The error that the platform told, with its own code."""
    try:
        detail = json.loads(content)["error"]
        message, code, kind = detail["message"], detail["code"], detail["type"]
        param = detail.get("param")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return Unavailable(tr("error.not_anser", status=status))
    if status == Unauthenticated.status:
        message = f"{message} {tr('error.key')}"
    error = AnserError(str(message), param=None if param is None else str(param))
    error.status, error.code, error.kind = status, str(code), str(kind)
    return error
