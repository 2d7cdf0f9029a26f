"""The chat box in a real browser, with the real model where words matter."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from tests.browser.stage import HOSTILE, Visitor, Visits, operate, upstream
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

# The texts that the answer had at successive moments.
WATCH = """
() => {
  window.moments = [];
  new MutationObserver(() => {
    const texts = document.querySelectorAll(".turn.assistant .text");
    moments.push(texts[texts.length - 1]?.textContent ?? "");
  }).observe(document.getElementById("log"), { childList: true, subtree: true });
}
"""

FOCUSED = """
(() => {
  const { id, className, attributes } = document.activeElement;
  return id || className || attributes.href.value;
})()
"""


async def answer_of(visitor: Visitor) -> str:
    """The text of the last answer."""
    return await visitor.page.locator(".turn.assistant .text").last.inner_text()


@pytest.mark.engine
async def test_it_answers_without_a_key(pool: Server, visit: Visits) -> None:
    """The real model's answer arrives piece by piece, its node and count with it, and no key."""
    visitor = await visit(pool)
    await visitor.open()
    await visitor.page.evaluate(WATCH)
    await visitor.ask("Say hello in one short sentence.")
    await visitor.answered()
    moments = await visitor.page.evaluate("window.moments")
    grown = sorted({text for text in moments if text}, key=len)
    assert len(grown) > 2
    assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
    facts = await visitor.page.locator(".turn .facts").first.inner_text()
    assert "builtin" in facts
    assert "tokens" in facts
    assert await visitor.page.locator("#status").inner_text() == "Finished"
    await visitor.check()


@pytest.mark.engine
async def test_it_remembers_the_conversation_until_told_not_to(pool: Server, visit: Visits) -> None:
    """Earlier turns are sent with a question; a new conversation sends none of them."""
    bodies: list[Any] = []
    visitor = await visit(pool)
    visitor.page.on(
        "request",
        lambda request: bodies.append(request.post_data_json) if request.post_data else None,
    )
    await visitor.open()
    for question in ("Say hi.", "Say it again."):
        await visitor.ask(question)
        await visitor.answered()
    await visitor.page.click("#clear")
    assert await visitor.page.locator(".turn").count() == 0
    await visitor.ask("Say bye.")
    await visitor.answered()
    roles = [[turn["role"] for turn in body["messages"]] for body in bodies]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    await visitor.check()


@pytest.mark.parametrize("way", ["button", "Escape", "leaving"])
async def test_stop_ends_the_work_at_the_node(pool: Server, visit: Visits, *, way: str) -> None:
    """Stop, Escape and closing the page each cancel at the node, and the receipt says so."""
    async with upstream("honk ", forever=True) as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": way.lower(), "model": way})
        try:
            visitor = await visit(pool)
            await visitor.open()
            await visitor.page.select_option("#model", way)
            async with visitor.page.expect_response("**/chat/completions") as caught:
                await visitor.ask("Do not stop.")
            request = (await caught.value).headers["x-request-id"]
            await visitor.until(
                "document.querySelector('.turn.assistant .text').textContent.length > 20"
            )
            await leave(visitor, way)
            async with asyncio.timeout(10):
                await node.hung_up.wait()
                receipt = await receipt_of(pool, request)
            assert receipt["outcome"] == "cancelled"
        finally:
            await operate(pool, "DELETE", f"/nodes/{way.lower()}")


async def leave(visitor: Visitor, way: str) -> None:
    """Stop the answer that is under way; what is shown stays, and the box is ready again."""
    if way == "leaving":
        await visitor.page.close()
        return
    if way == "button":
        await visitor.page.click("#stop")
    else:
        await visitor.page.press("#message", way)
    await visitor.answered()
    assert "honk honk" in await answer_of(visitor)
    assert await visitor.page.locator("#status").inner_text() == "Stopped"
    assert await visitor.page.evaluate("document.activeElement.id") == "message"
    await visitor.check()


