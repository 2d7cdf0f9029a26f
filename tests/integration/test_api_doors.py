"""Who may ask the API, and where: keys, guesses, echoes, paths and methods, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from anser.api.auth import FAILURES_MAX
from tests.outside import CHAT, HELLO, node, talk
from tests.server import Server, serving

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform that wants a key."""
    environment = {"ANSER_MEMBERS_ANONYMOUS": "off"}
    folder = tmp_path_factory.mktemp("doors") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client with the key."""
    headers = {"authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


# Who asks, and who guesses (10, 53)


def test_every_kind_of_wrong_key_is_401(server: Server) -> None:
    """No key, another scheme, revoked, right prefix but wrong rest: 401 in the envelope."""
    made = server.admin("POST", "/keys", {"member": "local/default/owner"})
    server.admin("DELETE", f"/keys/{made['id']}")
    wrong = [
        {},
        {"authorization": f"Basic {server.key}"},
        {"authorization": server.key},
        {"authorization": f"Bearer {made['key']}"},
        {"authorization": f"Bearer {server.key[:-1]}_"},
        {"authorization": f"Bearer {server.key}x"},
        {"authorization": f"Bearer {'x' * 10_000}"},
        {"x-api-key": "hf_" + 43 * "A"},
    ]
    for headers in wrong:
        response = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert response.status_code == 401, headers
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": server.key}).is_success


def test_a_key_of_a_megabyte_is_refused(server: Server) -> None:
    """A head that large is refused as such."""
    start = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
    received = talk(server, start, b"x" * 1_000_000, b"\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 431 ")


def test_an_expired_key_is_401(server: Server) -> None:
    """A key is refused from the moment it expires."""
    made = server.admin("POST", "/keys", {"member": "local/default/owner", "expires_in_s": 1})
    headers = {"authorization": f"Bearer {made['key']}"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).is_success
    time.sleep(1.1)
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


def test_nothing_of_a_key_is_logged_or_measured(server: Server) -> None:
    """Neither a right key nor a wrong one is found in logs or metrics."""
    wrong = "hf_" + 43 * "Z"
    for key in (server.key, wrong):
        httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"})
    told = server.log.read_text() + httpx.get(f"{server.url}/metrics").text
    assert "anser_num_requests_waiting" in told
    assert server.key not in told
    assert wrong not in told


def test_guessing_keys_is_slowed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """After many wrong keys from one network the next are told to wait; a forged origin changes
    nothing. A key that was just made opens all the same, and placeholders are no guesses."""
    folder = tmp_path_factory.mktemp("guess") / "data"
    with serving(folder, "--no-engine") as server:

        def status(key: str, **forged: str) -> int:
            headers = {"authorization": f"Bearer {key}", **forged}
            return httpx.get(f"{server.url}/v1/models", headers=headers).status_code

        for _ in range(FAILURES_MAX + 2):
            assert status("EMPTY") == 401
        for number in range(FAILURES_MAX):
            assert status(f"hf_{number}", **{"x-forwarded-for": f"192.0.2.{number}"}) == 401
        assert status("hf_more") == 429
        assert status("hf_more", **{"x-forwarded-for": "198.51.100.7"}) == 429
        made = server.admin("POST", "/keys", {"member": "local/default/owner"})["key"]
        assert status(made) == status(server.key) == 200


# What is another's


async def test_what_is_anothers_is_answered_like_what_does_not_exist(server: Server) -> None:
    """A member's key finds neither another's receipts nor why it waited nor its usage: 404."""
    server.admin("POST", "/members", {"id": "other"})
    key = server.admin("POST", "/keys", {"member": "other"})["key"]
    own, others = ({"authorization": f"Bearer {each}"} for each in (server.key, key))
    async with node(server), httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        answer = await client.post(CHAT, json=HELLO, headers=own)
        request, name = answer.headers["x-request-id"], answer.json()["id"]
        for path in (
            f"/v1/receipts/{request}",
            f"/v1/receipts/{name}",
            f"/v1/why/{request}",
        ):
            assert (await client.get(path, headers=own)).status_code == 200, path
            hidden = await client.get(path, headers=others)
            nothing = await client.get(path.replace(request, "req_0"), headers=others)
            assert hidden.status_code == nothing.status_code == 404, path
        path = "/v1/usage?member=local/default/owner"
        assert (await client.get(path, headers=own)).status_code == 200
        assert (await client.get(path, headers=others)).status_code == 404


# Echoes, paths, other listeners' addresses (16, 17, 20)


def test_a_callers_text_cannot_forge_headers_or_log_lines(
    server: Server, http: httpx.Client
) -> None:
    """Line breaks and escape sequences in names come back escaped, and are not logged."""
    evil = "m\r\nx-evil: 1\r\n\r\nHTTP/1.1 200 OK\x1b[2J"
    bodies = [
        {**HELLO, "model": evil},
        {**HELLO, "tools": [{"type": "function", "function": {"name": evil}}]},
        {**HELLO, evil: 1},
    ]
    responses = [http.post(CHAT, json=body) for body in bodies]
    responses.append(http.get("/v1/models/%0d%0ax-evil:%201%1b"))
    for response in responses:
        assert response.status_code in (400, 404)
        assert "x-evil" not in response.headers
        assert response.json()["error"]["message"].isprintable()
    assert "x-evil" not in server.log.read_text()


def test_a_callers_request_id_is_not_taken_over(http: httpx.Client) -> None:
    """Receipts are kept under the platform's own identifiers."""
    headers = {"x-request-id": "req_000000000000000000000000"}
    first = http.get("/health", headers=headers).headers["x-request-id"]
    second = http.get("/health", headers=headers).headers["x-request-id"]
    assert first.startswith("req_")
    assert len({first, second, headers["x-request-id"]}) == 3


PATHS = [
    "//",
    "//v1/models",
    "/../../etc/passwd",
    "/static/../../../etc/passwd",
    "/static/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%2f..%2fetc%2fpasswd",
    "/v1/blobs/../../../../etc/passwd",
    "/v1/blobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/v1/blobs/" + "a" * 64,
    "/v1/models/%00",
    "/v1/models/..%2f..%2fetc",
    "/%00",
    "/v1/chat/completions/",
    "/v1",
    "/admin/v1/members",
    "/admin/v1/keys",
]


@pytest.mark.parametrize("path", PATHS)
def test_path_tricks_lead_nowhere(server: Server, path: str) -> None:
    """No path reaches a file, another route or the operators' addresses: 400 or 404."""
    lines = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n\r\n"
    received = talk(server, lines.encode())
    assert received.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
    assert b"root:" not in received


def test_metrics_are_for_this_machine(server: Server) -> None:
    """Metrics are served on loopback, and not to what has come through a proxy."""
    assert httpx.get(f"{server.url}/metrics").is_success
    for forged in ({"x-forwarded-for": "127.0.0.1"}, {"host": "anser.example"}):
        assert httpx.get(f"{server.url}/metrics", headers=forged).status_code == 404


def test_methods_are_told(http: httpx.Client) -> None:
    """A known path with another verb is 405 with what is allowed; HEAD and OPTIONS answer."""
    response = http.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST, OPTIONS"
    assert http.options("/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"
    head_only = http.head("/v1/models")
    assert head_only.status_code == 200
    assert head_only.content == b""
    assert http.head("/").status_code == 200
    assert http.delete("/v1/pool").json()["error"]["code"] == "method_not_allowed"
