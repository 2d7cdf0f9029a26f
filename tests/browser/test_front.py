"""The first page in a real browser: what it loads, what it refuses, and in which language."""

from __future__ import annotations

import httpx
import pytest

from tests.browser.stage import HOSTILE, Visits, operate, upstream
from tests.hostile import Hostile, Talk, answer
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

# Two different characters give two different, non-empty pictures; missing ones give one box twice.
DRAWN = """
(texts) => {
  const { fontFamily } = getComputedStyle(document.querySelector("h1"));
  return texts.map((text) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
    const pen = canvas.getContext("2d");
    pen.font = `48px ${fontFamily}`;
    pen.fillText(text, 4, 52);
    return canvas.toDataURL();
  });
}
"""


async def test_it_shows_what_this_is(pool: Server, visit: Visits) -> None:
    """The page names the model, the address and the node, loads nothing foreign, logs nothing."""
    visitor = await visit(pool)
    await visitor.open()
    page = visitor.page
    await visitor.until("document.querySelector('.node[data-state=up]')")
    assert await page.locator("h1").count() == 1
    assert await page.locator("#model option").all_inner_texts()
    assert await page.locator("#address").inner_text() == f"{pool.url}/v1"
    assert await page.locator("#nodes .name").all_inner_texts() == ["builtin"]
    assert await page.locator("html").get_attribute("lang") == "en"
    await visitor.check()


async def test_it_can_be_read_without_scripts(pool: Server, visit: Visits) -> None:
    """Without JavaScript the pool and every snippet are there, and no dead control is."""
    visitor = await visit(pool, java_script_enabled=False)
    await visitor.open()
    page = visitor.page
    assert await page.locator("#nodes .name").all_inner_texts() == ["builtin"]
    assert await page.locator("pre:visible").count() == 3
    assert await page.locator("button:visible, textarea:visible, select:visible").count() == 0
    assert await page.locator("noscript").is_visible()


@pytest.mark.parametrize(
    ("locale", "path", "language"),
    [("zh-CN", "/", "zh"), ("en-GB", "/", "en"), ("en-GB", "/?lang=zh", "zh")],
)
async def test_it_speaks_the_visitors_language(
    pool: Server, visit: Visits, *, locale: str, path: str, language: str
) -> None:
    """The browser's language is taken, and one that is asked for by address comes before it."""
    visitor = await visit(pool, locale=locale)
    await visitor.open(path)
    assert await visitor.page.locator("html").get_attribute("lang") == language
    await visitor.check()


async def test_chinese_has_a_font_and_the_link_leads_back(pool: Server, visit: Visits) -> None:
    """Chinese is drawn as characters, not boxes; the other language is one link away."""
    visitor = await visit(pool, locale="zh-CN")
    await visitor.open()
    wild, goose, nothing = await visitor.page.evaluate(DRAWN, ["野", "雁", ""])
    assert len({wild, goose, nothing}) == 3
    await visitor.page.click(".language")
    await visitor.page.wait_for_url("**/?lang=en")
    assert await visitor.page.locator("html").get_attribute("lang") == "en"
    await visitor.check()


async def test_a_browser_that_is_lost_gets_a_page(pool: Server, visit: Visits) -> None:
    """Outside the API a browser is told in words that there is nothing, and led home."""
    visitor = await visit(pool)
    await visitor.open("/nowhere")
    assert "nothing here" in await visitor.page.locator("h1").inner_text()
    await visitor.page.click("main a")
    await visitor.page.wait_for_selector("#ask")
    await visitor.check(refusals=1)  # the 404 itself


async def test_hostile_names_are_shown_as_text(pool: Server, visit: Visits) -> None:
    """A model that is called like a script is a line of text wherever it appears (FAULTS 18)."""
    async with upstream("hi", model=HOSTILE) as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "hostile"})
        try:
            visitor = await visit(pool)
            await visitor.open()
            await visitor.until(
                "name => [...document.querySelectorAll('#models .name')]"
                ".some(each => each.textContent === name)",
                HOSTILE,
            )
            assert HOSTILE in await visitor.page.locator("#model option").all_inner_texts()
            assert await visitor.page.locator("main img, main script").count() == 0
            assert "pwned" not in await visitor.page.title()
            await visitor.check()
        finally:
            await operate(pool, "DELETE", "/nodes/hostile")


async def test_another_site_may_not_frame_or_use_it(pool: Server, visit: Visits) -> None:
    """Another site can neither put the page into a frame nor spend the pool through a visitor."""
    seen: list[int] = []
    html = f"""<!doctype html><link rel=icon href=data:,><iframe src="{pool.url}/"></iframe>
        <script>fetch("{pool.url}/v1/chat/completions", {{method: "POST", mode: "no-cors",
        body: "{{}}"}}).finally(() => document.title = "asked")</script>"""

    async def site(talk: Talk) -> None:
        await talk.request()
        await talk.say(answer(html.encode(), kind="text/html"))

    async with Hostile(site) as other:
        visitor = await visit(f"http://localhost:{other.port}")
        visitor.page.on(
            "response",
            lambda response: seen.append(response.status) if "/v1/" in response.url else None,
        )
        await visitor.open()
        await visitor.until("document.title === 'asked'")
        assert await visitor.page.frames[1].locator("#ask").count() == 0
    assert seen == [403]
    assert any("frame-ancestors" in text for text in visitor.errors)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../page.py",
        "/static/%2e%2e/%2e%2e/page.py",
        "//etc/passwd",
        "/static/page.css",
        "/templates/front.html",
        "/static/%00",
    ],
)
async def test_tricks_with_paths_find_nothing(pool: Server, path: str) -> None:
    """No address but an exact one reaches a file (FAULTS 17)."""
    async with httpx.AsyncClient() as client:
        request = client.build_request("GET", pool.url)
        request.url = request.url.copy_with(raw_path=path.encode())
        response = await client.send(request)
    assert response.status_code in (400, 404)
    assert "import" not in response.text
