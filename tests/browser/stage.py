"""What the browser tests play on: platforms, visitors who notice what goes wrong, and nodes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from playwright.async_api import Page

from tests.hostile import SSE_HEAD, Hostile, Talk, answer, delta, event
from tests.server import Server

__all__ = ["HOSTILE", "Visitor", "Visits", "operate", "upstream"]

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


@dataclass(slots=True)
class Visitor:
    """A page in a browser of its own, and all that went wrong on it."""

    page: Page
    origin: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def open(self, path: str = "/") -> None:
        """Go there, and wait until the page's scripts have run."""
        await self.page.goto(self.origin + path)
        await self.page.wait_for_load_state("load")

    async def until(self, expression: str, arg: object = None, *, timeout_s: float = 20) -> None:
        """Wait until it is true. Playwright's own way evaluates texts, which the policy forbids."""
        deadline = time.monotonic() + timeout_s
        while not await self.page.evaluate(expression, arg):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {expression}"
            await asyncio.sleep(0.05)

    async def ask(self, question: str) -> None:
        """Type a question and send it with Enter."""
        await self.page.fill("#message", question)
        await self.page.press("#message", "Enter")

    async def answered(self, timeout_s: float = 60) -> None:
        """Wait until no answer is under way."""
        await self.page.wait_for_selector(
            ".turn[aria-busy]", state="hidden", timeout=1e3 * timeout_s
        )
        await self.page.wait_for_selector("#send", state="visible", timeout=1e3 * timeout_s)

    async def check(self, *, refusals: int = 0) -> None:
        """Nothing was logged, blocked, or asked of anybody else; so many answers were errors."""
        expected = [text for text in self.errors if "Failed to load resource" in text]
        assert len(expected) == refusals, self.errors
        assert sorted(expected) == sorted(self.errors)
        assert await self.page.evaluate("window.violations") == []
        foreign = [url for url in self.requests if not url.startswith((self.origin, "data:"))]
        assert foreign == []


Visits = Callable[..., Awaitable[Visitor]]


async def operate(
    pool: Server, method: str, path: str, body: dict[str, object] | None = None
) -> Any:
    """Ask the admin API, as the command line does, while this loop goes on serving its nodes."""
    return await asyncio.to_thread(pool.admin, method, path, body)


def upstream(
    text: str,
    *,
    forever: bool = False,
    model: str = "quick",
    thought: dict[str, str] | None = None,
    held: asyncio.Event | None = None,
) -> Hostile:
    """A server that speaks just enough OpenAI to be a node, and always says `text`.

    First the `thought`, as a delta; neither it nor the answer comes before `held` is set.
    """

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if request.method == "POST":
                if held is not None:
                    await held.wait()
                await talk.say(SSE_HEAD, *(_thinking(thought) if thought else ()))
                await _speak(talk, text, forever=forever)
            elif request.path == "/v1/models":
                listed = {"object": "list", "data": [{"id": model, "object": "model"}]}
                await talk.say(answer(json.dumps(listed).encode()))
            else:
                await talk.say(answer(b"{}", status="404 Not Found"))

    return Hostile(script)


def _thinking(thought: dict[str, str]) -> list[bytes]:
    choice = {"index": 0, "delta": thought, "finish_reason": None}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "choices": [choice]}
    return [event(json.dumps(chunk).encode())]


async def _speak(talk: Talk, text: str, *, forever: bool) -> None:
    await talk.say(delta(text))
    while forever:
        await asyncio.sleep(0.05)
        await talk.say(delta(text))
    await talk.say(delta(finish="stop"), delta(usage=1), event(b"[DONE]"), b"0\r\n\r\n")
