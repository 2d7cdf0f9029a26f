"""Merkle proofs and receipt files hold for what was signed, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from anser.adapters.signer import KeyFileSigner
from anser.core import tlog
from anser.core.errors import ReceiptError
from anser.core.ledger import Receipt, receipt_from_json, receipt_json
from anser.ports import StoredReceipt
from anser.services.receipt_file import document_of, leaf_of, verify
from tests.receipts import make_batch, make_receipt, receipts

SIZES = range(1, 71)


def leaves_of(size: int) -> list[bytes]:
    """The leaf hashes of a tree of this size."""
    return [tlog.leaf_hash(bytes([number])) for number in range(size)]


def recursive_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, word for word: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return tlog.node_hash(left=recursive_root(leaves[:split]), right=recursive_root(leaves[split:]))


def recursive_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """RFC 9162, section 2.1.3.1, word for word."""
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if index < split:
        return [*recursive_proof(leaves[:split], index), recursive_root(leaves[split:])]
    return [*recursive_proof(leaves[split:], index - split), recursive_root(leaves[:split])]


@pytest.mark.parametrize("size", SIZES)
def test_tree_is_the_recursive_one(size: int) -> None:
    """Root and every proof are those of the RFC's recursive definition, and the proofs hold."""
    leaves = leaves_of(size)
    root = tlog.root_hash(leaves)
    assert root == recursive_root(leaves)
    for index, leaf in enumerate(leaves):
        proof = tlog.inclusion_proof(leaves, index)
        assert proof == recursive_proof(leaves, index)
        assert tlog.inclusion_holds(leaf, index=index, size=size, proof=proof, root=root)


@pytest.mark.parametrize("size", SIZES)
def test_proof_holds_at_its_own_place_only(size: int) -> None:
    """A proof holds neither for another index, nor for another entry, nor for another root."""
    leaves = leaves_of(size)
    root, other = tlog.root_hash(leaves), tlog.leaf_hash(b"other")
    for index, leaf in enumerate(leaves):
        proof = tlog.inclusion_proof(leaves, index)
        assert not tlog.inclusion_holds(other, index=index, size=size, proof=proof, root=root)
        assert not tlog.inclusion_holds(leaf, index=index, size=size, proof=proof, root=other)
        for place in range(size):
            if place != index:
                assert not tlog.inclusion_holds(
                    leaf, index=place, size=size, proof=proof, root=root
                )


@given(size=st.integers(1, 70), data=st.data())
def test_changed_proof_never_holds(size: int, data: st.DataObject) -> None:
    """A proof with one bit changed does not hold."""
    leaves = leaves_of(size)
    index = data.draw(st.integers(0, size - 1))
    proof = tlog.inclusion_proof(leaves, index)
    if proof:
        at = data.draw(st.integers(0, len(proof) - 1))
        bit = data.draw(st.integers(0, 255))
        proof[at] = (int.from_bytes(proof[at], "big") ^ 1 << bit).to_bytes(32, "big")
        assert not tlog.inclusion_holds(
            leaves[index], index=index, size=size, proof=proof, root=tlog.root_hash(leaves)
        )


@given(receipt=receipts)
def test_receipt_survives_its_json_form(receipt: Receipt) -> None:
    """Every receipt is read back from its JSON form as it was."""
    assert receipt_from_json(receipt_json(receipt)) == receipt


@given(receipt=receipts)
def test_leaf_is_canonical(receipt: Receipt) -> None:
    """The leaf's bytes are those of the reference implementation of RFC 8785."""
    assert leaf_of(receipt) == rfc8785.dumps(receipt_json(receipt))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Receipt, bytes]:
    """A receipt file in canonical form, its receipt, and the key that signed it."""
    signer = KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")
    batch = make_batch([make_receipt(number) for number in range(5)], signer)
    document = rfc8785.dumps(document_of(StoredReceipt(index=3, batch=batch)))
    return document, batch.receipts[3], signer.public_key


def test_every_flipped_bit_is_noticed(file: tuple[bytes, Receipt, bytes]) -> None:
    """No receipt file with any one bit changed verifies."""
    document, receipt, _ = file
    assert verify(document) == receipt
    for position in range(len(document)):
        for bit in range(8):
            changed = bytearray(document)
            changed[position] ^= 1 << bit
            with pytest.raises(ReceiptError):
                verify(bytes(changed))


@settings(max_examples=500)
@given(data=st.data())
def test_every_changed_byte_is_noticed(
    file: tuple[bytes, Receipt, bytes], data: st.DataObject
) -> None:
    """No receipt file verifies with bytes replaced, removed or put in."""
    document, _, _ = file
    start = data.draw(st.integers(0, len(document) - 1))
    end = data.draw(st.integers(start, min(len(document), start + 4)))
    changed = document[:start] + data.draw(st.binary(max_size=4)) + document[end:]
    if changed.strip(b" \t\r\n") != document:
        assert_refused_or_same(changed, file)


def assert_refused_or_same(changed: bytes, file: tuple[bytes, Receipt, bytes]) -> None:
    """White space between values may differ; then the receipt is the very same one."""
    document, receipt, _ = file
    try:
        accepted = verify(changed)
    except ReceiptError:
        return
    assert accepted == receipt
    assert b"".join(changed.split()) == document


@given(junk=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_junk_is_refused(junk: bytes) -> None:
    """Whatever is not a receipt file raises ReceiptError, and nothing else."""
    with pytest.raises(ReceiptError):
        verify(junk)


json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(value=json_values, data=st.data())
def test_wrong_values_are_refused(value: object, data: st.DataObject) -> None:
    """A receipt with any field replaced by another JSON value is refused or is that value."""
    form = receipt_json(make_receipt(1))
    key = data.draw(st.sampled_from(sorted(form)))
    form[key] = value
    try:
        receipt = receipt_from_json(form)
    except ReceiptError:
        return
    assert receipt_json(receipt) == form
