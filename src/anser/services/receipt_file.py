"""The receipt file: one receipt with all that is needed to check it offline.

A file is a JSON object: `version`, the `receipt`, and its `batch` (size, root, index and proof in
the Merkle tree; time, public key and signature). Checking goes from the inside out: the receipt's
canonical bytes (RFC 8785) are hashed, the proof leads from that hash to the root (RFC 9162), the
signature (Ed25519, RFC 8032) covers root, size and time. Every value has exactly one accepted form,
so that in a file without white space no byte can change unnoticed.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, cast

import msgspec
import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from anser.core import limits, tlog
from anser.core.errors import ReceiptError
from anser.core.ledger import (
    Receipt,
    batch_message,
    read_integer,
    read_object,
    read_text,
    receipt_from_json,
    receipt_json,
)
from anser.ports import StoredReceipt

__all__ = ["canonical", "document_of", "leaf_of", "verify"]

_VERSION = 1
_FILE_KEYS = frozenset({"version", "receipt", "batch"})
_BATCH_KEYS = frozenset(
    {"size", "root", "index", "proof", "signed_ms", "public_key", "signature"},
)
_fast_canonical = msgspec.json.Encoder(order="sorted").encode


def leaf_of(receipt: Receipt) -> bytes:
    """The receipt's canonical JSON (RFC 8785): the bytes that are hashed into the batch.

    The fast encoder writes the canonical form because all keys are ASCII and all numbers whole; the
    property tests hold it against the reference implementation, which `verify` uses.
    """
    try:
        return _fast_canonical(receipt_json(receipt))
    except UnicodeEncodeError:
        raise ReceiptError("The receipt holds text that is not Unicode.") from None


def canonical(value: Any) -> bytes:
    """The canonical bytes by the reference implementation of RFC 8785."""
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError:
        raise ReceiptError("The receipt holds text that is not Unicode.") from None


def document_of(stored: StoredReceipt) -> dict[str, Any]:
    """The receipt file of a stored receipt, as JSON values: hashes in hex, the rest in base64."""
    batch, index = stored.batch, stored.index
    proof = tlog.inclusion_proof([tlog.leaf_hash(leaf) for leaf in batch.leaves], index)
    return {
        "version": _VERSION,
        "receipt": receipt_json(batch.receipts[index]),
        "batch": {
            "size": len(batch.leaves),
            "root": batch.root.hex(),
            "index": index,
            "proof": [sibling.hex() for sibling in proof],
            "signed_ms": batch.signed_ms,
            "public_key": base64.b64encode(batch.public_key).decode(),
            "signature": base64.b64encode(batch.signature).decode(),
        },
    }


def verify(document: bytes, *, public_key: bytes | None = None) -> Receipt:
    """Check a receipt file offline and return its receipt; ReceiptError names what fails first.

    Without `public_key` the file is checked against the key that it names itself: that shows that
    nothing was changed, not who signed it.
    """
    fields = read_object(_parse(document), keys=_FILE_KEYS, where="file")
    if read_integer(fields, key="version", where="file") != _VERSION:
        raise ReceiptError("file.version is not 1: a newer Anser may be able to check it.")
    receipt = receipt_from_json(fields["receipt"])
    batch = read_object(fields["batch"], keys=_BATCH_KEYS, where="batch")
    root = _check_inclusion(receipt, batch)
    _check_signature(batch, root=root, public_key=public_key)
    return receipt


def _parse(document: bytes) -> object:
    if len(document) > limits.RECEIPT_BYTES_MAX:
        raise ReceiptError(f"The file is longer than {limits.RECEIPT_BYTES_MAX} bytes.")
    try:
        return json.loads(document.decode(), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError):
        raise ReceiptError("The file is not JSON.") from None


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ReceiptError("The file has the same field twice.")
    return fields


def _check_inclusion(receipt: Receipt, batch: dict[str, object]) -> bytes:
    """Return the batch's root if the receipt's proof leads to it."""
    proof = batch["proof"]
    if not isinstance(proof, list):
        raise ReceiptError("batch.proof is not a list.")
    root = _read_hash(batch["root"], where="batch.root")
    hashes = [
        _read_hash(item, where=f"batch.proof[{at}]")
        for at, item in enumerate(cast("list[object]", proof))
    ]
    leaf = canonical(receipt_json(receipt))
    index = read_integer(batch, key="index", where="batch")
    size = read_integer(batch, key="size", where="batch")
    if not tlog.inclusion_holds(
        tlog.leaf_hash(leaf), index=index, size=size, proof=hashes, root=root
    ):
        raise ReceiptError("The receipt is not in its batch: it or its proof was changed.")
    return root


def _check_signature(batch: dict[str, object], *, root: bytes, public_key: bytes | None) -> None:
    named = _read_base64(batch, key="public_key", size=32)
    if public_key is not None and named != public_key:
        raise ReceiptError("The batch was signed with another key.")
    message = batch_message(
        root=root,
        size=read_integer(batch, key="size", where="batch"),
        signed_ms=read_integer(batch, key="signed_ms", where="batch"),
    )
    signature = _read_base64(batch, key="signature", size=64)
    try:
        Ed25519PublicKey.from_public_bytes(named).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise ReceiptError("The signature of the batch does not hold.") from None


def _read_hash(text: object, *, where: str) -> bytes:
    try:
        value = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        value = b""
    if len(value) != tlog.HASH_BYTES or value.hex() != text:  # one hash has one form
        raise ReceiptError(f"{where} is not a SHA-256 in lower-case hex.")
    return value


def _read_base64(fields: dict[str, object], *, key: str, size: int) -> bytes:
    text = read_text(fields, key=key, where="batch")
    try:
        value = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        value = b""
    if len(value) != size or base64.b64encode(value).decode() != text:
        raise ReceiptError(f"batch.{key} is not {size} bytes in base64.")
    return value
