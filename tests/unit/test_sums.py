"""What shards say of accounts, in pieces."""

from __future__ import annotations

import pytest

from anser.core.gossip import Call
from anser.core.sums import Row, Sums


def test_what_changes_all_the_time_has_its_turn() -> None:
    """A row keeps its place until it has been sent."""
    sums, taken = Sums(10), 0
    told: list[str] = []
    for _ in range(4):
        for account in ("a", "b"):
            sums.charge(account, micro_credits=1, raised=1)
        rows, taken = sums.changed(taken, 1)
        told += [row.account for row in rows]
    assert told == ["a", "b", "a", "b"]
    assert "2 accounts" in repr(sums)


@pytest.mark.parametrize("child", ["", "a", "b"])
def test_a_call_names_a_child(child: str) -> None:
    """A call that names its own parent would lead in circles."""
    with pytest.raises(AssertionError):
        Call(parent="a", model="m", child=child, key=0)


def test_a_row_does_not_shrink() -> None:
    """A row with a negative sum is broken."""
    with pytest.raises(AssertionError):
        Row(account="a", charged=-1)
