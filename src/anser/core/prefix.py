"""Which node has the beginning of a prompt in its cache: a guess that costs no tokenizer.

Theory of operation
-------------------
A prompt's canonical text is cut into blocks of 256 bytes; each block is named by the hash of all
text up to its end (`chain`), so two prompts share a name exactly as far as they share a beginning.
An incomplete last block has no name. A salt that goes before the text keeps members apart who
must not learn of each other's prompts.

For each block the index keeps one integer with a bit for every node that was sent it. A walk along
a chain, `and`ing these, finds all nodes with the longest beginning at once (`match`). For each node
the blocks are also in the order of their last use, the deeper first, so that what is forgotten when
the node's cache is full is always the end of a beginning, as engines do it: a node that knows a
block knows those before it, and how much one node knows is found by bisection (`known`).

How much an engine can keep is learnt (`learn`) by additive increase and multiplicative decrease: an
engine that found less than predicted has forgotten it, so its allotment shrinks; one that found
what was predicted while its allotment was full may have more. One that says how much it keeps
(`resize`) starts with that, and never has more.

Sources: block hashes as in vLLM's automatic prefix caching; the bitmask walk and the AIMD rule are
our own.

Invariants: bit n of a block is set if and only if the block is in node n's order; no order is
longer than its node's capacity; no block is kept without a bit.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_TOKENS",
    "CHAIN_BLOCKS_MAX",
    "Chain",
    "Match",
    "PrefixIndex",
    "chain",
]

BLOCK_BYTES = 256
BLOCK_TOKENS = 64  # about as many, where an engine tells its size in tokens
CHAIN_BLOCKS_MAX = 1_024  # of one prompt; what comes after 256 KB is not looked for
_NAME_BYTES = 8
_CAPACITY = 4_096  # blocks of a node of which nothing is known: 1 MB of text
_CAPACITY_MIN = 64
_CAPACITY_MAX = 1 << 20
_FORGOT = 2  # an engine that found less than 1/2 of what was predicted has forgotten it
_SHRINK = 0.8
_GROWTH = 64  # blocks

Chain = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known beginning of a prompt: its blocks, and a bit for each node with it."""

    blocks: int
    nodes: int


_NO_MATCH = Match(0, 0)


def chain(text: bytes, *, salt: bytes = b"") -> Chain:
    """The names of all whole blocks of `text`, each of everything up to its end.

    >>> chain(b"x" * 600)[0] == chain(b"x" * 256 + b"y" * 256)[0]
    True
    >>> len(chain(b"x" * 600))
    2
    """
    running = blake2b(salt, digest_size=_NAME_BYTES)
    end = min(len(text) // BLOCK_BYTES, CHAIN_BLOCKS_MAX) * BLOCK_BYTES
    names: list[bytes] = []
    for start in range(0, end, BLOCK_BYTES):
        running.update(text[start : start + BLOCK_BYTES])
        names.append(running.copy().digest())
    return tuple(names)


@dataclass(slots=True, eq=False)
class _Cache:
    """What one node is thought to keep, the longest unused first."""

    bit: int
    capacity: int = _CAPACITY
    most: int = _CAPACITY_MAX  # what the engine itself says that it keeps
    order: OrderedDict[bytes, None] = field(default_factory=OrderedDict[bytes, None])


class PrefixIndex:
    """Which node was sent which beginnings, as far as it can still have them."""

    def __init__(self) -> None:
        self._masks: dict[bytes, int] = {}
        self._caches: dict[str, _Cache] = {}
        self._vacant: list[int] = []  # bits of nodes that have gone

    def bit(self, node: str) -> int:
        """The node's bit in every `Match`; it stays the same until the node is dropped."""
        return self._cache(node).bit

    def match(self, chain: Chain) -> Match:
        """The longest known beginning of this prompt. O(blocks)."""
        blocks, nodes = 0, -1
        for name in chain:
            both = nodes & self._masks.get(name, 0)
            if not both:
                break
            blocks, nodes = blocks + 1, both
        return Match(blocks, nodes) if blocks else _NO_MATCH

    def known(self, node: str, chain: Chain) -> int:
        """How many blocks of this beginning the node knows. O(log blocks)."""
        cache = self._caches.get(node)
        if cache is None:
            return 0
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in cache.order:
                low = middle
            else:
                high = middle - 1
        return low

    def add(self, node: str, chain: Chain) -> None:
        """The node is sent this prompt, and keeps it until others push it out. O(blocks)."""
        cache = self._cache(node)
        order, bit = cache.order, cache.bit
        for name in reversed(chain[: cache.capacity]):
            if name in order:
                order.move_to_end(name)
            else:
                order[name] = None
                self._masks[name] = self._masks.get(name, 0) | bit
        self._evict(cache)

    def resize(self, node: str, blocks: int) -> None:
        """The engine itself says how much it keeps at most; 0 is nothing.

        Said again, it changes nothing of what was learnt since.
        """
        assert blocks >= 0
        cache, most = self._cache(node), min(blocks, _CAPACITY_MAX)
        if cache.most != most:
            cache.most = cache.capacity = most
            self._evict(cache)

    def learn(self, node: str, *, predicted: int, found: int) -> None:
        """Compare what was predicted to be cached with what the engine found. In any one unit."""
        cache = self._caches.get(node)
        if cache is None or predicted <= 0:
            return
        if found * _FORGOT < predicted:
            less = max(_CAPACITY_MIN, int(len(cache.order) * _SHRINK))
            cache.capacity = min(less, cache.most)
            self._evict(cache)
        elif found >= predicted and len(cache.order) >= cache.capacity:
            cache.capacity = min(cache.most, cache.capacity + _GROWTH)

    def capacity(self, node: str) -> int:
        """How many blocks the node is thought to keep."""
        return self._cache(node).capacity

    def drop(self, node: str) -> None:
        """The node has gone, and what it kept. O(blocks that it kept)."""
        cache = self._caches.pop(node, None)
        if cache is None:
            return
        for name in cache.order:
            self._unset(name, cache.bit)
        self._vacant.append(cache.bit)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._masks)} blocks on {len(self._caches)} nodes>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        masks: dict[bytes, int] = {}
        for cache in self._caches.values():
            assert cache.bit.bit_count() == 1
            assert len(cache.order) <= cache.capacity <= cache.most
            for name in cache.order:
                masks[name] = masks.get(name, 0) | cache.bit
        assert masks == self._masks
        bits = [cache.bit for cache in self._caches.values()] + self._vacant
        assert len(bits) == len(set(bits))

    def _cache(self, node: str) -> _Cache:
        cache = self._caches.get(node)
        if cache is None:
            bit = self._vacant.pop() if self._vacant else 1 << len(self._caches)
            cache = self._caches[node] = _Cache(bit)
        return cache

    def _evict(self, cache: _Cache) -> None:
        while len(cache.order) > cache.capacity:
            name, _ = cache.order.popitem(last=False)
            self._unset(name, cache.bit)

    def _unset(self, name: bytes, bit: int) -> None:
        left = self._masks[name] & ~bit
        if left:
            self._masks[name] = left
        else:
            del self._masks[name]