async def receipt_of(pool: Server, request: str) -> dict[str, Any]:
    """The receipt, once it is durable."""
    while True:
        try:
            document = await operate(pool, "GET", f"/receipts/{request}")
        except AssertionError:
            await asyncio.sleep(0.1)
            continue
        receipt: dict[str, Any] = document["receipt"]
        return receipt


async def test_it_works_by_keyboard_alone(pool: Server, visit: Visits) -> None:
    """Tab walks the page in reading order, each stop is visible, and Enter asks."""
    visitor = await visit(pool)
    await visitor.open()
    page, stops = visitor.page, []
    for _ in range(13):
        await page.keyboard.press("Tab")
        stops.append(await page.evaluate(FOCUSED))
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or stops[-1] == "skip"
    assert stops == [
        *("skip", "brand", "#ask", "#pool", "#call", "language"),
        *("quiet small needs-script", "button", "button quiet"),
        *("log", "message", "model", "send"),
    ]
    await page.focus("#message")
    await page.keyboard.type("One line")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("and another")
    assert await page.input_value("#message") == "One line\nand another"
    assert await page.locator(".turn").count() == 0
    await page.keyboard.press("Enter")
    await visitor.answered()
    assert await answer_of(visitor)
    await visitor.check()


async def test_enter_of_an_input_method_does_not_send(pool: Server, visit: Visits) -> None:
    """The Enter that ends a Chinese word being composed does not send half a question."""
    visitor = await visit(pool, locale="zh-CN")
    await visitor.open()
    await visitor.page.focus("#message")
    session = await visitor.page.context.new_cdp_session(visitor.page)
    composing = {"text": "yan", "selectionStart": 3, "selectionEnd": 3}
    await session.send("Input.imeSetComposition", composing)
    enter = {"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Enter", "code": "Enter"}
    await session.send("Input.dispatchKeyEvent", enter)
    await session.send("Input.insertText", {"text": "雁"})
    assert await visitor.page.input_value("#message") == "雁"
    assert await visitor.page.locator(".turn").count() == 0
    await visitor.check()


async def test_a_hostile_answer_is_text(pool: Server, visit: Visits) -> None:
    """What a model writes is never more than text, whatever it looks like (FAULTS 18)."""
    async with upstream(HOSTILE, model="liar") as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "liar"})
        try:
            visitor = await visit(pool)
            await visitor.open()
            await visitor.page.select_option("#model", "liar")
            await visitor.ask(HOSTILE)
            await visitor.answered()
            assert await answer_of(visitor) == HOSTILE
            assert await visitor.page.locator("main img, main script").count() == 0
            assert "pwned" not in await visitor.page.title()
            await visitor.check()
        finally:
            await operate(pool, "DELETE", "/nodes/liar")


async def test_failures_are_told_in_words(pool: Server, visit: Visits) -> None:
    """A model that went away is said in the visitor's language, and the question is not lost."""
    async with upstream("hi", model="brief") as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "brief"})
        visitor = await visit(pool, locale="zh-CN")
        await visitor.open()
        await visitor.page.select_option("#model", "brief")
        await operate(pool, "DELETE", "/nodes/brief")
    # Before the page has noticed.
    await visitor.ask("在吗？")
    await visitor.answered()
    assert "模型" in await visitor.page.locator(".turn .trouble").inner_text()
    assert await visitor.page.input_value("#message") == "在吗？"
    await visitor.page.press("#message", "Enter")
    await visitor.until("!document.querySelector('.turn[aria-busy]')")
    await visitor.until("document.getElementById('message').value !== ''")
    assert await visitor.page.locator(".turn.user").count() == 0  # it is in the box, not in both
    assert await visitor.page.locator(".trouble:visible").count() == 1
    await visitor.check(refusals=2)


