"""Pages of other sites: which may read what, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from anser.wire.cors import Cors
from tests.outside import CHAT, HELLO, head, node, talk
from tests.server import Server, serving

pytestmark = pytest.mark.anyio

SITE = "https://chat.example"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform that pages of two sites may ask."""
    environment = {"ANSER_SERVER_CORS_ORIGINS": f"{SITE}, http://localhost:3000"}
    folder = tmp_path_factory.mktemp("cors") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


def preflight(server: Server, path: str, origin: str = SITE) -> httpx.Response:
    """What a browser asks before a page may ask."""
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(f"{server.url}{path}", headers=headers)


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/usage"])
def test_a_preflight_is_answered_without_a_key(server: Server, path: str) -> None:
    """Origin, methods and headers are allowed, and credentials never."""
    response = preflight(server, path)
    assert response.status_code == 204
    assert response.headers[ALLOWED] == SITE
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization, *"
    assert response.headers["vary"] == "origin"
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{SITE}.evil.example", ""])
def test_other_sites_read_nothing(server: Server, origin: str) -> None:
    """An origin that is not listed exactly is not named; caches are told that it matters."""
    for response in (
        preflight(server, CHAT, origin),
        httpx.get(f"{server.url}/health", headers={"origin": origin}),
    ):
        assert ALLOWED not in response.headers
        assert "access-control-allow-headers" not in response.headers
        assert response.headers["vary"] == "origin"


def test_errors_are_read_and_a_key_is_still_needed(server: Server) -> None:
    """404, 401, 403 and refusals of the wire are as readable as answers."""
    for path, key, status in (
        ("/nothing", server.key, 404),
        ("/v1/models", "hf_wrong", 401),
        ("/v1/models", "", 403),
        ("/v1/usage", "", 403),
        ("/v1/models", server.key, 200),
    ):
        headers = {"origin": SITE, **({"authorization": f"Bearer {key}"} if key else {})}
        response = httpx.get(f"{server.url}{path}", headers=headers)
        assert (response.status_code, response.headers[ALLOWED]) == (status, SITE), path
        assert response.headers.get_list(ALLOWED) == [SITE]
    chunked = head(server, f"Origin: {SITE}", "Transfer-Encoding: chunked") + b"zz\r\n"
    refused = talk(server, chunked)
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert f"{ALLOWED}: {SITE}".encode() in refused


async def test_a_stream_is_read(server: Server) -> None:
    """The head of a stream says who may read it, and that all its headers may be."""
    async with node(server), httpx.AsyncClient() as client:
        response = await client.post(
            f"{server.url}{CHAT}",
            json={**HELLO, "stream": True},
            headers={"origin": SITE, "authorization": f"Bearer {server.key}"},
        )
    assert response.status_code == 200
    assert response.headers[ALLOWED] == SITE
    assert response.headers["access-control-expose-headers"] == "*"
    assert "x-request-id" in response.headers


def test_operators_addresses_and_metrics_are_not_shared(server: Server) -> None:
    """No page reads metrics, and the operators' socket knows of no origin."""
    headers = {"origin": SITE}
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 404
    transport = httpx.HTTPTransport(uds=server.socket)
    with httpx.Client(transport=transport, base_url="http://anser", headers=headers) as client:
        assert ALLOWED not in client.get("/admin/v1/nodes").headers


def test_all_origins_are_one_answer() -> None:
    """With `*` the answer is the same for all, so that caches need not keep it apart."""
    cors = Cors(["*"])
    told = dict(cors.headers([(b"origin", b"https://any.example")], preflight=False))
    assert told[ALLOWED.encode()] == b"*"
    assert b"vary" not in told
    assert repr(cors) == "<Cors 1 origins, any=True>"
