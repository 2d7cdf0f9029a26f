"""Certificates for tests: self-signed, for this machine, with their keys in files of their own."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["FAR_OFF", "LONG_AGO", "Pair", "pair"]

LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
FAR_OFF = dt.datetime(2090, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two PEM files that belong together."""

    certificate: Path
    key: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a platform show it."""
        return {
            "ANSER_SERVER_TLS_CERTIFICATE": str(self.certificate),
            "ANSER_SERVER_TLS_KEY": str(self.key),
        }

    @property
    def serial(self) -> int:
        """By which it is told from others."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes()).serial_number

    def trusting(self) -> ssl.SSLContext:
        """What a client has that trusts it, and nobody else."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def showing(self) -> ssl.SSLContext:
        """What a server has that shows it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def pair(
    folder: Path,
    *names: str,
    begins: dt.datetime = LONG_AGO,
    ends: dt.datetime = FAR_OFF,
    passphrase: bytes | None = None,
) -> Pair:
    """Make a pair for 127.0.0.1 and these host names; one that is there is replaced."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "platform")])
    hosts = [x509.DNSName(each) for each in names]
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([*hosts, address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    found = Pair(folder / "public.pem", folder / "private.pem")
    cipher: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        cipher = serialization.BestAvailableEncryption(passphrase)
    form = serialization.PrivateFormat.PKCS8
    folder.mkdir(parents=True, exist_ok=True)
    found.key.touch(mode=0o600)
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, cipher))
    found.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return found
