"""The pool's live state in a real browser."""

from __future__ import annotations

import pytest

from tests.browser.stage import Visits, operate, upstream
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

STATE = """
([id, state]) => [...document.querySelectorAll(".node")].some(
  (row) => row.dataset.state === state && row.querySelector(".name").textContent === id)
"""
GONE = """
(id) => ![...document.querySelectorAll(".node .name")].some((name) => name.textContent === id)
"""
# Headless pages are always visible, so the state is set where the page reads it.
TURN = """
(state) => {
  Object.defineProperty(document, "visibilityState", { get: () => state.now });
  window.turn = (to) => {
    state.now = to;
    document.dispatchEvent(new Event("visibilitychange"));
  };
  turn("hidden");
}
"""


async def test_nodes_come_and_go_before_your_eyes(pool: Server, visit: Visits) -> None:
    """A node that is added, drained and removed is seen so within seconds, without a reload."""
    visitor = await visit(pool)
    await visitor.open()
    page = visitor.page
    async with upstream("hi", model="passing") as node:
        body = {"url": node.url, "id": "passing", "slots": 3}
        await operate(pool, "POST", "/nodes", body)
        await visitor.until(STATE, ["passing", "up"])
        assert "passing" in await page.locator("#model option").all_inner_texts()
        row = page.locator(".node", has_text="passing")
        assert await row.locator(".goose").count() == 3
        assert await row.locator(".count").inner_text() == "0 of 3"
        await operate(pool, "POST", "/nodes/passing/drain", {})
        await visitor.until(STATE, ["passing", "draining"])
        await operate(pool, "DELETE", "/nodes/passing")
        await visitor.until(GONE, "passing")
    await visitor.check()


async def test_shares_are_seen_while_they_change(pool: Server, visit: Visits) -> None:
    """The visitor's own part is told once it has asked something, and what is due to it."""
    async with upstream("honk ", model="fair") as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "fair", "slots": 2})
        try:
            visitor = await visit(pool)
            await visitor.open()
            await visitor.page.select_option("#model", "fair")
            await visitor.ask("Fly.")
            await visitor.answered()
            part = '() => document.getElementById("fair-own").textContent.endsWith(" %")'
            await visitor.until(part)
            assert "due" in await visitor.page.locator("#fair-due").inner_text()
            assert await visitor.page.locator("#fair-even").inner_text() != "–"
            await visitor.check()
        finally:
            await operate(pool, "DELETE", "/nodes/fair")


async def test_work_is_seen_while_it_is_done(pool: Server, visit: Visits) -> None:
    """While an answer runs a goose flies and is counted; afterwards none does."""
    async with upstream("honk ", forever=True, model="busy") as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "busy", "slots": 2})
        try:
            visitor = await visit(pool)
            await visitor.open()
            await visitor.page.select_option("#model", "busy")
            await visitor.ask("Fly.")
            await visitor.until("document.querySelectorAll('.goose.flying').length === 1")
            row = visitor.page.locator(".node", has_text="busy")
            assert await row.locator(".count").inner_text() == "1 of 2"
            await visitor.until("Number(document.getElementById('pace').textContent) > 0")
            await visitor.page.click("#stop")
            await visitor.until("document.querySelectorAll('.goose.flying').length === 0")
            await visitor.check()
        finally:
            await operate(pool, "DELETE", "/nodes/busy")


async def test_nobody_looking_nobody_asking(pool: Server, visit: Visits) -> None:
    """A page in the background does not poll, and asks at once when it is looked at again."""
    visitor = await visit(pool)
    await visitor.open()
    await visitor.page.evaluate(TURN, {"now": "visible"})
    await visitor.page.wait_for_timeout(500)
    before = len(visitor.requests)
    await visitor.page.wait_for_timeout(5_000)
    assert len(visitor.requests) == before
    async with visitor.page.expect_request("**/v1/pool", timeout=1_000):
        await visitor.page.evaluate("turn('visible')")
    await visitor.check()
