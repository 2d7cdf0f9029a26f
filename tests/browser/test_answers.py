"""What the chat box shows while an answer comes, and when it is not as one would wish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.browser.stage import Visitor, Visits, operate, upstream
from tests.hostile import Hostile
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]


@asynccontextmanager
async def talking_to(
    node: Hostile, pool: Server, visit: Visits, model: str, *, slots: int = 2
) -> AsyncIterator[Visitor]:
    """A visitor who has chosen the model of a node."""
    async with node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": model, "slots": slots})
        try:
            visitor = await visit(pool, permissions=["clipboard-read", "clipboard-write"])
            await visitor.open()
            await visitor.page.select_option("#model", model)
            yield visitor
            await visitor.check()
        finally:
            await operate(pool, "DELETE", f"/nodes/{model}")


async def status_is(visitor: Visitor, text: str) -> None:
    """Wait until the status line says this."""
    await visitor.until("text => document.getElementById('status').textContent === text", text)


async def test_escape_stops_what_send_began(pool: Server, visit: Visits) -> None:
    """After a click on Send the focus is on Stop, never lost, and Escape stops from anywhere."""
    node = upstream("honk ", forever=True, model="clicked")
    async with talking_to(node, pool, visit, "clicked") as visitor:
        page = visitor.page
        await page.fill("#message", "Do not stop.")
        await page.click("#send")
        await status_is(visitor, "Answering")
        assert await page.evaluate("document.activeElement.id") == "stop"
        await page.keyboard.press("Escape")
        await status_is(visitor, "Stopped")
        assert await page.evaluate("document.activeElement.id") == "message"
        await page.fill("#message", "Nor now.")
        await page.keyboard.press("Enter")
        await status_is(visitor, "Answering")
        await page.evaluate("document.activeElement.blur()")
        await page.keyboard.press("Escape")
        await status_is(visitor, "Stopped")


async def test_waiting_says_what_for(pool: Server, visit: Visits) -> None:
    """Nobody is said to be in line who is not; who is, is told so."""
    held = asyncio.Event()
    node = upstream("hi", model="slow", held=held)
    async with talking_to(node, pool, visit, "slow", slots=1) as visitor:
        await visitor.ask("First.")
        await status_is(visitor, "Waiting for the first word")
        other = await visit(pool)
        await other.open()
        await other.page.select_option("#model", "slow")
        await other.ask("Second.")
        await status_is(other, "Waiting; in line for a slot: 1")
        held.set()
        for each in (visitor, other):
            await each.answered()
            await status_is(each, "Finished")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_thoughts_are_shown_apart(pool: Server, visit: Visits, *, name: str) -> None:
    """What a model thinks is shown at once, apart from its answer, and is not sent back to it."""
    thought = {name: "They take turns, so"}
    node = upstream("In a V.", model=f"thinker-{name}", thought=thought)
    async with talking_to(node, pool, visit, f"thinker-{name}") as visitor:
        bodies: list[str] = []
        visitor.page.on("request", lambda request: bodies.append(request.post_data or ""))
        await visitor.ask("How?")
        await visitor.answered()
        assert await visitor.page.locator(".thought p").text_content() == thought[name]
        assert await visitor.page.locator(".turn.assistant .text").text_content() == "In a V."
        await visitor.ask("Why?")
        await visitor.answered()
        assert not any("They take turns" in body for body in bodies)


async def test_an_empty_answer_is_said_to_be_one(pool: Server, visit: Visits) -> None:
    """An answer without a word says so; the question stays where it was asked."""
    async with talking_to(upstream("", model="mute"), pool, visit, "mute") as visitor:
        await visitor.ask("Anybody?")
        await visitor.answered()
        page = visitor.page
        assert await page.locator(".turn .trouble").inner_text() == "The model gave no answer."
        assert await page.locator("#status").inner_text() == ""
        assert await page.locator(".turn.user .text").inner_text() == "Anybody?"
        assert await page.input_value("#message") == ""


async def test_a_text_turns_nothing_around_but_itself(pool: Server, visit: Visits) -> None:
    """What a model writes has its own direction, which ends with it."""
    node = upstream("\u202eesoog", model="mirror")
    async with talking_to(node, pool, visit, "mirror") as visitor:
        await visitor.ask("Which way?")
        await visitor.answered()
        seen = "getComputedStyle(document.querySelector('.turn.assistant .text')).unicodeBidi"
        assert await visitor.page.evaluate(seen) == "plaintext"
        for name in ("who", "text", "facts"):
            found = visitor.page.locator(f".turn.assistant .{name}").first
            assert await found.get_attribute("dir") == "auto"


async def test_facts_are_well_said(pool: Server, visit: Visits) -> None:
    """One token is not several, no answer takes no time, and its receipt is one command away."""
    async with talking_to(upstream("Honk.", model="brisk"), pool, visit, "brisk") as visitor:
        await visitor.ask("Say it.")
        await visitor.answered()
        facts = await visitor.page.locator(".turn .facts").inner_text()
        assert " 1 token " in facts
        assert " 0 s" not in facts
        await visitor.page.click(".turn .facts button")
        await visitor.page.wait_for_selector(".turn .facts button:has-text('Copied')")
        command = await visitor.page.evaluate("navigator.clipboard.readText()")
        assert command.startswith("anser receipt get req_")
        assert command.endswith(f"--url {pool.url}")


async def test_small_models_come_with_a_warning(pool: Server, visit: Visits) -> None:
    """Only models that are small by their names are said to be often wrong."""
    node = upstream("hi", model="large-70b-instruct")
    async with talking_to(node, pool, visit, "large-70b-instruct") as visitor:
        assert await visitor.page.locator("#small").is_hidden()
        first = visitor.page.locator("#model option").filter(has_text="smollm2-135m")
        await visitor.page.select_option("#model", await first.get_attribute("value"))
        assert await visitor.page.locator("#small").is_visible()


async def test_models_of_dead_nodes_look_dead(pool: Server, visit: Visits) -> None:
    """When its only node is lost a model stays listed, greyed, and can no longer be chosen."""
    node = upstream("hi", model="mortal")
    await node.__aenter__()
    await operate(pool, "POST", "/nodes", {"url": node.url, "id": "mortal", "slots": 7})
    try:
        visitor = await visit(pool)
        await visitor.open()
        await visitor.until("document.querySelector('#model option[value=mortal]:enabled')")
        slots = await visitor.page.locator("#running-of").inner_text()
        await node.__aexit__(None, None, None)
        await visitor.until(
            "document.querySelector('#model option[value=mortal]:disabled')", timeout_s=40
        )
        row = visitor.page.locator(".model", has_text="mortal")
        assert await row.get_attribute("data-ready") == "no"
        assert "not available now" in await row.inner_text()
        counted = [int(text.split()[-1]) for text in (slots, await _slots(visitor))]
        assert counted[0] - counted[1] == 7
        await visitor.check()
    finally:
        await operate(pool, "DELETE", "/nodes/mortal")


async def _slots(visitor: Visitor) -> str:
    return await visitor.page.locator("#running-of").inner_text()
