"""The certificate of the public listener and its key: read, checked, and made ready for handshakes.

Nothing but the standard library shakes hands. TLS 1.2 and 1.3 are spoken, with Python's choice of
ciphers, and HTTP/1.1 above them (ALPN, RFC 7301). A pair is checked whole before it is used: both
files are there, the key is kept from others, belongs to the certificate, and has no passphrase,
which nobody could type. A certificate that has ended is told, not refused: clients decide.
"""

from __future__ import annotations

import os
import ssl
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

from cryptography import x509

from anser.core.errors import ConfigError

__all__ = ["Identity", "identity"]

_CERTIFICATE, _KEY = "server.tls_certificate", "server.tls_key"
_FILE_BYTES_MAX = 1024 * 1024
_OTHERS = 0o027  # all rights of others, and writing of the group's: many keep keys in a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What this platform shows in a handshake. Times are UTC."""

    context: ssl.SSLContext = field(compare=False)
    serial: int  # of the certificate
    names: tuple[str, ...]  # that the certificate is for: hosts and addresses
    begins: datetime
    ends: datetime

    def trouble(self, now_s: float, *, soon_s: float = 0.0) -> str | None:
        """Why, by its dates, it is not trusted at `now_s` (Unix seconds), or `soon_s` later."""
        now = datetime.fromtimestamp(now_s, UTC)
        if now < self.begins:
            return f"{_CERTIFICATE} is not valid before {self.begins:%Y-%m-%d %H:%M} UTC."
        if now + timedelta(seconds=soon_s) > self.ends:
            ends = "expired" if now > self.ends else "expires"
            return f"{_CERTIFICATE} {ends} on {self.ends:%Y-%m-%d %H:%M} UTC. Renew it."
        return None

    def host(self, shown: str) -> str:
        """`shown` if the certificate is for it, else a name that it is for, if there is one."""
        fit = (name for name in self.names if "*" not in name)
        return shown if shown in self.names else next(fit, shown)


def identity(certificate: Path, key: Path) -> Identity:
    """Read a pair of PEM files, the certificate with its chain. Raises ConfigError."""
    leaf = _leaf(certificate, _read(certificate, _CERTIFICATE))
    _read(key, _KEY)
    _check_kept(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_refuse_passphrase)
    except ssl.SSLError as error:
        raise _misfit(error, certificate, key) from error
    return Identity(
        context=context,
        serial=leaf.serial_number,
        names=_names(leaf),
        begins=leaf.not_valid_before_utc,
        ends=leaf.not_valid_after_utc,
    )


def _read(file: Path, setting: str) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:  # no path has a zero byte
        why = error.strerror if isinstance(error, OSError) else "that is no path"
        message = f"{setting}: {file} cannot be read: {why}. Correct the path, or its rights."
        raise ConfigError(message, param=setting) from error
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(f"{setting}: {file} is too long for a PEM file.", param=setting)
    return content


def _check_kept(key: Path) -> None:
    mode = stat.S_IMODE(os.stat(key).st_mode)
    if mode & _OTHERS:
        message = (
            f"{_KEY}: {key} is a secret that others can read (mode {mode:03o}): chmod 600 {key}"
        )
        raise ConfigError(message, param=_KEY)


def _leaf(file: Path, content: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(content)[0]
    except ValueError as error:
        why = f"{file} has no certificate in PEM (BEGIN CERTIFICATE), or a broken one."
        message = f"{_CERTIFICATE}: {why} Name the file with the certificate and its chain."
        raise ConfigError(message, param=_CERTIFICATE) from error


def _refuse_passphrase() -> NoReturn:
    message = f"{_KEY}: the key has a passphrase, and nobody types it here. Store it without one."
    raise ConfigError(message, param=_KEY)


def _misfit(error: ssl.SSLError, certificate: Path, key: Path) -> ConfigError:
    reason = str(error.reason)  # None for what is not PEM at all
    if reason == "KEY_VALUES_MISMATCH":
        why = f"{key} is not the key of {certificate}. Name the two that belong together."
        return ConfigError(f"{_KEY}: {why}", param=_KEY)
    if reason.endswith(("_KEY_TOO_SMALL", "_MD_TOO_WEAK")):
        why = f"{certificate} is too weak for today's clients ({reason}). Make a new one."
        return ConfigError(f"{_CERTIFICATE}: {why}", param=_CERTIFICATE)
    why = f"{key} has no private key in PEM (BEGIN PRIVATE KEY), or the chain is broken ({reason})."
    return ConfigError(f"{_KEY}: {why}", param=_KEY)


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    hosts = found.get_values_for_type(x509.DNSName)
    return (*hosts, *map(str, found.get_values_for_type(x509.IPAddress)))
