"""SIGHUP: settings and certificates are taken up by a platform that runs, or stay as they were."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import pty
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from tests.certificates import LONG_AGO, Pair, pair
from tests.hostile import Talk
from tests.outside import CHAT, HELLO, error_of, head, listed, talk
from tests.server import Server, serving, wait_until
from tests.streams import WAIT_S, Stream, crowd, gated, soon

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The settings file."""
    written = tmp_path / "mine.toml"
    written.write_text("")
    return written


@pytest.fixture
def server(tmp_path: Path, file: Path) -> Iterator[Server]:
    """A platform that reads it."""
    with serving(tmp_path / "data", "--no-engine", "--config", str(file)) as running:
        yield running


def hang_up(server: Server, word: str) -> str:
    """Send SIGHUP; what the log has said since, once it has said `word`."""
    before = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: word in server.log.read_text()[before:])
    return server.log.read_text()[before:]


def reread(server: Server, file: Path, text: str) -> str:
    """Write these settings and have them taken up; what the log says."""
    file.write_text(text)
    return hang_up(server, "settings were read anew")


def in_force(server: Server) -> dict[str, object]:
    """What `anser config` shows."""
    rows = server.admin("GET", "/config")["settings"]
    return {row["path"]: (row["value"], row["source"]) for row in rows}


def test_what_can_change_changes(server: Server, file: Path) -> None:
    """Limits of the wire hold for the next request, also on a connection that is open."""
    long = b"GET /health HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 2_000 + b"\r\n\r\n"
    assert talk(server, long).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as kept:
        kept.sendall(long)
        answer = b""
        while not answer.endswith(b"}"):
            answer += kept.recv(1_000)
        assert answer.startswith(b"HTTP/1.1 200")
        said = reread(server, file, "[server]\nhead_bytes_max = 1024\nbody_bytes_max = 1024\n")
        assert "server.head_bytes_max" in said
        kept.sendall(long)
        assert b"HTTP/1.1 431" in kept.recv(10_000)
    assert error_of(talk(server, long))[0] == 431
    body = b'{"model": "' + b"m" * 2_000 + b'"}'
    wide = head(server, f"Content-Length: {len(body)}")
    assert error_of(talk(server, wide + body))[0] == 413
    assert in_force(server)["server.body_bytes_max"] == (1024, str(file))
    reread(server, file, "")
    assert talk(server, long).startswith(b"HTTP/1.1 200")
    assert in_force(server)["server.body_bytes_max"] == (16_777_216, "default")


def test_who_may_ask_changes(server: Server, file: Path) -> None:
    """Anonymous use, pages of other sites, and whose word is taken on who asks."""

    def status(**headers: str) -> int:
        return httpx.get(f"{server.url}/v1/models", headers=headers).status_code

    page = {"origin": "https://chat.example"}
    assert status() == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    reread(
        server,
        file,
        '[members]\nanonymous = "off"\n[server]\ntrusted_proxies = ["127.0.0.1"]\n'
        'cors_origins = ["https://chat.example"]\n',
    )
    assert status() == 401
    assert httpx.get(f"{server.url}/metrics").status_code == 404
    allowed = httpx.get(f"{server.url}/health", headers=page).headers
    assert allowed["access-control-allow-origin"] == "https://chat.example"
    reread(server, file, "")
    assert status() == 200
    assert "access-control-allow-origin" not in httpx.get(server.url, headers=page).headers


async def test_how_requests_are_handled_changes(server: Server, file: Path) -> None:
    """Waits and bounds of the gateway hold for requests that come next; what runs runs on."""
    async with gated(server, slots=1) as gate, crowd(server, 1) as running:
        await running[0].begun()
        text = '[gateway]\nqueue_timeout_s = 0.2\nunknown_fields = "drop"\n'
        await asyncio.to_thread(reread, server, file, text)
        async with Stream.asked(server) as late:
            assert (await late.error())["code"] == "queue_timeout"
        text = "[gateway]\nqueued_max = 1\n"
        await asyncio.to_thread(reread, server, file, text)
        async with crowd(server, 1) as waiting, Stream.asked(server) as refused:
            assert (await refused.error())["code"] == "overloaded"
            gate.opened.set()
            await soon(stream.rest() for stream in [*running, *waiting])
    assert running[0].whole


