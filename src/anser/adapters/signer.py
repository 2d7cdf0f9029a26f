"""The platform's signing key: an Ed25519 private key in a file of the data folder.

The file is made at first use: written whole under another name, then linked to its own, so that it
is either absent or complete, and of two processes that start at once one wins.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from anser.adapters.datadir import make_secret, read_secret
from anser.core.errors import ConfigError

__all__ = ["KeyFileSigner"]


class KeyFileSigner:
    """Signs with the key in a file; the key never leaves this object."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def __repr__(self) -> str:
        return f"<KeyFileSigner {self._public_key.hex()[:16]}>"

    @classmethod
    def open(cls, path: Path) -> KeyFileSigner:
        """Read the key, or make it first. Raises ConfigError with the cure."""
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            make_secret(
                path,
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            )
        try:
            loaded = load_pem_private_key(read_secret(path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            loaded = None
        if not isinstance(loaded, Ed25519PrivateKey):
            raise ConfigError(
                f"{path} is not an Ed25519 private key in PEM. Put the right file there, or move"
                " it away and a new key is made; receipts of the old key still verify with it."
            )
        return cls(loaded)

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self._public_key

    def sign(self, message: bytes) -> bytes:
        """64 bytes over `message`."""
        return self._key.sign(message)
