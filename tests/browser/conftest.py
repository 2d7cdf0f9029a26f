"""A real platform, a real Chromium, and pages that report whatever goes wrong on them.

Everything lives in one event loop for the session: starting platforms and browsers is what costs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Request, async_playwright

from tests.browser.stage import Visitor, Visits, operate, upstream
from tests.server import Server, serving, serving_model

_ARGUMENTS = (
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """All tests here share one loop, and so one browser and one platform."""
    return "asyncio"


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform with the real model, which anybody may ask."""
    with serving_model(tmp_path_factory.mktemp("open") / "data") as pool:
        yield pool


@pytest.fixture(scope="session")
async def closed_pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A platform that wants a key, whose one node answers at once."""
    folder = tmp_path_factory.mktemp("closed") / "data"
    environment = {"ANSER_MEMBERS_ANONYMOUS": "off"}
    async with upstream("Seven geese.") as node:
        with serving(folder, "--no-engine", environment=environment) as pool:
            await operate(pool, "POST", "/nodes", {"url": node.url, "id": "quick"})
            yield pool


@pytest.fixture(scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """The system's Chromium."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=list(_ARGUMENTS), timeout=60_000
        )
        yield browser
        await browser.close()


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Visits]:
    """Make visitors: `await visit(pool, color_scheme="dark")` takes a context's options."""
    async with AsyncExitStack() as stack:

        async def make(pool: Server | str, **options: Any) -> Visitor:
            context = await browser.new_context(**{"reduced_motion": "reduce", **options})
            stack.push_async_callback(context.close)
            await context.add_init_script(_VIOLATIONS)
            origin = pool if isinstance(pool, str) else pool.url
            visitor = Visitor(await context.new_page(), origin)

            def hear(message: ConsoleMessage) -> None:
                if message.type in ("error", "warning"):
                    visitor.errors.append(f"{message.type}: {message.text}")

            def note(request: Request) -> None:
                visitor.requests.append(request.url)

            visitor.page.on("console", hear)
            visitor.page.on("pageerror", lambda error: visitor.errors.append(str(error)))
            visitor.page.on("request", note)
            visitor.page.set_default_timeout(20_000)
            return visitor

        yield make
