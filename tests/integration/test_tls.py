"""TLS on the public listener, over real sockets: who is let in, who is cut, what stops a start."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from anser.wire.server import GuardSettings
from tests.certificates import LONG_AGO, Pair, pair
from tests.guarded import Client, guarded_server, post
from tests.integration.test_config_faults import complaint, serve
from tests.outside import CHAT, HELLO, error_of, node
from tests.server import Server, serving, wait_until
from tests.streams import WAIT_S, idlers

pytestmark = pytest.mark.anyio

HEAD_S = 1.0


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The pair that the platform shows."""
    return pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shown: Pair) -> Iterator[Server]:
    """A platform behind TLS that gives nobody long for a handshake."""
    environment = {**shown.environment, "ANSER_SERVER_HEAD_TIMEOUT_S": str(HEAD_S)}
    folder = tmp_path_factory.mktemp("tls") / "data"
    with serving(folder, "--no-engine", environment=environment) as running:
        yield running


def talk(server: Server, context: ssl.SSLContext, request: bytes) -> bytes:
    """Send these bytes behind a handshake, and read until the platform closes."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(request)
        received = b""
        while data := secure.recv(65_536):
            received += data
        return received


def test_the_address_is_https_and_the_certificate_is_shown(server: Server, shown: Pair) -> None:
    """A client that trusts the certificate is answered; one that does not never sends a byte."""
    assert server.url == f"https://127.0.0.1:{server.port}"
    with httpx.Client(verify=shown.trusting()) as client:
        assert client.get(f"{server.url}/health").json()["status"] == "ok"
        assert f"https://127.0.0.1:{server.port}/v1" in client.get(server.url).text
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize("offered", [["h2", "http/1.1"], ["http/1.1"], ["h2"], []])
def test_http_1_1_alone_is_agreed_on(server: Server, shown: Pair, offered: list[str]) -> None:
    """Of the protocols that a client offers HTTP/1.1 is taken, or none; nothing older than 1.2."""
    context = shown.trusting()
    if offered:
        context.set_alpn_protocols(offered)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.selected_alpn_protocol() == ("http/1.1" if "http/1.1" in offered else None)
        assert secure.version() in ("TLSv1.2", "TLSv1.3")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused(server: Server, shown: Pair) -> None:
    """TLS 1.1 has been deprecated since RFC 8996."""
    context = shown.trusting()
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1_1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        talk(server, context, b"")


async def test_a_stream_passes(server: Server, shown: Pair) -> None:
    """A streamed answer arrives whole, event by event, behind TLS as elsewhere."""
    headers = {"authorization": f"Bearer {server.key}"}
    async with node(server), httpx.AsyncClient(verify=shown.trusting()) as client:
        body = {**HELLO, "stream": True}
        response = await client.post(f"{server.url}{CHAT}", json=body, headers=headers)
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    texts = [json.loads(event)["choices"] for event in events[:-1]]
    assert "".join(c[0]["delta"].get("content") or "" for c in texts if c) == "hello"


def test_commands_reach_it(server: Server, shown: Pair) -> None:
    """`anser --url https://...` trusts what $SSL_CERT_FILE names, and says why it does not."""
    command = [sys.executable, "-m", "anser", "models", "--json", "--url", server.url]
    environment = {**os.environ, "ANSER_LANG": "en", "ANSER_API_KEY": server.key}
    trusting = {**environment, "SSL_CERT_FILE": str(shown.certificate)}
    for env, code in ((trusting, 0), (environment, 1)):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, "CERTIFICATE_VERIFY_FAILED" in done.stdout) == (code, bool(code))


def test_plain_http_is_closed(server: Server) -> None:
    """Who speaks HTTP without TLS gets no answer and no connection; the log stays quiet."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        received = b""
        with suppress(ConnectionResetError):
            while data := plain.recv(100):
                received += data
    assert received == b"" or received.startswith(b"\x15")  # an alert of TLS, no HTTP
    assert server.complaints == ""


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_a_slow_handshake_is_cut(server: Server, begun: bytes) -> None:
    """A handshake that does not end within server.head_timeout_s is closed, begun or not."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as plain:
        plain.sendall(begun)
        since = time.monotonic()
        assert plain.recv(100) == b""
        assert 0.5 * HEAD_S < time.monotonic() - since < HEAD_S + 5


async def test_silent_connections_harm_nobody(server: Server, shown: Pair) -> None:
    """Hundreds that never shake hands hold nobody up, and are gone after their time."""
    async with (
        idlers(server.port, 400),
        idlers(server.port, 100, say=b"\x16\x03\x01\x02\x00\x01"),
        httpx.AsyncClient(verify=shown.trusting(), timeout=WAIT_S) as client,
    ):
        assert (await client.get(f"{server.url}/health")).status_code == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 3\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost", 408),
    ],
)
def test_refusals_are_read(server: Server, shown: Pair, request_: bytes, status: int) -> None:
    """What the wire refuses, and why, is read by its client before the connection ends."""
    assert error_of(talk(server, shown.trusting(), request_))[0] == status


async def test_the_other_loop_shakes_hands_as_well(tmp_path: Path) -> None:
    """asyncio's own loop (uvloop's runs above): keep-alive, a cut, and the limit on connections."""
    mine = pair(tmp_path)
    settings = GuardSettings(head_timeout_s=HEAD_S, connections_max=2)
    async with (
        guarded_server(settings, tls=mine.showing()) as tiny,
        Client.to(tiny, tls=mine.trusting()) as client,
        Client.to(tiny) as silent,
    ):
        for _ in range(2):
            client.send(post("/a", b"body"))
            assert (await client.answer())[2] == b"/a:4"
        async with Client.to(tiny) as third:
            assert await third.closed()
        assert await silent.closed()
        async with Client.to(tiny, tls=mine.trusting()) as fourth:
            fourth.send(post("/b"))
            assert (await fourth.answer())[2] == b"/b:0"
    assert tiny.paths == ["/a", "/a", "/b"]


def _lost(made: Pair) -> None:
    made.key.unlink()


def _open(made: Pair) -> None:
    made.key.chmod(0o644)


def _other(made: Pair) -> None:
    strange = pair(made.key.parent / "other")
    made.key.write_bytes(strange.key.read_bytes())


def _no_certificate(made: Pair) -> None:
    made.certificate.write_bytes(made.key.read_bytes())


def _no_key(made: Pair) -> None:
    made.key.write_bytes(made.certificate.read_bytes())


def _locked(made: Pair) -> None:
    pair(made.key.parent, passphrase=b"secret")


def _long(made: Pair) -> None:
    made.certificate.write_bytes(b"x" * (1024 * 1024 + 1))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_lost, ["server.tls_key", "private.pem cannot be read: No such file", "Correct the path"]),
        (_open, ["server.tls_key", "others can read (mode 644)", "chmod 600 "]),
        (_other, ["server.tls_key", "private.pem is not the key of ", "belong together"]),
        (_no_certificate, ["server.tls_certificate", "public.pem has no certificate in PEM"]),
        (_no_key, ["server.tls_key", "private.pem has no private key in PEM"]),
        (_locked, ["server.tls_key", "passphrase", "Store it without one"]),
        (_long, ["server.tls_certificate", "too long"]),
    ],
)
def test_a_pair_that_cannot_be_shown_stops_the_start(
    tmp_path: Path, spoil: Callable[[Pair], None], parts: list[str]
) -> None:
    """One line names the variable, the setting, the file and the cure, before anything is made."""
    made = pair(tmp_path)
    spoil(made)
    data = tmp_path / "data"
    line = complaint(serve("--data-dir", data, "--port", "0", environment=made.environment))
    assert [part for part in ["ANSER_SERVER_TLS_", *parts] if part not in line] == []
    assert not data.exists()


def test_half_a_pair_stops_the_start(tmp_path: Path) -> None:
    """A certificate without key, and a key without certificate, are told apart; paths in a file
    are taken from the file's own folder.
    """
    made, file = pair(tmp_path), tmp_path / "mine.toml"
    at = ("--config", file, "--data-dir", tmp_path / "data", "--port", "0")
    file.write_text('[server]\ntls_certificate = "public.pem"\n')
    assert f"{file}: server.tls_certificate needs its key" in complaint(serve(*at))
    file.write_text('[server]\ntls_key = "private.pem"\n')
    assert f"{file}: server.tls_key needs its certificate" in complaint(serve(*at))
    file.write_text('[server]\ntls_key = "~nobody-here/x"\ntls_certificate = "x"\n')
    assert "no home folder" in complaint(serve(*at))
    file.write_text('[server]\ntls_key = "private.pem"\ntls_certificate = "public.pem"\n')
    made.key.chmod(0o640)  # a group that keeps keys may read it
    with serving(tmp_path / "data", "--no-engine", "--config", str(file)) as server:
        assert server.url.startswith("https:")


def test_an_expired_certificate_is_told_and_served(tmp_path: Path) -> None:
    """Clients decide whom they trust; the operator is warned, by the log and by the doctor."""
    made = pair(tmp_path, ends=LONG_AGO + dt.timedelta(days=1))
    with serving(tmp_path / "data", "--no-engine", environment=made.environment) as server:
        assert "clients will refuse the certificate" in server.complaints
        assert "server.tls_certificate expired on 2020-01-02 00:00 UTC" in server.complaints
        assert httpx.get(f"{server.url}/health", verify=False).status_code == 200


def test_the_doctor_looks_at_the_certificate(tmp_path: Path) -> None:
    """Sound, about to end, and broken are ok, warn and fail."""

    def checked(made: Pair) -> dict[str, str]:
        command = [sys.executable, "-m", "anser", "doctor", "--json"]
        environment = {**os.environ, **made.environment, "ANSER_DATA_DIR": str(tmp_path / "d")}
        environment["ANSER_ENGINE_ENABLED"] = "false"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        checks = json.loads(done.stdout)["checks"]
        found: dict[str, str] = next(each for each in checks if each["name"] == "certificate")
        return found

    sound = checked(pair(tmp_path, "anser.example"))
    assert (sound["verdict"], sound["found"]) == (
        "ok",
        "for anser.example, 127.0.0.1 until 2090-01-01",
    )
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=3)  # noqa: TID251 - it is the doctor's clock
    ending = checked(pair(tmp_path, ends=soon))
    assert (ending["verdict"], "Renew it" in ending["way"]) == ("warn", True)
    broken = pair(tmp_path)
    broken.key.write_text("nothing")
    assert checked(broken)["verdict"] == "fail"


def test_a_name_is_printed_that_the_certificate_is_for(tmp_path: Path) -> None:
    """On a wildcard address the URL has a host name that clients will find in the certificate."""
    made = pair(tmp_path, "*.anser.example", "localhost")
    with serving(
        tmp_path / "data", "--no-engine", "--host", "::", environment=made.environment
    ) as server:
        assert server.url == f"https://localhost:{server.port}"


async def test_a_client_that_leaves_in_mid_handshake(server: Server, shown: Pair) -> None:
    """Resets in every moment of a handshake leave the platform as it was."""
    loop = asyncio.get_running_loop()
    for size in range(0, 400, 40):
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = shown.trusting().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            plain.setblocking(False)
            await loop.sock_sendall(plain, outgoing.read()[:size])
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    async with httpx.AsyncClient(verify=shown.trusting()) as http:
        assert (await http.get(f"{server.url}/health")).status_code == 200
    assert server.complaints == ""


async def test_who_does_not_read_is_cut(tmp_path: Path) -> None:
    """Behind TLS, too, an answer that nobody reads is held back, bounded, and then cut off."""
    mine = pair(tmp_path)
    settings = GuardSettings(write_timeout_s=HEAD_S)
    async with guarded_server(settings, tls=mine.showing()) as tiny:
        async with Client.to(tiny, tls=mine.trusting()) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.send(post("/pour"))
            await asyncio.sleep(0.4 * HEAD_S)
            held = tiny.sent
            assert 0 < held < 64 * 1024 * 1024  # the kernel's buffers take the most of it
            await asyncio.sleep(1.6 * HEAD_S)
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await client.reader.readexactly(4_096 * 65_536)
        async with Client.to(tiny, tls=mine.trusting()) as other:
            other.send(post("/a"))
            assert (await other.answer())[2] == b"/a:0"


async def test_without_files_it_recovers(tmp_path: Path, shown: Pair) -> None:
    """More connections than the system gives it files for: they wait, and it serves afterwards."""
    environment = {**shown.environment, "ANSER_SERVER_HEAD_TIMEOUT_S": str(HEAD_S)}
    with serving(
        tmp_path / "data", "--no-engine", environment=environment, descriptors=64
    ) as small:
        async with idlers(small.port, 200):
            await asyncio.sleep(0.5)
        url, trusting = f"{small.url}/health", shown.trusting()

        def served() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(url, verify=trusting, timeout=WAIT_S).status_code == 200
            return False

        await asyncio.to_thread(wait_until, served)
        assert '"level": "error"' not in small.complaints
