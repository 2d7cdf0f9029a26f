"""Merkle trees against the published vectors of Certificate Transparency."""

from __future__ import annotations

import pytest

from anser.core.tlog import (
    inclusion_holds,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_hash,
)

# The tree that RFC 6962's reference implementation is tested with; RFC 9162 hashes alike.
ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PROOFS = {
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
    (1, 5): (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ),
}
LEAVES = [leaf_hash(entry) for entry in ENTRIES]


@pytest.mark.parametrize("size", range(len(ROOTS)))
def test_root_is_the_published_one(size: int) -> None:
    """The root over the first entries of the reference tree is the published root."""
    assert root_hash(LEAVES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size"), PROOFS)
def test_proof_is_the_published_one(index: int, size: int) -> None:
    """A proof in the reference tree is the published proof, and it holds."""
    proof = inclusion_proof(LEAVES[:size], index)
    assert tuple(sibling.hex() for sibling in proof) == PROOFS[index, size]
    root = bytes.fromhex(ROOTS[size])
    assert inclusion_holds(LEAVES[index], index=index, size=size, proof=proof, root=root)


def test_leaf_is_never_a_node() -> None:
    """Two hashes as an entry do not hash to their node: the two kinds have different prefixes."""
    left, right = LEAVES[:2]
    assert leaf_hash(left + right) != node_hash(left=left, right=right)


@pytest.mark.parametrize(("index", "size"), [(-1, 8), (8, 8), (0, 0), (1, 1)])
def test_index_outside_the_tree_never_holds(index: int, size: int) -> None:
    """No proof holds for an index that the tree does not have."""
    assert not inclusion_holds(LEAVES[0], index=index, size=size, proof=[], root=LEAVES[0])


def test_proof_of_wrong_length_never_holds() -> None:
    """A proof with one sibling too few, too many, or of another length does not hold."""
    proof, root = inclusion_proof(LEAVES, 3), root_hash(LEAVES)
    for wrong in (proof[:-1], [*proof, root], [proof[0][:31], *proof[1:]]):
        assert not inclusion_holds(LEAVES[3], index=3, size=8, proof=wrong, root=root)


def test_proof_needs_an_entry_of_the_tree() -> None:
    """Asking for the proof of an entry that is not there is a bug of the caller."""
    with pytest.raises(AssertionError):
        inclusion_proof(LEAVES, 8)
