"""A page of another site asks from a real browser: where its origin is listed, and where not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.browser.stage import operate, upstream
from tests.server import Server, serving

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

_ASK = """async ([url, key]) => {
  const body = {model: "quick", stream: true, messages: [{role: "user", content: "hello"}]};
  const headers = {authorization: `Bearer ${key}`, "content-type": "application/json",
                   "x-stainless-os": "Linux"};
  try {
    const options = {method: "POST", headers, body: JSON.stringify(body)};
    const answer = await fetch(`${url}/v1/chat/completions`, options);
    return [answer.status, answer.headers.get("x-request-id"), await answer.text()];
  } catch (error) { return [0, null, String(error)]; }
}"""


@asynccontextmanager
async def site() -> AsyncGenerator[str]:
    """The origin of a site with one empty page."""

    async def show(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n"
        writer.write(head + b"<!doctype html><title>x</title>")
        writer.close()

    server = await asyncio.start_server(show, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def asked(browser: Browser, origin: str, pool: Server, key: str) -> list[Any]:
    """Status, request and text of the pool's answer as a page of `origin` sees them."""
    page = await browser.new_page()
    try:
        await page.goto(f"{origin}/")
        seen: list[Any] = await page.evaluate(_ASK, [pool.url, key])
        return seen
    finally:
        await page.close()


async def test_a_listed_site_reads_streams_and_errors(browser: Browser, tmp_path: Path) -> None:
    """Chromium shows it answers, refusals and our headers; a site that is not listed sees none."""
    async with site() as listed, site() as other, upstream("Seven geese.") as node:
        environment = {"ANSER_SERVER_CORS_ORIGINS": listed}
        with serving(tmp_path / "data", "--no-engine", environment=environment) as pool:
            await operate(pool, "POST", "/nodes", {"url": node.url, "id": "quick"})
            status, name, text = await asked(browser, listed, pool, pool.key)
            assert status == 200, text
            assert name.startswith("req_")
            assert "data: [DONE]" in text
            status, _, text = await asked(browser, listed, pool, "hf_wrong")
            assert status == 401
            assert "invalid_api_key" in text
            assert (await asked(browser, other, pool, pool.key))[0] == 0
