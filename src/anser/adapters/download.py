"""Fetches one file over HTTP into a partial file, going on where an earlier try stopped.

Theory of operation: the partial file's length is where to go on. A `Range` request says so; the
note beside it (`.from`) keeps the address and ETag that its bytes came from, for `If-Range`. A
server that does not do ranges, or has another file by now, answers 200 with everything, and the
partial file starts anew. Nothing that the server says is believed beyond that: what the whole is
worth is decided by whoever knows its sha256.

Redirects are followed by hand: only where the caller allows them, and without its token as soon
as the host is another.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

import httpx

from anser.core import limits
from anser.core.errors import SourceError
from anser.ports import Progress

__all__ = ["Source", "download", "not_weaker", "opened"]

_READ_TIMEOUT_S = 30.0
_RATE_WINDOW_S = 30.0
_WRITE_BYTES = 1024 * 1024


def not_weaker(here: httpx.URL, there: httpx.URL) -> bool:
    """Whether a redirect keeps https; to which host does not matter."""
    return there.scheme == "https" or here.scheme == there.scheme == "http"


def _stays(_here: httpx.URL, _there: httpx.URL) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a file is. `token` is for that host alone; `may_go` says which redirects are
    followed: by default none."""

    url: str
    size_bytes: int | None = None
    token: str | None = None
    may_go: Callable[[httpx.URL, httpx.URL], bool] = _stays


async def download(source: Source, into: Path, progress: Progress) -> None:
    """Append what is missing of `source` to `into`. Raises SourceError."""
    try:
        for _ in range(2):  # the second time after the server said that our part is too long
            if await _download_once(source, into, progress):
                return
    except httpx.HTTPError as error:
        raise _unreached(error) from error
    except OSError as error:
        raise SourceError(f"the file could not be written: {error.strerror}") from error
    raise SourceError("it has no byte of the file")


@asynccontextmanager
async def opened(
    source: Source, method: str, headers: dict[str, str]
) -> AsyncGenerator[httpx.Response]:
    """The answer to one request, its body unread, after allowed redirects. Raises SourceError."""
    timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=limits.CONNECT_TIMEOUT_S)
    try:
        async with _client(timeout) as client:
            response = await _follow(client, source, method, headers)
            try:
                yield response
            finally:
                await response.aclose()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreached(error) from error


def _client(timeout: httpx.Timeout) -> httpx.AsyncClient:
    """A client as the environment has it: its proxies and its certificates."""
    try:
        return httpx.AsyncClient(timeout=timeout, verify=_trust())
    except (ImportError, ValueError, OSError) as error:
        raise SourceError(
            "no request can be made: check the variables for proxies (https_proxy, all_proxy) and "
            f"certificates (SSL_CERT_FILE, SSL_CERT_DIR): {error}"
        ) from error


