"""Checking a receipt file offline names the first thing that fails."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.signer import KeyFileSigner
from anser.core import limits
from anser.core.errors import ReceiptError
from anser.ports import StoredReceipt
from anser.services.receipt_file import document_of, verify
from tests.receipts import make_batch, make_receipt


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> KeyFileSigner:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")


@pytest.fixture
def document(signer: KeyFileSigner) -> dict[str, Any]:
    """The file of the third of five receipts."""
    batch = make_batch([make_receipt(number) for number in range(5)], signer)
    return document_of(StoredReceipt(index=2, batch=batch))


def test_layout_does_not_matter(document: dict[str, Any], signer: KeyFileSigner) -> None:
    """A file that was printed prettily or had its fields reordered still verifies."""
    pretty = json.dumps(document, indent=2, sort_keys=True).encode()
    assert verify(pretty, public_key=signer.public_key) == make_receipt(2)


def test_another_key_does_not_verify(document: dict[str, Any], tmp_path: Path) -> None:
    """Who knows the platform's key is not taken in by a file that another key signed."""
    other = KeyFileSigner.open(tmp_path / "other.key")
    with pytest.raises(ReceiptError, match="signed with another key"):
        verify(json.dumps(document).encode(), public_key=other.public_key)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change: sets the field at this path to the last argument."""
    *way, last, value = path

    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in way:
            place = place[step]
        place[last] = value

    return change


def _upper_root(document: dict[str, Any]) -> None:
    document["batch"]["root"] = document["batch"]["root"].upper()


def _swap_key(document: dict[str, Any]) -> None:
    document["batch"]["public_key"] = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 2), "file.version is not 1"),
        (_set("version", 1.0), "file.version is not a whole number"),
        (_set("extra", 1), "file has a field that does not belong"),
        (_set("receipt", "model", "another"), "not in its batch"),
        (_set("receipt", "model", "\ud800"), "not Unicode"),
        (_set("receipt", "usage", "completion_tokens", 51), "not in its batch"),
        (_set("batch", None), "batch is not an object"),
        (_set("batch", "proof", {}), "batch.proof is not a list"),
        (_set("batch", "proof", 0, "00"), "batch.proof[0] is not a SHA-256"),
        (_set("batch", "proof", 0, 7), "batch.proof[0] is not a SHA-256"),
        (_set("batch", "proof", []), "not in its batch"),
        (_set("batch", "index", 3), "not in its batch"),
        (_set("batch", "size", 2), "not in its batch"),
        (_set("batch", "root", "00" * 32), "not in its batch"),
        (_upper_root, "batch.root is not a SHA-256"),
        (_set("batch", "root", "zz"), "batch.root is not a SHA-256"),
        (_set("batch", "signed_ms", 1), "signature of the batch does not hold"),
        (_set("batch", "public_key", "!"), "batch.public_key is not 32 bytes"),
        (_set("batch", "public_key", "AAAA"), "batch.public_key is not 32 bytes"),
        (_swap_key, "signature of the batch does not hold"),
        (_set("batch", "signature", 5), "batch.signature is not text"),
    ],
)
def test_first_failure_is_named(
    document: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """The error says which part of the file does not hold."""
    change(document)
    with pytest.raises(ReceiptError) as raised:
        verify(json.dumps(document).encode())
    assert message in raised.value.message


def test_size_is_covered_by_the_signature(document: dict[str, Any]) -> None:
    """A batch cannot be passed off as larger: a size that fits the proof fails the signature."""
    document["batch"]["size"] = 6
    with pytest.raises(ReceiptError, match="signature"):
        verify(json.dumps(document).encode())


@pytest.mark.parametrize(
    "junk",
    [b"", b"\xff", b"{", b"[" * 100_000, b'{"a":' * 20_000, b"9" * 100_000, b"NaN"],
)
def test_what_is_not_json_is_refused(junk: bytes) -> None:
    """Bytes that are no JSON, or JSON nested or numbered beyond reason, raise ReceiptError."""
    with pytest.raises(ReceiptError):
        verify(junk)


def test_a_field_given_twice_is_refused(document: dict[str, Any]) -> None:
    """Two readers could see two values of a field given twice, so there is no such file."""
    text = json.dumps(document).replace('"version": 1', '"version": 1, "version": 1')
    with pytest.raises(ReceiptError, match="same field twice"):
        verify(text.encode())


@pytest.mark.parametrize("excess", [0, 1])
def test_file_has_its_limit(document: dict[str, Any], excess: int) -> None:
    """A file as long as the limit is read, one byte more is refused."""
    text = json.dumps(document).encode()
    text += b" " * (limits.RECEIPT_BYTES_MAX + excess - len(text))
    if excess:
        with pytest.raises(ReceiptError, match="longer than"):
            verify(text)
    else:
        assert verify(text) == make_receipt(2)
