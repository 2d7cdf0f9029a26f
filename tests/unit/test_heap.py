"""The heap: a set that knows its least item, though keys grow behind its back."""

from __future__ import annotations

from dataclasses import dataclass

from anser.core.heap import Heap
from anser.core.virtual import Pool

POOL = Pool(1)


@dataclass(eq=False)
class Item:
    """Something with a key."""

    key: int

    def key_in(self, _: Pool) -> int:
        """Its key, the same in all pools."""
        return self.key


def test_heap_gives_the_least_key_and_equals_in_the_order_of_entry() -> None:
    """Least key first; between equals, who came first."""
    heap: Heap[Item] = Heap(POOL)
    first, second, less = Item(5), Item(5), Item(1)
    for item in (first, second, less):
        heap.add(item)
    order = []
    while heap:
        order.append(heap.least())
        heap.discard(order[-1])
    assert order == [less, first, second]


def test_heap_finds_keys_that_have_grown_unannounced() -> None:
    """A grown key is put where it belongs, behind those that were equal before it."""
    heap: Heap[Item] = Heap(POOL)
    first, second = Item(1), Item(3)
    heap.add(first)
    heap.add(second)
    first.key = 3
    heap.validate()
    assert heap.least() is second
    first.key = 2
    heap.add(first)
    assert heap.least() is first
    heap.validate()


def test_heap_keeps_no_more_garbage_than_items() -> None:
    """Entries of items that have moved on are cleared away before they pile up."""
    heap: Heap[Item] = Heap(POOL)
    item = Item(0)
    for key in range(1_000, 0, -1):
        item.key = key
        heap.add(item)
    assert heap.least() is item
    assert len(heap) == 1
    assert int(repr(heap).split()[3]) < 20
    heap.validate()


def test_heap_is_still_in_order_after_clearing_away() -> None:
    """The least key comes first before and after the garbage is gone."""
    heap: Heap[Item] = Heap(POOL)
    items = [Item(key) for key in range(100, 0, -1)]
    for item in items:
        heap.add(item)
    for item in items[:90]:
        heap.discard(item)
        heap.validate()
    heap.add(Item(200))
    order = []
    while heap:
        item = heap.least()
        order.append(item.key)
        heap.discard(item)
    assert order == [*range(1, 11), 200]


def test_heap_is_a_set() -> None:
    """It knows its items, and forgets one without fuss even if it is not there."""
    heap: Heap[Item] = Heap(POOL)
    item = Item(1)
    heap.discard(item)
    assert item not in heap
    heap.add(item)
    assert item in heap
    assert list(heap) == [item]
    assert repr(heap) == "<Heap of 1, 1 entries>"


def test_heap_gives_some_items_up_to_a_limit() -> None:
    """The least first, no more than asked for, none above the limit."""
    heap: Heap[Item] = Heap(POOL)
    items = [Item(key) for key in range(10)]
    for item in reversed(items):
        heap.add(item)
    heap.discard(items[1])
    items[2].key = 50
    found = heap.upto(5, 3)
    assert found[0] is items[0]
    assert len(found) == 3
    assert {item.key for item in heap.upto(5, 20)} == {0, 3, 4, 5}
    assert heap.upto(-1, 3) == []
    assert Heap[Item](POOL).upto(5, 3) == []
    heap.validate()


def test_heap_looks_at_a_bounded_number_of_entries() -> None:
    """Where most have moved on, it gives few items rather than looking for long."""
    heap: Heap[Item] = Heap(POOL)
    items = [Item(0) for _ in range(100)]
    for item in items:
        heap.add(item)
        item.key = 1_000
    items[0].key = items[99].key = 0
    assert heap.upto(5, 2) == [items[0]]
    heap.validate()


def test_heap_moves_to_another_pool() -> None:
    """Its order is that of the keys there."""
    heap: Heap[Item] = Heap(POOL)
    first, second = Item(1), Item(2)
    heap.add(first)
    heap.add(second)
    first.key = 3
    heap.move(Pool(2))
    assert heap.least() is second
    heap.validate()