async def test_a_platform_that_is_gone_is_told_in_words(visit: Visits, closed_pool: Server) -> None:
    """No answer at all is said in words too."""
    visitor = await visit(closed_pool)
    await visitor.open()
    await visitor.page.fill("#key", closed_pool.key)
    await visitor.page.press("#key", "Tab")
    await visitor.page.wait_for_selector(".node")
    await visitor.page.context.set_offline(True)
    await visitor.ask("Anybody?")
    await visitor.answered()
    assert "cannot be reached" in await visitor.page.locator(".turn .trouble").inner_text()
    await visitor.page.wait_for_selector("#pool-away:not([hidden])")
    await visitor.page.context.set_offline(False)
    await visitor.page.wait_for_selector("#pool-away", state="hidden")
    await visitor.ask("Anybody?")
    await visitor.answered()
    assert await answer_of(visitor) == "Seven geese."


async def test_a_key_opens_a_closed_platform(closed_pool: Server, visit: Visits) -> None:
    """Where a key is needed the page asks for it, uses it, and keeps it nowhere."""
    visitor = await visit(closed_pool)
    await visitor.open()
    page = visitor.page
    assert await page.locator("#pool-closed").is_visible()
    assert await page.locator("#pool-state").is_hidden()
    await visitor.ask("How many?")
    assert await page.evaluate("document.activeElement.id") == "key"
    assert await page.locator(".turn").count() == 0
    await page.keyboard.type(closed_pool.key)
    await page.keyboard.press("Tab")
    await page.wait_for_selector(".node[data-state=up]")
    await page.focus("#message")
    await page.keyboard.press("Enter")
    await visitor.answered()
    assert await answer_of(visitor) == "Seven geese."
    kept = (
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert closed_pool.key not in await page.evaluate(kept)
    await visitor.check()
    await page.reload()
    assert await page.input_value("#key") == ""


async def test_a_wrong_key_is_tried_once(closed_pool: Server, visit: Visits) -> None:
    """A wrong key is said to be wrong, and neither polling nor asking goes on guessing with it."""
    visitor = await visit(closed_pool)
    await visitor.open()
    page = visitor.page
    await page.fill("#key", "hf_wrong")
    await page.press("#key", "Tab")
    await visitor.until("document.getElementById('key-trouble').textContent !== ''")
    assert "not valid" in await page.locator("#key-trouble").inner_text()
    assert await page.get_attribute("#key", "aria-invalid") == "true"
    await visitor.ask("How many?")
    assert "not valid" in await page.locator("#status").inner_text()
    assert await page.evaluate("document.activeElement.id") == "key"
    await page.wait_for_timeout(5_000)
    assert len([url for url in visitor.requests if "/v1/" in url]) == 1
    await visitor.check(refusals=1)


async def test_the_right_key_and_enter(closed_pool: Server, visit: Visits) -> None:
    """A key that is just typed works with the very next Enter, also after a wrong one."""
    visitor = await visit(closed_pool)
    await visitor.open()
    page = visitor.page
    assert await page.locator("#model").is_disabled()
    await page.fill("#key", "hf_wrong")
    await page.press("#key", "Enter")
    await visitor.until("document.getElementById('key-trouble').textContent !== ''")
    await page.fill("#message", "How many?")
    await page.fill("#key", closed_pool.key)
    await page.press("#key", "Enter")
    await page.wait_for_selector(".turn.assistant")
    await visitor.answered()
    assert await answer_of(visitor) == "Seven geese."
    assert await page.locator("#key-trouble").inner_text() == ""
    assert await page.locator("#model").is_enabled()
    await visitor.check(refusals=1)


async def test_a_wrong_key_of_ones_own(pool: Server, visit: Visits) -> None:
    """Where no key is needed, a wrong one is told, and the pool is shown without it."""
    visitor = await visit(pool)
    await visitor.open()
    await visitor.page.click("summary:has-text('key of your own')")
    await visitor.page.fill("#key", "hf_wrong")
    await visitor.page.press("#key", "Tab")
    await visitor.until("document.getElementById('key-trouble').textContent !== ''")
    assert await visitor.page.locator("#pool-state").is_visible()
    assert await visitor.page.locator("#model").is_enabled()
    await visitor.check(refusals=1)
