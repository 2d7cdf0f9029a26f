"""What the page offers to copy is what works: copied by its button, run as it is."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import playwright
import pytest

from tests.browser.stage import Visitor, Visits, operate, upstream
from tests.server import Server

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

NODE = Path(playwright.__file__).parent / "driver" / "node"  # comes with Playwright
RUNNERS = {
    "curl": ("sh", "-c"),
    "python": (sys.executable, "-c"),
    "javascript": (str(NODE), "--input-type=module", "-e"),
}


async def copied(visitor: Visitor, name: str) -> str:
    """What the clipboard holds after the tab and its button have been pressed."""
    await visitor.page.click(f"#tab-{name}")
    await visitor.page.click(f'[data-copy="code-{name}"]')
    await visitor.page.wait_for_selector(f'[data-copy="code-{name}"]:has-text("Copied")')
    text: str = await visitor.page.evaluate("navigator.clipboard.readText()")
    return text


async def run(name: str, code: str, key: str) -> str:
    """The output of a snippet."""
    process = await asyncio.create_subprocess_exec(
        *RUNNERS[name],
        code,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "ANSER_KEY": key, "NO_PROXY": "*"},
    )
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("name", list(RUNNERS))
async def test_with_a_key(closed_pool: Server, visit: Visits, *, name: str) -> None:
    """Where a key is needed, the snippet works with the key in ANSER_KEY."""
    visitor = await visit(closed_pool, permissions=["clipboard-read", "clipboard-write"])
    await visitor.open()
    shown = await visitor.page.locator(f"#code-{name}").text_content()
    assert "MODEL" in (shown or "")  # a stranger is not told which models there are
    await visitor.page.fill("#key", closed_pool.key)
    await visitor.page.press("#key", "Tab")
    await visitor.page.wait_for_selector("#model:enabled")
    code = await copied(visitor, name)
    assert closed_pool.key not in code
    assert "Seven geese." in await run(name, code, closed_pool.key)
    await visitor.check()


@pytest.mark.engine
@pytest.mark.parametrize("name", list(RUNNERS))
async def test_without_a_key(pool: Server, visit: Visits, *, name: str) -> None:
    """Where none is needed, the snippet works as it is, with the real model."""
    visitor = await visit(pool, permissions=["clipboard-read", "clipboard-write"])
    await visitor.open()
    output = await run(name, await copied(visitor, name), "")
    if name == "curl":
        output = json.loads(output)["choices"][0]["message"]["content"]
    assert output.strip()
    await visitor.check()


@pytest.mark.parametrize("name", list(RUNNERS))
async def test_for_the_chosen_model(pool: Server, visit: Visits, *, name: str) -> None:
    """A snippet is for the model that is chosen, however that is called, and works with it."""
    model = 'it\'s a "model" $HOME `x` \\ 雁'
    async with upstream("Honk.", model=model) as node:
        await operate(pool, "POST", "/nodes", {"url": node.url, "id": "odd"})
        try:
            visitor = await visit(pool, permissions=["clipboard-read", "clipboard-write"])
            await visitor.open()
            await visitor.page.select_option("#model", model)
            assert "Honk." in await run(name, await copied(visitor, name), "")
            await visitor.check()
        finally:
            await operate(pool, "DELETE", "/nodes/odd")


async def test_the_javascript_says_what_file_it_is(pool: Server, visit: Visits) -> None:
    """Top-level await needs a module: the first line names a file that Node takes for one."""
    visitor = await visit(pool)
    await visitor.open()
    text = await visitor.page.locator("#code-javascript").text_content()
    assert (text or "").splitlines()[0].endswith(".mjs")


async def test_tabs_by_arrow_keys(pool: Server, visit: Visits) -> None:
    """The tabs follow the arrow keys, Home and End, and only one panel is shown."""
    visitor = await visit(pool)
    await visitor.open()
    await visitor.page.focus("#tab-curl")
    shown = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "End"):
        await visitor.page.keyboard.press(key)
        shown.append(await visitor.page.locator(".panel:visible").get_attribute("id"))
        assert await visitor.page.evaluate("document.activeElement.ariaSelected") == "true"
    names = ("python", "javascript", "curl", "javascript", "curl", "javascript")
    assert shown == [f"panel-{name}" for name in names]
    await visitor.check()
