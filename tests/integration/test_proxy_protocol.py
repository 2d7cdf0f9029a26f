"""The PROXY protocol over real sockets: who counts as the client, and who is closed."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from anser.api.auth import FAILURES_MAX
from anser.wire.proxies import Proxies
from anser.wire.server import GuardSettings
from tests.certificates import Pair, pair
from tests.guarded import Client, guarded_server, post
from tests.integration.test_config_faults import complaint, serve
from tests.proxy_headers import LOCAL, line, packed
from tests.server import Server, serving, wait_until
from tests.streams import WAIT_S, idlers

pytestmark = pytest.mark.anyio

HEAD_S = 1.0
Served = tuple[Server, Pair | None]
ASK = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The pair that the platform behind TLS shows."""
    return pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module", params=["http", "https"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shown: Pair
) -> Iterator[Served]:
    """A platform behind a proxy on this machine, with and without TLS."""
    environment = {
        "ANSER_SERVER_PROXY_PROTOCOL": "on",
        "ANSER_SERVER_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8",
        "ANSER_SERVER_HEAD_TIMEOUT_S": str(HEAD_S),
        "ANSER_MEMBERS_ANONYMOUS": "on",
    }
    secure = shown if request.param == "https" else None
    environment |= {} if secure is None else secure.environment
    options = ("--no-engine", "--host", "127.0.0.1")
    folder = tmp_path_factory.mktemp("proxied") / "data"
    with serving(folder, *options, environment=environment) as running:
        yield running, secure


def ask(
    server: Served,
    *header: bytes,
    key: str = "",
    source: str = "127.0.0.1",
    **named: str,
) -> int:
    """Say these pieces of a header, one after the other, then ask; the status, 0 if closed."""
    running, secure = server
    head = ASK + (f"X-Api-Key: {key}\r\n".encode() if key else b"")
    head += b"".join(f"{n.replace('_', '-')}: {v}\r\n".encode() for n, v in named.items())
    received = b""
    address = ("127.0.0.1", running.port)
    with socket.create_connection(address, timeout=WAIT_S, source_address=(source, 0)) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in header:
            plain.sendall(piece)
            if len(header) > 1:
                time.sleep(0.002)
        with suppress(ConnectionError, ssl.SSLError):
            talk: socket.socket = plain
            if secure is not None:
                talk = secure.trusting().wrap_socket(plain, server_hostname="127.0.0.1")
            with talk:
                talk.sendall(head + b"\r\n")
                while data := talk.recv(65_536):
                    received += data
    return int(received.split()[1]) if received else 0


def test_wrong_keys_are_counted_by_the_client_that_the_header_names(server: Served) -> None:
    """One network's guesses slow that network alone, in both versions of the header."""
    for number in range(FAILURES_MAX):
        header = line("192.0.2.7") if number % 2 else packed("192.0.2.7")
        assert ask(server, header, key=f"hf_{number}") == 401
    assert ask(server, line("192.0.2.8"), key="hf_more") == 429
    assert ask(server, packed("192.0.2.9"), key="hf_more") == 429
    assert ask(server, packed("::ffff:192.0.2.9"), key="hf_more") == 429
    assert ask(server, packed("198.51.100.7"), key="hf_more") == 401
    assert ask(server, line("2001:db8::7"), key="hf_more") == 401
    assert ask(server, LOCAL, key="hf_more") == 401
    assert ask(server, line("198.51.100.8"), key="hf_x", x_forwarded_for="192.0.2.7") == 401


def test_a_trusted_proxy_behind_another_is_believed(server: Served) -> None:
    """Where the header names a trusted proxy, what that one writes in HTTP is believed."""
    for number in range(FAILURES_MAX):
        named = {"x_forwarded_for": "203.0.113.7"}
        assert ask(server, line("10.1.1.1"), key=f"hf_{number}", **named) == 401
    assert ask(server, line("203.0.113.7"), key="hf_more") == 429
    assert ask(server, line("10.1.1.1"), key="hf_more") == 401


