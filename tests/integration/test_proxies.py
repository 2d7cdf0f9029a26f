"""A platform behind proxies: whose word is taken, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from anser.api.auth import FAILURES_MAX
from tests.server import Server, serving


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform that trusts a proxy on this machine."""
    environment = {
        "ANSER_SERVER_TRUSTED_PROXIES": "127.0.0.1",
        "ANSER_MEMBERS_ANONYMOUS": "on",
    }
    folder = tmp_path_factory.mktemp("proxies") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


def status(server: Server, path: str = "/v1/models", **headers: str) -> int:
    """What a request with these headers is answered."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(f"{server.url}{path}", headers=named).status_code


def test_wrong_keys_are_counted_by_the_client_that_the_proxy_names(server: Server) -> None:
    """One network's guesses slow that network alone, whatever it writes left of its address."""
    for number in range(FAILURES_MAX):
        forged = f"203.0.113.{number}, 192.0.2.7"
        assert status(server, x_api_key=f"hf_{number}", x_forwarded_for=forged) == 401
    assert status(server, x_api_key="hf_more", x_forwarded_for="192.0.2.8") == 429
    assert status(server, x_api_key="hf_more", x_forwarded_for="198.51.100.7") == 401
    assert status(server, x_api_key="hf_more", forwarded="for=192.0.2.9") == 429
    assert status(server, x_api_key="hf_more") == 401


def test_a_network_has_all_its_ipv6_addresses(server: Server) -> None:
    """Whoever has an IPv6 network has 2^64 addresses: guesses from all of them count as one's."""
    for number in range(FAILURES_MAX):
        forged = f"2001:db8:0:1:{number:x}::{number + 1:x}"
        assert status(server, x_api_key=f"hf_{number}", x_forwarded_for=forged) == 401
    assert status(server, x_api_key="hf_more", x_forwarded_for="2001:db8:0:1::ffff") == 429
    assert status(server, x_api_key="hf_more", x_forwarded_for="2001:db8:0:2::1") == 401


def test_no_header_makes_a_request_local_or_a_page_strange(server: Server) -> None:
    """Metrics stay closed to what is forwarded, and a rebound page cannot pass for a stranger."""
    assert status(server, "/metrics") == 404
    assert status(server, "/metrics", x_forwarded_for="127.0.0.1") == 404
    assert status(server, "/metrics", x_forwarded_proto="http") == 404
    page = {"host": "evil.example", "origin": "http://evil.example"}
    assert status(server, **page) == 403
    assert status(server, **page, x_forwarded_for="192.0.2.7") == 403


def test_the_page_shows_the_scheme_that_its_visitor_used(server: Server) -> None:
    """Behind a proxy that speaks TLS the examples have an https address."""
    headers = {"host": "anser.example", "x-forwarded-for": "192.0.2.7"}
    page = httpx.get(server.url, headers={**headers, "x-forwarded-proto": "https"}).text
    assert "https://anser.example/v1" in page
    assert "http://anser.example/v1" in httpx.get(server.url, headers=headers).text
