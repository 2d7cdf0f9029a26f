"""TLS to an engine: verified by default, or pinned to one certificate; never neither."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from anser.adapters.engine_http import HttpEngine
from anser.core.errors import EngineUnreachable
from anser.core.fleet import Node
from tests.hostile import Hostile, Talk, stream
from tests.hostile_engine import KEY, chunks_of, text_of

pytestmark = pytest.mark.anyio

_LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_FAR_OFF = dt.datetime(2090, 1, 1, tzinfo=dt.UTC)


def certificate(folder: Path, *, host: str = "127.0.0.1", until: dt.datetime = _FAR_OFF) -> Path:
    """A self-signed certificate and its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "engine")])
    san = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(_LONG_AGO)
        .not_valid_after(until)
        .add_extension(san, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "engine.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def fingerprint(file: Path) -> str:
    """Its SHA-256 as openssl prints it."""
    der = x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(serialization.Encoding.DER)
    return sha256(der).digest().hex(":").upper()


@asynccontextmanager
async def serving(file: Path) -> AsyncGenerator[Hostile]:
    """A sound engine behind this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)

    async def sound(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.say(stream("a"))

    async with Hostile(sound, tls=context) as hostile:
        yield hostile


async def refused(url: str) -> str:
    """Why this engine is not spoken to."""
    engine = HttpEngine(Node(id="n", url=url), KEY)
    with pytest.raises(EngineUnreachable) as caught:
        await chunks_of(engine)
    await engine.aclose()
    return caught.value.message


async def test_a_self_signed_certificate_is_refused(tmp_path: Path) -> None:
    """Nothing is sent, and the message names the way to trust it."""
    async with serving(certificate(tmp_path)) as hostile:
        message = await refused(hostile.url)
        assert "not trusted" in message
        assert "#sha256=" in message
        assert "SSL_CERT_FILE" in message
        assert hostile.seen == []


async def test_a_named_authority_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE is honoured; an expired certificate and another name are refused still."""
    file = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with serving(file) as hostile:
        engine = HttpEngine(Node(id="n", url=hostile.url))
        assert text_of(await chunks_of(engine)) == "a"
        assert text_of(await chunks_of(engine)) == "a"
        assert hostile.connections == 1
        await engine.aclose()
    expired = certificate(tmp_path, until=_LONG_AGO + dt.timedelta(days=1))
    async with serving(expired) as hostile:
        assert "expired" in await refused(hostile.url)
    other = certificate(tmp_path, host="10.0.0.1")
    async with serving(other) as hostile:
        assert "mismatch" in (await refused(hostile.url)).lower()
        assert hostile.seen == []


async def test_a_pinned_certificate_is_trusted_and_no_other(tmp_path: Path) -> None:
    """With a pin, that certificate alone is trusted, and checked before a byte is sent."""
    file = certificate(tmp_path, host="10.0.0.1")
    async with serving(file) as hostile:
        engine = HttpEngine(Node(id="n", url=f"{hostile.url}/v1#sha256={fingerprint(file)}"))
        assert text_of(await chunks_of(engine)) == "a"
        await engine.aclose()
        wrong = fingerprint(certificate(tmp_path))
        seen = len(hostile.seen)
        assert "is not the one that its URL pins" in await refused(f"{hostile.url}#sha256={wrong}")
        assert len(hostile.seen) == seen


async def test_what_does_not_speak_tls(tmp_path: Path) -> None:
    """Plain HTTP behind https, and TLS behind http, are unreachable, with a word why."""

    async def plain(talk: Talk) -> None:
        await talk.say(b"HTTP/1.1 400 Bad\r\n\r\n")

    async with Hostile(plain) as hostile:
        assert "does not speak TLS" in await refused(hostile.url.replace("http:", "https:"))
    async with serving(certificate(tmp_path)) as hostile:
        assert await refused(hostile.url.replace("https:", "http:"))


async def test_an_engine_that_speaks_with_the_end_of_the_handshake(tmp_path: Path) -> None:
    """What is handed over before anything was asked is no answer: the connection is not used."""
    file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the server has the last word
    context.load_cert_chain(file)

    async def eager(talk: Talk) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        shaken = False
        while not shaken:
            try:
                tls.do_handshake()
                shaken = True
            except ssl.SSLWantReadError:
                await talk.say(outgoing.read())
                incoming.write(await talk.reader.read(65_536))
        tls.write(stream("forged"))
        await talk.say(outgoing.read())
        await talk.gone()

    async with Hostile(eager) as hostile:
        url = hostile.url.replace("http:", "https:")
        assert "spoke before" in await refused(f"{url}#sha256={fingerprint(file)}")
