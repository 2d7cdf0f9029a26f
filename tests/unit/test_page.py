"""The first page without a browser: escaping, languages, addresses, and what may never be in it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import string
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.testclient import TestClient

from anser.adapters.memory_engine import MemoryEngine
from anser.api import page
from anser.config import Config
from anser.core.errors import AnserError
from anser.core.fleet import Ability, EngineKind, Node, Offer
from anser.core.health import NodeState
from anser.services.entry import NodeStatus
from anser.services.fairness import Evenness
from anser.services.pool import ModelView, NodeView, PoolView

HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>{{ 7*7 }}"
URLS = ("href", "src", "action", "data")
REFERENCES = ("for", "aria-controls", "aria-describedby", "aria-labelledby", "data-copy")


class Outline(HTMLParser):
    """A page's elements and texts, as a browser's parser would come to them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def attributes(self, name: str) -> list[str]:
        return [values[name] for _, values in self.elements if name in values]


def node_view(
    name: str, state: NodeState = NodeState.UP, *, slots: int | None = None, busy: int = 0
) -> NodeView:
    """A node with an engine that serves one model."""
    offer = Offer(node=name, model=name, engine_model=name, engine=EngineKind.LLAMACPP)
    status = NodeStatus(
        node=Node(id=name, url="http://gpu"),
        state=state,
        kind=None if slots is None else EngineKind.LLAMACPP,
        slots=slots,
        offers=(offer,),
    )
    return NodeView(status=status, busy=busy)


def open_page(*models: ModelView) -> str:
    """The first page of a pool with these models, for anybody, in English."""
    visit = page.Visit(language="en", origin="http://localhost", open=True)
    return page.render_front(visit, PoolView(models=models))


def front(
    *, name: str = "smollm2-135m-instruct", language: str = "en", anonymous: bool = True
) -> str:
    """The first page of a pool of two nodes, one of which still starts."""
    pool = PoolView(
        nodes=(node_view(name, slots=4, busy=1), node_view("b", NodeState.STARTING)),
        models=(ModelView(id=name, nodes=1, nodes_ready=1, context_tokens=4_096),),
        queued=2,
        running=1,
        tokens_per_s=12.34,
    )
    visit = page.Visit(language=language, origin="https://pool.example", open=anonymous)
    return page.render_front(visit, pool)


def snippet(html: str, name: str) -> str:
    """The text of one snippet, as a browser shows it."""
    code = re.search(rf'<code id="code-{name}">(.*?)</code>', html, re.DOTALL)
    assert code is not None
    return "".join(Outline(code[1]).texts)


def subclasses(kind: type[AnserError]) -> set[type[AnserError]]:
    """The whole tree below one error."""
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def pages() -> list[str]:
    """Every page in every language, open and closed."""
    fronts = [
        front(language=language, anonymous=anonymous)
        for language in page.LANGUAGES
        for anonymous in (True, False)
    ]
    return [*fronts, client().get("/nowhere").text]


def client() -> TestClient:
    """The static files and the 404 page on an application of their own."""
    routes = [
        Route(f"/static/{page.digest()}/{{name}}", page.static),
        Route("/{path:path}", page.not_found),
    ]
    return TestClient(Starlette(routes=routes))


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_hostile_names_are_text(language: str) -> None:
    """Whatever a node or a model is called, it adds no element and runs in no template."""
    plain, hostile = (
        Outline(front(language=language)),
        Outline(front(name=HOSTILE, language=language)),
    )
    tags = [tag for tag, _ in plain.elements]
    assert [tag for tag, _ in hostile.elements] == tags
    assert HOSTILE in hostile.texts
    assert not [name for _, values in hostile.elements for name in values if name[:2] == "on"]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_snippets_quote_any_model(name: str) -> None:
    """A model's name arrives whole in each snippet's language, and nothing of it is code there."""
    html = front(name=name)
    command = shlex.split(snippet(html, "curl").replace("\\\n", ""))
    assert json.loads(command[command.index("-d") + 1])["model"] == name
    tree = ast.parse(snippet(html, "python"))
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert name in literals
    script = snippet(html, "javascript")
    literal = script.split("model: ")[1]
    assert json.JSONDecoder().raw_decode(literal)[0] == name


def test_snippets_carry_the_address_and_the_key() -> None:
    """The snippets use the address that was visited, and a key exactly where one is needed."""
    for name in ("curl", "python", "javascript"):
        assert "https://pool.example/v1" in snippet(front(), name)
        assert "ANSER_KEY" not in snippet(front(), name)
        assert "ANSER_KEY" in snippet(front(anonymous=False), name)


