"""What is shown in handshakes: dates, names, and keys that are too weak."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from anser.core.errors import ConfigError
from anser.wire.tls import Identity, identity
from tests.certificates import FAR_OFF, LONG_AGO, Pair, pair

DAY_S = 86_400.0


def shown(made: Pair) -> Identity:
    """The pair as it is shown."""
    return identity(made.certificate, made.key)


def test_dates_are_told(tmp_path: Path) -> None:
    """Before its first day, after its last, and as long before that as one asks."""
    begins, ends = dt.datetime(2030, 1, 2, tzinfo=dt.UTC), dt.datetime(2030, 1, 9, tzinfo=dt.UTC)
    found, first = shown(pair(tmp_path, begins=begins, ends=ends)), begins.timestamp()
    assert found.trouble(first - 1) == (
        "server.tls_certificate is not valid before 2030-01-02 00:00 UTC."
    )
    assert found.trouble(first + 1) is None
    assert found.trouble(first + 1, soon_s=6 * DAY_S) is None
    soon = found.trouble(first + 1, soon_s=7 * DAY_S)
    assert soon == "server.tls_certificate expires on 2030-01-09 00:00 UTC. Renew it."
    over = found.trouble(first + 7 * DAY_S + 1)
    assert over == "server.tls_certificate expired on 2030-01-09 00:00 UTC. Renew it."


def test_a_name_that_clients_will_find(tmp_path: Path) -> None:
    """What is shown stays if the certificate is for it; else its first name that is no pattern."""
    found = shown(pair(tmp_path, "*.anser.example", "anser.example"))
    assert found.names == ("*.anser.example", "anser.example", "127.0.0.1")
    assert found.host("127.0.0.1") == "127.0.0.1"
    assert found.host("10.0.0.1") == "anser.example"
    assert found == shown(Pair(tmp_path / "public.pem", tmp_path / "private.pem"))


def old(folder: Path, bits: int) -> Pair:
    """A pair as it was made long ago: RSA, and no names but the common one."""
    key = rsa.generate_private_key(65_537, bits)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old.example")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, LONG_AGO, FAR_OFF)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    form, cipher = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    found = Pair(folder / "old.pem", folder / "old.key")
    found.certificate.write_bytes(made)
    found.key.touch(mode=0o600)
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, cipher))
    return found


def test_old_pairs(tmp_path: Path) -> None:
    """One without names is shown under the address; one that is too weak is refused by name."""
    found = shown(old(tmp_path, 2_048))
    assert (found.names, found.host("10.0.0.1")) == ((), "10.0.0.1")
    with pytest.raises(ConfigError, match=r"old\.pem is too weak for today's clients"):
        shown(old(tmp_path, 1_024))
