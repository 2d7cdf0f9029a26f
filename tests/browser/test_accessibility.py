"""axe finds nothing to object to, whatever the language, the light and the width."""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.browser.stage import Visitor, Visits
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

VENDOR = Path(__file__).parent / "vendor"
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


@cache
def axe() -> str:
    """The vendored axe-core, if it is the file that the README beside it names."""
    data = (VENDOR / "axe.min.js").read_bytes()
    assert sha256(data).hexdigest() in (VENDOR / "README.md").read_text()
    return data.decode()


async def violations(visitor: Visitor) -> list[str]:
    """What axe objects to, with the elements concerned."""
    await visitor.page.evaluate(axe())
    options = {"runOnly": {"type": "tag", "values": TAGS}, "resultTypes": ["violations"]}
    result: dict[str, Any] = await visitor.page.evaluate("(options) => axe.run(options)", options)
    return [
        f"{found['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for found in result["violations"]
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("width", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
async def test_the_first_page(
    closed_pool: Server, visit: Visits, *, language: str, scheme: str, width: dict[str, int]
) -> None:
    """A fresh page, then one with an answer and a failure on it, have no violation."""
    visitor = await visit(closed_pool, color_scheme=scheme, viewport=width)
    await visitor.open(f"/?lang={language}")
    assert await violations(visitor) == []
    await visitor.page.fill("#key", closed_pool.key)
    await visitor.page.press("#key", "Tab")
    await visitor.page.wait_for_selector(".node[data-state=up]")
    await visitor.ask("How many?")
    await visitor.answered()
    await visitor.page.context.set_offline(True)
    await visitor.ask("And now?")
    await visitor.answered()
    assert await visitor.page.locator(".trouble:visible").count() == 1
    assert await violations(visitor) == []
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await visitor.page.evaluate(wide) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_missing_page(pool: Server, visit: Visits, *, scheme: str) -> None:
    """The 404 page has no violation."""
    visitor = await visit(pool, color_scheme=scheme)
    await visitor.open("/nowhere")
    assert await violations(visitor) == []


async def test_still_for_those_who_want_it_still(pool: Server, visit: Visits) -> None:
    """Nothing moves by itself where less motion is asked for; the skein does where it is not."""
    moving = "document.getAnimations().length"
    still = await visit(pool, reduced_motion="reduce")
    await still.open()
    assert await still.page.evaluate(moving) == 0
    lively = await visit(pool, reduced_motion="no-preference")
    await lively.open()
    assert await lively.page.evaluate(moving) > 0


def test_licences_are_kept() -> None:
    """What is vendored is listed with version and licence, and its licence lies beside it."""
    readme = (VENDOR / "README.md").read_text()
    assert re.search(r"axe-core.*\d+\.\d+\.\d+.*MPL-2\.0", readme)
    assert "Mozilla Public License" in (VENDOR / "LICENSE-axe-core.txt").read_text()