def test_nothing_inline_and_nothing_foreign() -> None:
    """No page has inline script or style, a handler, or an address on another site (FAULTS 18)."""
    for html in pages():
        outline = Outline(html)
        for tag, values in outline.elements:
            assert tag not in {"style", "iframe", "object", "embed", "base"}
            assert tag != "script" or "src" in values
            assert not [name for name in values if name.startswith("on") or name == "style"]
        for url in [url for name in URLS for url in outline.attributes(name)]:
            assert re.match(r"[#?]|/(?!/)", url), url


def test_references_resolve() -> None:
    """Identifiers are unique, and every label and description points to one that exists."""
    for html in pages():
        outline = Outline(html)
        ids = outline.attributes("id")
        assert len(ids) == len(set(ids))
        wanted = {
            part for name in REFERENCES for at in outline.attributes(name) for part in at.split()
        }
        anchors = {url[1:] for url in outline.attributes("href") if url.startswith("#")}
        assert wanted | anchors - {"goose"} <= set(ids)


def test_modules_find_their_elements() -> None:
    """Every element that a script asks for by its id is in the page."""
    ids = set(Outline(front()).attributes("id"))
    scripts = [text.decode() for name, text in page.static_files().items() if name.endswith(".js")]
    for script in scripts:
        assert set(re.findall(r'(?:byId|getElementById)\("([a-z-]+)"\)', script)) <= ids


def test_without_a_key_nothing_of_the_pool_is_shown() -> None:
    """Where a key is needed, a stranger's page holds no node, no model and no figure."""
    visit = page.Visit(language="en", origin="http://localhost", open=False)
    outline = Outline(page.render_front(visit, None))
    hidden = [values for _, values in outline.elements if values.get("id") == "pool-state"]
    assert "hidden" in hidden[0]
    assert "hidden" not in next(
        values for _, values in outline.elements if values.get("id") == "pool-closed"
    )
    assert "builtin" not in "".join(outline.texts)


def test_languages_say_the_same() -> None:
    """Each language has the same keys, each text is filled, with the same placeholders."""
    reference = page.texts("en")
    for language in page.LANGUAGES:
        sections = page.texts(language)
        assert sections.keys() == reference.keys()
        for section, words in sections.items():
            assert words.keys() == reference[section].keys(), section
            for key, text in words.items():
                assert text.strip() == text != ""
                assert _placeholders(text) == _placeholders(reference[section][key]), key


def test_every_text_is_used() -> None:
    """A text that no template, script or function names is removed."""
    folder = files("anser.api")
    sources = [item.read_text() for item in folder.joinpath("templates").iterdir()]
    sources += [data.decode() for data in page.static_files().values()]
    sources.append(folder.joinpath("page.py").read_text())
    code = "\n".join(sources)
    for section, words in page.texts("en").items():
        for key in words:
            if section not in {"errors", "states"}:
                assert re.search(rf"\.{key}\b|\[\"{key}\"\]", code), f"{section}.{key}"


def test_errors_are_ones_that_happen() -> None:
    """Each error in words is a code of the API's, or one that the page's own script raises."""
    script = page.static_files()["stream.js"].decode()
    own = set(re.findall(r'new Refusal\("(\w+)"', script))
    codes = {error.code for error in subclasses(AnserError)}
    assert own <= set(page.texts("en")["errors"]) <= own | codes


def test_every_state_has_a_word() -> None:
    """No node state is shown without a word for it."""
    assert set(page.texts("en")["states"]) == {state.value for state in NodeState}


