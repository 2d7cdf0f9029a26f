"""Merkle trees as in Certificate Transparency: many entries, one root, short proofs.

Theory of operation. An entry becomes a leaf hash, two hashes become a node hash; the two kinds have
different prefixes, so no node can be passed off as a leaf (RFC 9162, section 2.1.1). The RFC splits
n entries at the largest power of two below n. The same tree is built here from the leaves up: pair
neighbours, and carry an odd last one unchanged to the next level. An inclusion proof is the list of
siblings on the way from a leaf to the root.

Invariant: a proof made for (entry, index, size) checks against the root of those entries, and
against no other entry, index, size or root, as long as SHA-256 has no collisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

__all__ = [
    "HASH_BYTES",
    "inclusion_holds",
    "inclusion_proof",
    "leaf_hash",
    "node_hash",
    "root_hash",
]

HASH_BYTES = 32


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256 of 0x00 and the entry: RFC 9162, section 2.1.1, MTH({d[0]})."""
    return sha256(b"\x00" + entry).digest()


def node_hash(*, left: bytes, right: bytes) -> bytes:
    """SHA-256 of 0x01 and two hashes: RFC 9162, section 2.1.1, MTH(D_n) for n > 1."""
    return sha256(b"\x01" + left + right).digest()


def root_hash(leaves: Sequence[bytes]) -> bytes:
    """The root over these leaf hashes: RFC 9162, section 2.1.1; of none, SHA-256 of nothing.

    >>> root_hash([]).hex()[:16]
    'e3b0c44298fc1c14'
    """
    if not leaves:
        return sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf `index` up to the root: RFC 9162, section 2.1.3.1, PATH(m, D_n)."""
    assert 0 <= index < len(leaves)
    level, proof = list(leaves), list[bytes]()
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):  # else: an odd last one, carried up without a sibling
            proof.append(level[sibling])
        level, index = _parents(level), index >> 1
    return proof


def inclusion_holds(
    leaf: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> bool:
    """Whether the proof leads from leaf hash `leaf` to `root`: RFC 9162, section 2.1.3.2."""
    if not 0 <= index < size:
        return False
    fn, sn, hashed = index, size - 1, leaf  # the RFC's names for the walk's two positions
    for sibling in proof:
        if sn == 0 or len(sibling) != HASH_BYTES:
            return False
        if fn & 1 or fn == sn:
            hashed = node_hash(left=sibling, right=hashed)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            hashed = node_hash(left=hashed, right=sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and hashed == root


def _parents(level: list[bytes]) -> list[bytes]:
    """One level up: each pair's node hash; an odd last one as it is."""
    parents = [
        sha256(b"\x01" + level[at] + level[at + 1]).digest() for at in range(0, len(level) - 1, 2)
    ]
    if len(level) & 1:
        parents.append(level[-1])
    return parents