def _trust() -> ssl.SSLContext:
    """The authorities that come with httpx, those of the system, and SSL_CERT_FILE's."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


async def _follow(
    client: httpx.AsyncClient, source: Source, method: str, headers: dict[str, str]
) -> httpx.Response:
    if source.token is not None and not source.token.isascii():
        raise SourceError("its token has letters in it that no token has")
    url = home = httpx.URL(source.url)
    for _ in range(limits.REDIRECTS_MAX):
        own = dict(headers)
        if source.token is not None and _origin(url) == _origin(home):
            own["authorization"] = f"Bearer {source.token}"
        request = client.build_request(method, url, headers=own)
        response = await client.send(request, stream=True)
        target = response.next_request.url if response.next_request is not None else None
        if target is None or not source.may_go(url, target):
            return response
        await response.aclose()
        url = target
    raise SourceError("it redirects too often")


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _unreached(error: httpx.HTTPError | httpx.InvalidURL) -> SourceError:
    words = str(error) or type(error).__name__
    return SourceError(f"no answer ({words[: limits.ECHO_CHARS_MAX]})")


# --------------------------------------------------------------------------------- one try


async def _download_once(source: Source, into: Path, progress: Progress) -> bool:
    """Whether the file is complete; otherwise the partial file was dropped: try again."""
    offset = _length(into)
    if source.size_bytes is not None and offset >= source.size_bytes:
        if offset == source.size_bytes:
            return True
        offset = 0
    headers = {"accept-encoding": "identity", **_range(source, into, offset)}
    async with opened(source, "GET", headers) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            _drop(into)
            return False
        start, total = _extent(response, offset)
        if source.size_bytes is not None and total not in {None, source.size_bytes}:
            raise SourceError(f"it has another file, of {total} bytes")
        _note(source, into, response)
        await _pour(response, into, (start, total or source.size_bytes), progress)
    return True


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _range(source: Source, into: Path, offset: int) -> dict[str, str]:
    if not offset:
        return {}
    headers = {"range": f"bytes={offset}-"}
    try:
        note = json.loads(_beside(into).read_text())
        if note["url"] == source.url:
            headers["if-range"] = str(note["etag"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, no condition
    return headers


def _beside(into: Path) -> Path:
    return into.with_name(f"{into.name}.from")


def _note(source: Source, into: Path, response: httpx.Response) -> None:
    etag = response.headers.get("etag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):  # strong ones only (RFC 9110, 8.8.3)
        _beside(into).write_text(json.dumps({"url": source.url, "etag": etag}))
    else:
        _beside(into).unlink(missing_ok=True)


def _extent(response: httpx.Response, offset: int) -> tuple[int, int | None]:
    """Where the body begins in the file, and the file's length if the server tells."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise SourceError("it sent the file compressed, which was not asked for")
    if response.status_code == HTTPStatus.OK:
        length = response.headers.get("content-length", "")
        return 0, int(length) if length.isdecimal() else None
    if response.status_code == HTTPStatus.PARTIAL_CONTENT and offset:
        extent = response.headers.get("content-range", "")
        match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", extent)
        if match is None or int(match[1]) != offset:
            raise SourceError("it sent another part of the file than asked for")
        return offset, None if match[2] == "*" else int(match[2])
    raise SourceError(f"it answered HTTP {response.status_code}")


async def _pour(
    response: httpx.Response, into: Path, extent: tuple[int, int | None], progress: Progress
) -> None:
    """Write the body from its place on; too much or too little is an error."""
    start, total = extent
    with _opened_at(into, start) as file:
        written = start
        progress(written, total)
        async for chunk in _chunks(response):
            written += len(chunk)
            if total is not None and written > total:
                file.truncate(0)
                raise SourceError("it sent more than the whole file")
            await asyncio.to_thread(_write, file, chunk)
            progress(written, total)
    if total is not None and written < total:
        raise SourceError(f"it ended after {written} of {total} bytes")


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)


def _opened_at(path: Path, start: int) -> BinaryIO:
    """The file, cut off at `start` and ready to be written from there."""
    file = path.open("r+b" if path.exists() else "wb")
    try:
        file.truncate(start)
        file.seek(start)
    except OSError:
        file.close()
        raise
    return file


def _write(file: BinaryIO, chunk: bytes) -> None:
    file.write(chunk)
    file.flush()


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body in pieces worth a write. Raises SourceError if it only trickles.

    What came before the connection broke is yielded before that is raised.
    """
    clock = asyncio.get_running_loop().time
    window_end, window_bytes = clock() + _RATE_WINDOW_S, 0
    buffer = bytearray()
    broken: httpx.HTTPError | None = None
    try:
        async for chunk in response.aiter_raw():
            buffer += chunk
            window_bytes += len(chunk)
            if clock() >= window_end:
                if window_bytes < limits.DOWNLOAD_RATE_MIN * _RATE_WINDOW_S:
                    raise SourceError("it is too slow")
                window_end, window_bytes = clock() + _RATE_WINDOW_S, 0
            if len(buffer) >= _WRITE_BYTES:
                yield bytes(buffer)
                buffer.clear()
    except httpx.HTTPError as error:
        broken = error
    yield bytes(buffer)
    if broken is not None:
        raise broken