async def test_what_members_may_have_changes(server: Server, file: Path) -> None:
    """A limit of all members holds for the next request, also of one who has asked before."""
    one = "[members]\nin_flight_max = 1\n"
    async with gated(server, slots=2) as gate, crowd(server, 1) as running:
        await running[0].begun()
        await asyncio.to_thread(reread, server, file, one)
        async with Stream.asked(server) as refused:
            assert (await refused.error())["code"] == "rate_limit_exceeded"
        await asyncio.to_thread(reread, server, file, "")
        gate.opened.set()
        async with Stream.asked(server) as welcome:
            await welcome.rest()
        await running[0].rest()
    assert welcome.whole


async def test_an_engine_is_given_less_time(server: Server, file: Path) -> None:
    """The wait for a next token, and whether another node may go on, are read at each turn."""
    text = "[gateway]\ntoken_gap_timeout_s = 0.3\ncontinue_answers = false\n"
    await asyncio.to_thread(reread, server, file, text)
    async with gated(server, slots=1), Stream.asked(server) as stream:
        for _ in range(2):
            assert "error" not in str(await stream.event())
        assert "token_gap_timeout" in str(await stream.event())


async def test_the_first_token_is_given_less_time(server: Server, file: Path) -> None:
    """So is the wait for a first one."""

    async def mute(talk: Talk) -> None:
        await talk.gone()

    await asyncio.to_thread(reread, server, file, "[gateway]\nfirst_token_timeout_s = 0.3\n")
    async with listed(server, mute), Stream.asked(server) as stream:
        assert (await stream.error())["code"] == "first_token_timeout"


def test_what_cannot_change_is_named(server: Server, file: Path) -> None:
    """It keeps its value, is named in the log at each reading, and holds nothing else up."""
    text = (
        '[server]\nhost = "::1"\ndrain_s = 7\n[engine]\nslots = 9\n'
        "[members]\nanonymous_weight = 3\n"
    )
    reread(server, file, text)
    wait_until(lambda: "settings wait for a restart" in server.log.read_text())
    said = server.log.read_text()
    for path in ("server.host", "engine.slots", "members.anonymous_weight"):
        assert path in said.splitlines()[-1]
    now = in_force(server)
    assert now["server.drain_s"] == (7, str(file))
    assert now["engine.slots"] == (4, "default")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nprot = 1\n", ["server.prot is not a setting", "server.port"]),
        ('[server]\ndrain_s = "long"\n', ["server.drain_s must be a number"]),
        ("[server]\ndrain_s = 3\nhost =\n", ["not valid TOML", "line 3"]),
        (
            '[server]\ndrain_s = 3\ncors_origins = ["x/y"]\n',
            ["server.cors_origins must be origins"],
        ),
        (None, ["cannot be read", "--config"]),
    ],
)
def test_a_mistake_changes_nothing(
    server: Server, file: Path, text: str | None, parts: list[str]
) -> None:
    """File, key or line, and cure are in the log; not even what is right in it is taken up."""
    before = in_force(server)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    said = hang_up(server, "settings stay as they were")
    assert [part for part in [str(file), *parts] if part not in said] == []
    assert in_force(server) == before
    reread(server, file, "[server]\ndrain_s = 3\n")
    assert in_force(server)["server.drain_s"] == (3, str(file))


def shown_by(server: Server) -> int:
    """The serial number of the certificate in a new handshake."""
    pem = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=WAIT_S)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


@pytest.fixture
def secure(tmp_path: Path, file: Path) -> Iterator[tuple[Server, Pair]]:
    """A platform behind TLS, and the pair that it shows."""
    made = pair(tmp_path)
    file.write_text('[server]\ntls_certificate = "public.pem"\ntls_key = "private.pem"\n')
    with serving(tmp_path / "data", "--no-engine", "--config", str(file)) as running:
        yield running, made


