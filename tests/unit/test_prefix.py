"""The prefix index: who was sent the beginning of a prompt, as far as it can still have it."""

from __future__ import annotations

import pytest

from anser.core.prefix import BLOCK_BYTES, CHAIN_BLOCKS_MAX, Chain, Match, PrefixIndex, chain


def text(*letters: str) -> bytes:
    """A block of each letter."""
    return b"".join(letter.encode() * BLOCK_BYTES for letter in letters)


def blocks(*letters: str) -> Chain:
    """The chain of a text of so many blocks."""
    return chain(text(*letters))


# Chains


def test_a_block_is_named_by_all_up_to_its_end() -> None:
    """Two texts share names exactly as far as they share a beginning."""
    first, second = blocks("a", "b", "c"), blocks("a", "b", "d")
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert blocks("x", "b")[1] != first[1]


def test_an_incomplete_block_has_no_name() -> None:
    """Only whole blocks are cached by engines, so only those are named."""
    assert chain(b"x" * (BLOCK_BYTES - 1)) == ()
    assert len(chain(b"x" * (2 * BLOCK_BYTES + 1))) == 2


def test_a_salt_keeps_members_apart() -> None:
    """The same text under another salt shares nothing."""
    assert not set(chain(text("a", "b"), salt=b"1")) & set(chain(text("a", "b"), salt=b"2"))


def test_a_chain_is_limited() -> None:
    """A text of any length costs a bounded number of names."""
    assert len(chain(b"x" * (CHAIN_BLOCKS_MAX + 5) * BLOCK_BYTES)) == CHAIN_BLOCKS_MAX


# Matching


def test_the_longest_beginning_wins() -> None:
    """A match names the nodes that have the most blocks, and how many these are."""
    index = PrefixIndex()
    index.add("n1", blocks("a", "b", "c"))
    index.add("n2", blocks("a", "b", "d"))
    index.add("n3", blocks("a"))
    assert index.match(blocks("a", "b", "c", "e")) == Match(3, index.bit("n1"))
    assert index.match(blocks("a", "b")) == Match(2, index.bit("n1") | index.bit("n2"))
    assert index.match(blocks("z", "b")) == Match(0, 0)
    assert index.match(()) == Match(0, 0)
    index.validate()


def test_how_much_one_node_knows() -> None:
    """Of one node, the number of blocks that it knows, whoever knows more."""
    index = PrefixIndex()
    index.add("n1", blocks(*"abcdefg"))
    index.add("n2", blocks(*"abc"))
    for length in range(8):
        assert index.known("n1", blocks(*"abcdefg"[:length])) == length
    assert index.known("n2", blocks(*"abcdefg")) == 3
    assert index.known("n2", blocks("z")) == 0
    assert index.known("never seen", blocks("a")) == 0


# Forgetting


def test_the_longest_unused_end_is_forgotten_first() -> None:
    """A full cache loses the deepest block of what was not used for longest."""
    index = PrefixIndex()
    index.resize("n", 64)
    for letter in "abcdefgh":
        index.add("n", blocks(*[letter] * 8))
    index.add("n", blocks(*"a" * 8))
    index.add("n", blocks("z"))
    assert index.known("n", blocks(*"a" * 8)) == 8
    assert index.known("n", blocks(*"b" * 8)) == 7
    assert index.known("n", blocks("z")) == 1
    index.validate()


def test_a_prompt_longer_than_the_cache() -> None:
    """Of a prompt that no cache can hold, its beginning is kept."""
    index = PrefixIndex()
    index.resize("n", 64)
    index.add("n", blocks(*"abcdefgh" * 10))
    assert index.known("n", blocks(*"abcdefgh" * 10)) == 64
    index.validate()


def test_a_node_that_goes_takes_its_blocks_along() -> None:
    """Blocks that nobody has left cost nothing, and a new node may take the place of the old."""
    index = PrefixIndex()
    index.add("n1", blocks("a", "b"))
    index.add("n2", blocks("a"))
    index.drop("n1")
    index.drop("never seen")
    assert len(index) == 1
    assert index.match(blocks("a", "b")) == Match(1, index.bit("n2"))
    assert index.bit("n3") not in (0, index.bit("n2"))
    assert index.match(blocks("a", "b")).nodes & index.bit("n3") == 0
    index.validate()


# How much a node keeps


def test_an_engine_has_no_more_than_it_says() -> None:
    """A smaller size forgets at once; what is learnt stays below, and outlives a repetition."""
    index = PrefixIndex()
    index.add("n", blocks(*"ab" * 80))
    index.resize("n", 150)
    assert (len(index), index.capacity("n")) == (150, 150)
    index.learn("n", predicted=100, found=100)
    assert index.capacity("n") == 150
    index.learn("n", predicted=100, found=0)
    index.resize("n", 150)
    assert index.capacity("n") == 120
    index.validate()


def test_an_engine_that_keeps_nothing() -> None:
    """Nothing is expected in a cache that is switched off."""
    index = PrefixIndex()
    index.resize("n", 0)
    index.add("n", blocks("a", "b"))
    assert index.known("n", blocks("a", "b")) == len(index) == 0
    index.learn("n", predicted=100, found=0)
    assert index.capacity("n") == 0
    index.validate()


def test_an_engine_that_has_forgotten_gets_less() -> None:
    """Found less than half of what was predicted: a fifth less is expected from now on."""
    index = PrefixIndex()
    index.add("n", blocks(*"ab" * 100))
    index.learn("n", predicted=100, found=49)
    assert index.capacity("n") == 160
    assert len(index) == 160
    index.learn("n", predicted=100, found=50)
    assert index.capacity("n") == 160
    index.validate()


def test_an_engine_that_keeps_all_may_have_more() -> None:
    """Found as predicted while its allotment was full: a little more is expected of it."""
    index = PrefixIndex()
    index.add("n", blocks(*"ab" * 100))
    index.learn("n", predicted=100, found=100)
    before = index.capacity("n")
    index.learn("n", predicted=100, found=0)
    index.learn("n", predicted=100, found=100)
    assert index.capacity("n") == 160 + 64 < before


@pytest.mark.parametrize("node", ["n", "never seen"])
def test_nothing_predicted_teaches_nothing(node: str) -> None:
    """Neither a node that was never sent anything nor a prompt that nobody had says how much."""
    index = PrefixIndex()
    index.add("n", blocks("a"))
    before = index.capacity("n")
    index.learn(node, predicted=100 if node != "n" else 0, found=0)
    assert index.capacity("n") == before


def test_repr_tells_the_state() -> None:
    """In a line."""
    index = PrefixIndex()
    index.add("n", blocks("a", "b"))
    assert repr(index) == "<PrefixIndex 2 blocks on 1 nodes>"
