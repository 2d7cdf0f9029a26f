"""The contract of a Signer, and what its key file must be."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from anser.adapters.signer import KeyFileSigner
from anser.core.errors import ConfigError
from anser.ports import Signer

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNED = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the key is."""
    return tmp_path / "signing.key"


def write_pem(
    path: Path, key: object, encryption: KeySerializationEncryption | None = None
) -> None:
    """Write a private key of any kind as a PEM file of mode 600."""
    pem = key.private_bytes(  # type: ignore[attr-defined]
        Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()
    )
    path.write_bytes(pem)
    path.chmod(0o600)


def test_signature_checks_with_the_public_key(path: Path) -> None:
    """What was signed checks with the 32 bytes of the public key, and nothing else does."""
    signer: Signer = KeyFileSigner.open(path)
    signature = signer.sign(b"message")
    assert (len(signer.public_key), len(signature)) == (32, 64)
    key = Ed25519PublicKey.from_public_bytes(signer.public_key)
    key.verify(signature, b"message")
    with pytest.raises(InvalidSignature):
        key.verify(signature, b"messagE")


def test_signature_is_the_published_one(path: Path) -> None:
    """Signing is Ed25519 as in RFC 8032: its own key and message give its own signature."""
    write_pem(path, Ed25519PrivateKey.from_private_bytes(SECRET))
    signer = KeyFileSigner.open(path)
    assert signer.public_key.hex() == PUBLIC
    assert signer.sign(b"\x72").hex() == SIGNED


def test_key_is_made_once_and_kept(path: Path) -> None:
    """The first use makes the key; later uses find the same one; only its owner can read it."""
    first = KeyFileSigner.open(path)
    assert KeyFileSigner.open(path).public_key == first.public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_that_start_at_once_agree(path: Path) -> None:
    """Of many first uses at the same moment one makes the key, and all use it."""
    start, keys = threading.Barrier(8), list[bytes]()

    def use() -> None:
        start.wait(timeout=10)
        keys.append(KeyFileSigner.open(path).public_key)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
def test_key_that_others_can_reach_is_refused(path: Path, mode: int) -> None:
    """A private key that anybody else can read or change stops the start, with the cure."""
    KeyFileSigner.open(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        KeyFileSigner.open(path)


def test_what_is_no_key_is_refused(path: Path) -> None:
    """A file that is not an Ed25519 private key in PEM stops the start and is left alone."""
    path.write_bytes(b"not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not an Ed25519 private key"):
        KeyFileSigner.open(path)
    assert path.read_bytes() == b"not a key"
    write_pem(path, generate_private_key(SECP256R1()))
    with pytest.raises(ConfigError, match="not an Ed25519 private key"):
        KeyFileSigner.open(path)
    write_pem(path, Ed25519PrivateKey.generate(), BestAvailableEncryption(b"password"))
    with pytest.raises(ConfigError, match="not an Ed25519 private key"):
        KeyFileSigner.open(path)


def test_key_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    """Where no file can be made the error names it and says why."""
    with pytest.raises(ConfigError, match=r"missing/signing\.key cannot be written: No such file"):
        KeyFileSigner.open(tmp_path / "missing" / "signing.key")


def test_key_that_cannot_be_read_is_reported(path: Path) -> None:
    """A key file that is there but cannot be read is not replaced."""
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFileSigner.open(path)


def test_the_key_is_not_shown(path: Path) -> None:
    """What is printed of a signer is the beginning of its public key."""
    write_pem(path, Ed25519PrivateKey.from_private_bytes(SECRET))
    assert repr(KeyFileSigner.open(path)) == f"<KeyFileSigner {PUBLIC[:16]}>"
