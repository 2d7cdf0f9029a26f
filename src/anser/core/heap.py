"""A set that always knows its least item, though keys grow behind its back.

An item has a key of its own in each pool (`virtual`); a heap is about one pool.

Theory of operation. Keys move with each charge, so the heap is lazy: an entry whose item has moved
on since is put back where it belongs when it surfaces. Only a key that becomes less has to be said
(`add` again). Garbage is at most as much as there are items.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from anser.core.virtual import Pool

__all__ = ["Heap"]

_GARBAGE_MIN = 16  # entries; smaller heaps are not worth compacting
_WALK = 4  # entries looked at for each item wanted: some are garbage, some have moved on


class _Keyed(Protocol):
    def key_in(self, pool: Pool, /) -> int: ...


_T = TypeVar("_T", bound=_Keyed)


class Heap(Generic[_T]):
    """A set of items, least key first, equals in the order of entry. Keys may grow unannounced."""

    __slots__ = ("_entries", "_entry_of", "_next", "_pool")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._entries: list[tuple[int, int, _T]] = []
        self._entry_of: dict[_T, int] = {}
        self._next = 0

    def move(self, pool: Pool) -> None:
        """From now on it is about this pool."""
        self._pool = pool
        self._build()

    def add(self, item: _T) -> None:
        """Put the item in, or in its new place after its key has become less."""
        number = self._next = self._next + 1
        self._entry_of[item] = number
        heapq.heappush(self._entries, (item.key_in(self._pool), number, item))
        self._clear_away()

    def discard(self, item: _T) -> None:
        """Take the item out, if it is in."""
        if self._entry_of.pop(item, None) is not None:
            self._clear_away()

    def least(self) -> _T:
        """The item of least key; there must be one."""
        entries = self._entries
        while True:
            key, number, item = entries[0]
            if self._entry_of.get(item) != number:
                heapq.heappop(entries)
            elif key != (grown := item.key_in(self._pool)):
                number = self._next = self._next + 1
                self._entry_of[item] = number
                heapq.heapreplace(entries, (grown, number, item))
            else:
                return item

    def upto(self, limit: int, most: int) -> list[_T]:
        """Some items with keys up to `limit`, the least first and the rest about in order.

        At most `most`, found by walking down from the top; O(most), and nothing is moved.
        """
        entries, entry_of, found = self._entries, self._entry_of, list[_T]()
        places = [0] if entries else []
        for place in places:  # which grows meanwhile
            key, number, item = entries[place]
            if key > limit:
                continue
            if entry_of.get(item) == number and item.key_in(self._pool) <= limit:
                found.append(item)
                if len(found) == most:
                    break
            if len(places) < _WALK * most:
                below = 2 * place + 1
                places.extend(range(below, min(below + 2, len(entries))))
        return found

    def _clear_away(self) -> None:
        if len(self._entries) > 2 * len(self._entry_of) + _GARBAGE_MIN:
            self._build()

    def _build(self) -> None:
        numbers = self._entry_of.items()
        self._entries = [(item.key_in(self._pool), number, item) for item, number in numbers]
        heapq.heapify(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._entry_of)

    def __repr__(self) -> str:
        return f"<Heap of {len(self._entry_of)}, {len(self._entries)} entries>"

    def validate(self) -> None:
        """Assert that each item has its entry, and none with a key above its own."""
        numbers = {number: (key, item) for key, number, item in self._entries}
        assert len(numbers) == len(self._entries) <= 2 * len(self._entry_of) + _GARBAGE_MIN
        for item, number in self._entry_of.items():
            key, entered = numbers[number]
            assert entered is item
            assert key <= item.key_in(self._pool)