@pytest.mark.parametrize(
    ("asked", "accept", "language"),
    [
        (None, "", "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "en-GB,en;q=0.9,zh;q=0.8", "en"),
        (None, "fr-FR, zh-TW;q=0.5, en;q=0.4", "zh"),
        (None, "de, fr", "en"),
        (None, "zh;q=0, en;q=0.1", "en"),
        (None, "zh;q=junk", "en"),
        ("zh", "en", "zh"),
        ("en", "zh", "en"),
        ("<script>", "zh", "zh"),
    ],
)
def test_language(asked: str | None, accept: str, language: str) -> None:
    """A language asked for by address wins, then the browser's preference, then English."""
    assert page.choose_language(asked, Headers({"accept-language": accept})) == language


@given(st.text(alphabet=string.printable), st.text(alphabet=string.printable))
def test_any_header_gives_a_language(asked: str, accept: str) -> None:
    """No Accept-Language, however broken, keeps the page from being shown."""
    header = Headers(raw=[(b"accept-language", accept.encode())])
    assert page.choose_language(asked, header) in page.LANGUAGES


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("pool.example", "http://pool.example"),
        ("pool.example:8443", "http://pool.example:8443"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("", "http://127.0.0.1:8000"),
        ("a b", "http://127.0.0.1:8000"),
        ("x';rm -rf ~;'", "http://127.0.0.1:8000"),
        ("user@evil.example", "http://127.0.0.1:8000"),
        ("pool.example/path", "http://127.0.0.1:8000"),
        ("pool.example\n", "http://127.0.0.1:8000"),
    ],
)
def test_origin(host: str, shown: str) -> None:
    """The address in the snippets is the visited one, if its Host header is a host and no more."""
    assert page.origin_of(scheme="http", host=host, fallback="127.0.0.1:8000") == shown


def test_every_answer_is_guarded() -> None:
    """Pages, files, 304 and 404 all carry the security headers (FAULTS 18)."""
    with client() as http:
        file = http.get(f"/static/{page.digest()}/page.css")
        weakened = {"if-none-match": f'"other", W/{file.headers["etag"]}'}
        unchanged = http.get(file.request.url, headers=weakened)
        answers = [file, unchanged, http.get("/nowhere"), http.head("/nowhere")]
    assert [answer.status_code for answer in answers] == [200, 304, 404, 404]
    for answer in answers:
        for name, value in page.SECURITY_HEADERS.items():
            assert answer.headers[name] == value
    assert "'unsafe" not in page.SECURITY_HEADERS["content-security-policy"]
    assert "immutable" in file.headers["cache-control"]
    assert unchanged.content == b""