async def test_a_renewed_certificate_is_shown(secure: tuple[Server, Pair]) -> None:
    """New handshakes see the new one; a kept connection, with a stream on it, never notices."""
    server, made = secure
    first = made.serial
    headers = {"authorization": f"Bearer {server.key}"}
    async with (
        gated(server, slots=1) as gate,
        httpx.AsyncClient(verify=made.trusting(), timeout=WAIT_S) as client,
        client.stream(
            "POST", f"{server.url}{CHAT}", json={**HELLO, "stream": True}, headers=headers
        ) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines)
        assert await asyncio.to_thread(shown_by, server) == first
        renewed = pair(made.key.parent)
        await asyncio.to_thread(hang_up, server, "settings were read anew")
        assert await asyncio.to_thread(shown_by, server) == renewed.serial != first
        gate.opened.set()
        assert "data: [DONE]" in [line async for line in lines]
        assert (await client.get(f"{server.url}/health")).status_code == 200


def test_a_broken_pair_is_not_shown(secure: tuple[Server, Pair], tmp_path: Path) -> None:
    """A key that does not fit, and a certificate that has expired, leave the old pair in place."""
    server, made = secure
    first = made.serial
    pair(tmp_path / "other")
    good = made.key.read_bytes()
    made.key.write_bytes((tmp_path / "other" / "private.pem").read_bytes())
    assert "is not the key of" in hang_up(server, "settings stay as they were")
    assert shown_by(server) == first
    made.key.write_bytes(good)
    pair(made.key.parent, ends=LONG_AGO + dt.timedelta(days=1))
    assert "expired on 2020-01-02" in hang_up(server, "settings stay as they were")
    assert shown_by(server) == first
    renewed = pair(made.key.parent)
    hang_up(server, "settings were read anew")
    assert shown_by(server) == renewed.serial


def test_tls_is_not_switched_by_a_signal(secure: tuple[Server, Pair], file: Path) -> None:
    """A port that speaks HTTPS goes on doing so; both settings are named as waiting."""
    server, made = secure
    reread(server, file, "")
    wait_until(lambda: "settings wait for a restart" in server.complaints)
    assert "server.tls_key" in server.complaints.splitlines()[-1]
    assert shown_by(server) == made.serial


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_away_ends_it(tmp_path: Path, nohup: bool) -> None:
    """Whoever closes the window that a platform was started in does not leave it behind, unless it
    was told to stay; while the window is there, SIGHUP reads the settings anew.
    """
    master, slave = pty.openpty()
    log = tmp_path / "log"
    command = [sys.executable, "-m", "anser", "serve", "--no-engine", "--no-key", "--port", "0"]
    leader = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    leader += "signal.signal(signal.SIGHUP, signal.SIG_IGN); " if nohup else ""
    command = [sys.executable, "-c", f"{leader}os.execv(sys.argv[1], sys.argv[1:])", *command]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--data-dir", str(tmp_path / "data")],
            stdin=slave,
            stdout=slave,
            stderr=errors,
            start_new_session=True,
        )
    os.close(slave)
    with closing(os.fdopen(master, "rb", buffering=0)) as window:
        seen = b""
        while b"Ctrl-C" not in seen:
            seen += window.read(1_000)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.read_text().count("settings were read anew") == 1)
    if nohup:
        wait_until(lambda: log.read_text().count("settings were read anew") == 2)
        process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    assert "Traceback" not in log.read_text()


async def test_signals_in_any_order_do_no_harm(tmp_path: Path) -> None:
    """SIGHUP in floods under load, and while it drains, changes no answer and no end."""
    with serving(tmp_path / "data", "--no-engine") as server:
        async with gated(server, slots=4) as gate, crowd(server, 4) as streams:
            await soon(stream.begun() for stream in streams)
            for _ in range(200):
                server.process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.001)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.hear, "stopping")
            server.process.send_signal(signal.SIGHUP)
            gate.opened.set()
            await soon(stream.rest() for stream in streams)
            assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0
    assert all(stream.whole for stream in streams)
    assert '"level": "error"' not in server.log.read_text()
