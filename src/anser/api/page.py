"""`/`: what Anser is, for a person: the pool live, a chat box, and how to call the API.

Theory of operation. Everything is read once at the start: templates, catalogues of texts, and the
static files, which then exist only as entries of a table. A path is looked up there or it is not
found, so no trick with a path reaches the disk. Static addresses carry one digest over all static
files: they may be kept for ever, and the ES modules find each other by relative names.

Invariants: every page answer carries the same security headers; nothing that a member, a node or
a model has written is put into a page other than escaped; the page shows a visitor no more of the
pool than `/v1/pool` and `/v1/fairness` would.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anser import __version__
from anser.api.context import Services
from anser.services.fairness import Evenness
from anser.services.pool import ModelView, NodeView, PoolView, view_of

__all__ = [
    "LANGUAGES",
    "SECURITY_HEADERS",
    "Visit",
    "choose_language",
    "digest",
    "not_found",
    "origin_of",
    "render_front",
    "routes",
    "static",
    "static_files",
    "texts",
    "wants_page",
]

LANGUAGES = ("en", "zh")
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_SNIPPETS = (
    ("curl", "curl", "curl.sh.j2"),
    ("python", "Python", "python.py.j2"),
    ("javascript", "JavaScript", "javascript.mjs.j2"),
)
_HOST = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?\Z")
_GOOSE = (
    "M62 15.2c-1.5-1.3-3.6-1.4-5.2-.5L41 20.2c-2-.9-4.6-1.6-7.3-1.8C29.5 12.5 21 5.5 8 2c6.5 5 11.5"
    " 11 14.2 17.4C15 20.5 8 22.5 2 26c7.5.3 14.5.9 21 1.6-1.3 4.2-4.2 8-8.6 11.4 9-1.4 16.5-5.3"
    " 21.3-10.8 4.3-.9 8-2.7 10.8-5.2l11-5.2c1.6-.6 3.3-1.6 4.5-2.6z"
)
_SKEIN = (  # x, y and width of each goose in the picture, the leader first
    (346, 62, 62), (284, 34, 56), (278, 92, 57), (222, 12, 50), (212, 122, 52),
    (146, 150, 48), (82, 178, 44), (20, 204, 40),
)  # fmt: skip
_GEESE_MAX = 24  # of one node
_ROWS_MAX = 40  # of nodes, and of models; pool.js has the same
_FOLD = 8  # models that are seen at once; pool.js has the same
_GAP = "\ue000"  # where a snippet names the model
_ACCEPT_CHARS_MAX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """How a page is wanted; `open` is whether this platform answers without a key."""

    language: str
    origin: str
    open: bool


def routes(services: Services) -> list[Route]:
    """The page and its files."""

    async def front(request: Request) -> Response:
        visit = _visit(request, services)
        if not visit.open:
            return _page(render_front(visit, None))
        look = services.gateway.fairness.look(services.clock.now())
        pool = view_of(services.fleet, services.gateway)
        return _page(render_front(visit, pool, look.evenness))

    return [
        Route("/", front, name="front"),
        Route(f"/static/{digest()}/{{name}}", static, name="static"),
    ]


def static(request: Request) -> Response:
    """A static file by its exact name, kept for ever by whoever has it; else the 404 page."""
    name: str = request.path_params["name"]
    data = static_files().get(name)
    if data is None:
        return not_found(request)
    tag = f'"{sha256(data).hexdigest()[:32]}"'
    headers = {
        **SECURITY_HEADERS,
        "cache-control": "public, max-age=31536000, immutable",
        "etag": tag,
    }
    known = request.headers.get("if-none-match", "").split(",")
    if tag in [given.strip().removeprefix("W/") for given in known]:  # a proxy may weaken it
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": _TYPES[name.partition(".")[2]]})


def not_found(request: Request) -> Response:
    """The answer to a browser that went to an address which does not exist."""
    language = choose_language(request.query_params.get("lang"), request.headers)
    page = _template("missing.html").render(_frame(language))
    return _page(page, status=404)


def wants_page(path: str, headers: Headers) -> bool:
    """Whether an answer to this request is for a person: a browser outside the API."""
    return not path.startswith("/v1") and "text/html" in headers.get("accept", "")


def render_front(visit: Visit, pool: PoolView | None, evenness: Evenness | None = None) -> str:
    """The first page; `None` is a pool that this visitor may not see without a key."""
    words = texts(visit.language)
    chosen = None if pool is None else pool.default
    shown = {section: words[section] for section in ("live", "states", "errors")}
    return _template("front.html").render(
        _frame(visit.language),
        open=visit.open,
        origin=visit.origin,
        pool=_pool_in_words(pool or PoolView(), words),
        seen=pool is not None,
        fair=_evenness_in_words(evenness or Evenness(), words["live"]),
        skein=_SKEIN,
        chosen=chosen,
        snippets=_snippets(visit, words["call"]["any_model"] if chosen is None else chosen),
        texts=json.dumps(shown, ensure_ascii=False),
    )


def choose_language(asked: str | None, headers: Headers) -> str:
    """The language: `asked` for if there is one of that name, else the one preferred, else English.

    >>> choose_language(None, Headers({"accept-language": "fr, zh-TW;q=0.8, en;q=0.5"}))
    'zh'
    """
    if asked in LANGUAGES:
        return asked
    preferred = [
        (quality, language)
        for part in headers.get("accept-language", "")[:_ACCEPT_CHARS_MAX].split(",")
        for language, quality in [_preference(part)]
        if language in LANGUAGES and quality > 0
    ]
    best = max((quality for quality, _ in preferred), default=0.0)
    return next((name for quality, name in preferred if quality == best), LANGUAGES[0])


def origin_of(*, scheme: str, host: str, fallback: str) -> str:
    """The address that the visitor used; `fallback` if its Host header is not a plain one."""
    return f"{scheme}://{host if _HOST.match(host) else fallback}"


@cache
def texts(language: str) -> dict[str, dict[str, str]]:
    """The catalogue of one language: section -> key -> text."""
    source = files("anser.api").joinpath("locales", f"{language}.toml")
    return tomllib.loads(source.read_text(encoding="utf-8"))


@cache
def static_files() -> Mapping[str, bytes]:
    """Every static file by its exact name."""
    folder = files("anser.api").joinpath("static")
    found = {item.name: item for item in folder.iterdir() if item.name.partition(".")[2] in _TYPES}
    return {name: found[name].read_bytes() for name in sorted(found)}


@cache
def digest() -> str:
    """A short digest over all static files: another file anywhere gives other addresses."""
    whole = sha256()
    for name, data in static_files().items():
        whole.update(f"{name}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()[:16]


def _preference(part: str) -> tuple[str, float]:
    """One item of Accept-Language (RFC 9110, section 12.5.4): primary subtag and quality."""
    tag, _, parameter = part.partition(";")
    name, _, value = parameter.strip().partition("=")
    quality = 1.0
    if name.strip().lower() == "q":
        number = re.fullmatch(r"\s*([01](?:\.[0-9]{0,3})?)\s*", value)
        quality = float(number[1]) if number else 0.0
    return tag.strip().lower().partition("-")[0], quality


def _visit(request: Request, services: Services) -> Visit:
    server = services.config.server
    return Visit(
        language=choose_language(request.query_params.get("lang"), request.headers),
        origin=origin_of(
            scheme=request.url.scheme,
            host=request.headers.get("host", ""),
            fallback=f"{server.host}:{server.port}",
        ),
        open=services.members.anonymous,
    )


def _page(html: str, *, status: int = 200) -> Response:
    headers = {**SECURITY_HEADERS, "cache-control": "no-cache", "vary": "accept-language"}
    return Response(html, status, headers, media_type="text/html")


def _frame(language: str) -> dict[str, Any]:
    return {
        "asset": _address,
        "goose": _GOOSE,
        "here": f"?lang={language}",
        "lang": language,
        "t": _words(language),
        "version": __version__,
    }


def _address(name: str) -> str:
    return f"/static/{digest()}/{name}"


def _words(language: str) -> SimpleNamespace:
    """The catalogue as attributes, so that no text is mistaken for a method of a dict."""
    sections = texts(language).items()
    return SimpleNamespace(**{name: SimpleNamespace(**words) for name, words in sections})


def _pool_in_words(pool: PoolView, words: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    live = words["live"]
    models = [_model_in_words(model, live) for model in pool.models[:_ROWS_MAX]]
    return {
        "choices": [model for model in pool.models if model.chats],
        "models": models[:_FOLD],
        "folded": models[_FOLD:],
        "fold": live["fold"].format(count=f"{len(pool.models) - _FOLD:,}"),
        "more_models": _more(len(pool.models), live),
        "more_nodes": _more(len(pool.nodes), live),
        "nodes": [_node_in_words(node, words) for node in pool.nodes[:_ROWS_MAX]],
        "pace": f"{pool.tokens_per_s:.1f}".removesuffix(".0"),
        "queued": f"{pool.queued:,}",
        "ready": f"{pool.nodes_ready:,}",
        "ready_of": live["of"].format(total=f"{len(pool.nodes):,}"),
        "running": f"{pool.running:,}",
        "running_of": live["of"].format(total=f"{pool.slots:,}"),
    }


def _evenness_in_words(evenness: Evenness, live: Mapping[str, str]) -> dict[str, str]:
    """What fair.js says too."""
    jain, gap, bound = evenness.jain, evenness.gap, evenness.bound
    return {
        "members": f"{evenness.members:,}",
        "even": live["nothing"] if jain is None else f"{jain:.3f}",
        "gap": live["nothing"] if gap is None else _credits(gap),
        "bound": "" if bound is None else live["at_most"].format(most=_credits(bound)),
    }


def _credits(micro: int) -> str:
    return f"{micro / 1_000_000:,.0f}"


def _node_in_words(node: NodeView, words: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    status, slots = node.status, node.status.slots or 0
    known = {"running": f"{node.busy:,}", "slots": f"{slots:,}"}
    return {
        "count": words["live"]["slots"].format(**known) if slots else "",
        "engine": status.kind.value if status.kind else "",
        "geese": [at < node.busy for at in range(min(slots, _GEESE_MAX))],
        "id": status.node.id,
        "state": status.state.value,
        "state_text": words["states"][status.state.value],
    }


def _model_in_words(model: ModelView, live: Mapping[str, str]) -> dict[str, str]:
    return {
        "id": model.id,
        "ready": "yes" if model.ready else "no",
        "detail": _detail(model, live),
    }


def _more(count: int, live: Mapping[str, str]) -> str:
    """What stands below a list that shows only its first rows."""
    return live["more"].format(count=f"{count - _ROWS_MAX:,}") if count > _ROWS_MAX else ""


def _detail(model: ModelView, live: Mapping[str, str]) -> str:
    """What pool.js says too: what it is for, how long a context, and on how many nodes."""
    where = live["on_node"] if model.nodes_ready == 1 else live["on_nodes"]
    parts = [
        "" if model.chats else live["embeddings"],
        live["context"].format(tokens=f"{model.context_tokens:,}") if model.context_tokens else "",
        where.format(count=f"{model.nodes_ready:,}") if model.ready else live["not_ready"],
    ]
    return " · ".join(filter(None, parts))


def _snippets(visit: Visit, model: str) -> list[dict[str, str]]:
    """Each snippet around the model's name, which call.js exchanges for the chosen one."""
    question = texts(visit.language)["call"]["question"]
    values = {"model": _GAP, "open": visit.open, "origin": visit.origin, "question": question}
    snippets: list[dict[str, str]] = []
    for name, title, file in _SNIPPETS:
        before, _, after = _template(file).render(values).partition(f'"{_GAP}"')
        literal = json.dumps(model, ensure_ascii=False)
        if name == "curl":
            literal = shlex.quote(literal)[1:-1]  # it stands within quotes already
        parts = {"before": before, "model": literal, "after": after}
        snippets.append({"id": name, "name": title, **parts})
    return snippets


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("anser.api"),
        autoescape=select_autoescape(enabled_extensions=("html",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["shell"] = shlex.quote
    return environment


def _template(name: str) -> Template:
    return _environment().get_template(name)