@pytest.mark.parametrize(
    "name",
    [
        "../page.py",
        "..%2fpage.py",
        "%2e%2e/page.py",
        "page.css%00",
        "PAGE.CSS",
        "",
        ".",
        "README.md",
    ],
)
def test_only_the_table_is_served(name: str) -> None:
    """A static address that is not exactly a file's name leads nowhere (FAULTS 17)."""
    with client() as http:
        answer = http.get(f"/static/{page.digest()}/{name}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_missing_page_speaks_the_language() -> None:
    """A browser that is lost is told so in its own language, and led home in it."""
    with client() as http:
        answer = http.get("/nowhere", headers={"accept-language": "zh"})
    assert '<html lang="zh">' in answer.text
    assert 'href="/?lang=zh"' in answer.text
    assert page.texts("zh")["missing"]["title"] in answer.text


@pytest.mark.parametrize(
    ("path", "accept", "wanted"),
    [
        ("/nowhere", "text/html,*/*;q=0.8", True),
        ("/nowhere", "*/*", False),
        ("/v1/nowhere", "text/html", False),
        ("/v1", "text/html", False),
    ],
)
def test_pages_are_for_browsers(path: str, accept: str, *, wanted: bool) -> None:
    """A program, and whoever asks below /v1, gets an error that programs read."""
    assert page.wants_page(path, Headers({"accept": accept})) is wanted


def test_a_model_that_can_be_talked_to_now_is_chosen() -> None:
    """Chosen is what answers now, the platform's own model before the alphabet; never embeddings.

    What only makes embeddings is no choice at all; what is away is one, but cannot be taken.
    """
    away = ModelView(id="a-away", nodes=1, nodes_ready=0)
    embeds = ModelView(id="all-minilm", nodes=1, nodes_ready=1, ability=Ability.EMBEDDINGS)
    here = ModelView(id="b-here", nodes=1, nodes_ready=1)
    own = ModelView(id="c-own", nodes=1, nodes_ready=1, own=True)
    html = open_page(embeds, here, own, away)
    assert '<option value="c-own" selected>c-own</option>' in html
    assert "c-own" in snippet(html, "curl")
    assert '<option value="a-away" disabled>a-away (not available now)</option>' in html
    assert 'value="all-minilm"' not in html
    assert "embeddings · on one node" in Outline(html).texts
    assert '<option value="b-here" selected>' in open_page(embeds, here, away)
    assert "MODEL" in snippet(open_page(embeds), "python")


def test_dead_nodes_count_for_nothing() -> None:
    """Slots and ready nodes are those of nodes that are up; a model of a dead one says so."""
    nodes = (node_view("up", slots=2), node_view("gone", NodeState.DOWN, slots=8))
    pool = PoolView(nodes=nodes, models=(ModelView(id="m", nodes=1, nodes_ready=0),))
    visit = page.Visit(language="en", origin="http://localhost", open=True)
    html = page.render_front(visit, pool)
    assert '<span id="running-of">of 2</span>' in html
    assert '<b id="ready">1</b>' in html
    assert '<li class="model" data-ready="no">' in html
    assert "not available now" in Outline(html).texts


@pytest.mark.parametrize("language", page.LANGUAGES)
def test_evenness_is_shown(language: str) -> None:
    """Jain's index and the gap with its bound, in prompt tokens; a dash where there is none."""
    visit = page.Visit(language=language, origin="http://localhost", open=True)
    even = Evenness(members=1_200, jain=0.98765, gap=1_234_567_890, bound=8_140_000_000)
    shown = Outline(page.render_front(visit, PoolView(), even)).texts
    at_most = page.texts(language)["live"]["at_most"].format(most="8,140")
    assert {"1,200", "0.988", "1,235", at_most} <= set(shown)
    none = Outline(page.render_front(visit, PoolView())).texts
    assert none.count("–") == 3


def test_many_models_are_folded() -> None:
    """Eight models are seen at once, the others behind a fold that says how many they are."""
    eight = open_page(*[ModelView(id=f"m{i}", nodes=1, nodes_ready=1) for i in range(8)])
    ten = open_page(*[ModelView(id=f"m{i}", nodes=2, nodes_ready=2) for i in range(10)])
    assert '<details id="fold" hidden>' in eight
    assert '<details id="fold">' in ten
    assert '<summary id="fold-count">2 more</summary>' in ten
    assert ten.partition('id="fold"')[2].count('data-ready="yes"') == 2


@pytest.mark.anyio
async def test_the_page_shows_the_platforms_own_state(data_dir: Path) -> None:
    """Nodes, models and language of a page are those of its platform and its visitor."""
    from anser.platform import open_platform

    node = Node(id="tested", url="builtin:", model="memory", slots=3)
    async with open_platform(Config(data_dir=data_dir), engine=False) as platform:
        fleet = platform.services.fleet
        fleet.attach(node, MemoryEngine("memory", slots=3))
        with anyio.fail_after(10):
            while "memory" not in fleet.models():
                await anyio.sleep(0.01)
        transport = httpx.ASGITransport(platform.public_app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a.example") as http:
            answer = await http.get("/", headers={"accept-language": "zh"})
            head = await http.head("/")
            lost = await http.get("/nowhere", headers={"accept": "text/html"})
    texts = Outline(answer.text).texts
    assert answer.status_code == head.status_code == 200
    assert {"tested", "memory", "http://a.example/v1", "0 / 3"} <= set(texts)
    assert '<html lang="zh">' in answer.text
    assert page.SECURITY_HEADERS.items() <= dict(answer.headers).items()
    assert lost.status_code == 404
    assert page.SECURITY_HEADERS.items() <= dict(lost.headers).items()


def test_a_large_pool_stays_a_small_page() -> None:
    """Of thousands of nodes and models the first are shown, and how many more there are."""
    node = node_view("n", slots=100_000, busy=9)
    model = ModelView(id="m", nodes=1, nodes_ready=1)
    pool = PoolView(nodes=(node,) * 4_096, models=(model,) * 5_000)
    visit = page.Visit(language="en", origin="http://localhost", open=True)
    html = page.render_front(visit, pool)
    assert html.count('<li class="node"') == 40 + 1  # the template
    assert "and 4,056 more" in html
    assert "and 4,960 more" in html
    assert len(html) < 600_000


def test_the_limits_of_lists_agree() -> None:
    """The browser shows as many rows and geese, and folds away as much, as the server."""
    script = page.static_files()["pool.js"].decode()
    source = files("anser.api").joinpath("page.py").read_text()
    for name in ("ROWS_MAX", "GEESE_MAX", "FOLD"):
        numbers = re.findall(rf"\b_?{name} = (\d+)", script + source)
        assert len(numbers) == 2
        assert len(set(numbers)) == 1


def test_the_first_load_is_light() -> None:
    """All that a first visit loads is less than 64 KB."""
    assert len(front().encode()) + sum(map(len, page.static_files().values())) < 64 * 1024


def _placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))