def test_a_header_may_come_in_pieces(server: Served) -> None:
    """One byte at a time is as good as all at once."""
    for header in (line("2001:db8::7"), packed("192.0.2.7", extensions=b"\x04\0\3abc")):
        assert ask(server, *(bytes([byte]) for byte in header)) == 200


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 99999\r\n",
        b"PROXY TCP4 192.0.2.7\r\n",
        line("192.0.2.7") + line("192.0.2.7"),
        packed("192.0.2.7")[:12] + b"\x21\x11\0\x0b" + bytes(11),
    ],
)
def test_a_trusted_proxy_without_a_proper_header_is_closed(server: Served, header: bytes) -> None:
    """It is not guessed what such a connection might have meant."""
    status = ask(server, header)
    twice = header.count(b"PROXY") == 2 and server[1] is None
    assert status == (400 if twice else 0)  # the second one is no HTTP
    assert server[0].complaints == ""


def test_no_header_is_read_from_others(server: Served) -> None:
    """An address that is not trusted speaks for itself; its header is no HTTP, and no TLS."""
    assert ask(server, source="127.0.0.2") == 200
    assert ask(server, line("192.0.2.7"), source="127.0.0.2") == (400 if server[1] is None else 0)


def test_no_header_makes_a_request_local(server: Served) -> None:
    """Metrics stay closed to what came through a proxy, whatever address it names."""
    running, secure = server
    if secure is not None:
        return
    for header in (line("127.0.0.1"), packed("127.0.0.1"), LOCAL):
        with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as plain:
            plain.sendall(header + b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert plain.recv(100).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("begun", [b"", b"PROXY TCP4 192.0.2.7 ", line("192.0.2.7")])
def test_a_slow_header_is_cut(server: Served, begun: bytes) -> None:
    """Header and handshake have one time together, server.head_timeout_s."""
    running, _ = server
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as plain:
        plain.sendall(begun)
        since = time.monotonic()
        assert plain.recv(100) == b""
        assert 0.5 * HEAD_S < time.monotonic() - since < HEAD_S + 5


async def test_silent_connections_harm_nobody(server: Served) -> None:
    """Hundreds that stop within their header hold nobody up."""
    async with (
        idlers(server[0].port, 200),
        idlers(server[0].port, 200, say=b"PROXY TCP4 "),
        idlers(server[0].port, 200, say=packed("192.0.2.7")[:20]),
    ):
        assert ask(server, line("192.0.2.7")) == 200


async def test_the_other_loop_reads_headers_as_well() -> None:
    """asyncio's own loop (uvloop's runs above); no byte behind the header is lost."""
    settings = GuardSettings(head_timeout_s=HEAD_S, proxies=Proxies(["127.0.0.1"]))
    async with guarded_server(settings, proxy_protocol=True) as tiny, Client.to(tiny) as client:
        client.send(packed("192.0.2.7") + post("/a", b"body") + post("/b"))
        assert (await client.answer())[2] == b"/a:4"
        assert (await client.answer())[2] == b"/b:0"
        async with Client.to(tiny) as other:
            other.send(post("/c"))
            assert await other.closed()
    assert tiny.paths == ["/a", "/b"]


def test_nobody_to_trust_stops_the_start(tmp_path: Path) -> None:
    """Without trusted proxies the setting would do nothing: it names what is missing."""
    environment = {"ANSER_SERVER_PROXY_PROTOCOL": "true"}
    line_ = complaint(serve("--data-dir", tmp_path / "d", environment=environment))
    assert "ANSER_SERVER_PROXY_PROTOCOL: server.proxy_protocol needs the addresses" in line_
    assert "server.trusted_proxies" in line_


def test_proxies_are_not_forgotten_by_a_signal(tmp_path: Path) -> None:
    """SIGHUP never leaves the header on with nobody to trust: that reading changes nothing."""
    file = tmp_path / "mine.toml"
    text = '[server]\nproxy_protocol = true\ntrusted_proxies = ["127.0.0.1"]\n'
    file.write_text(text)
    with serving(tmp_path / "data", "--no-engine", "--config", str(file)) as running:
        file.write_text("[server]\ndrain_s = 3\n")
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "settings stay as they were" in running.complaints)
        said = json.loads(running.complaints.splitlines()[-1])["reason"]
        assert "server.proxy_protocol needs the addresses" in said
        assert ask((running, None), line("192.0.2.7")) == 200
