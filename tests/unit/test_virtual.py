"""Virtual time: it only grows, and remembers what a minute of it was."""

from __future__ import annotations

from anser.core.virtual import Pool, Virtual


def test_it_is_the_largest_key_ever_dispatched() -> None:
    """A smaller key does not move it back."""
    virtual = Virtual()
    virtual.advance(10, 0.0)
    virtual.advance(5, 1.0)
    assert virtual.now == 10


def test_its_reach_is_a_minute_or_two_ahead() -> None:
    """Ahead of it by what it has grown since one to two minutes ago."""
    virtual = Virtual()
    for second in range(600):
        virtual.advance(second, float(second))
    assert 60 <= virtual.reach - virtual.now <= 120


def test_one_goes_on_from_several() -> None:
    """As far as the furthest, at the pace of the fastest; from one alone, exactly as it was."""
    slow, fast = Virtual(), Virtual()
    for second in range(200):
        slow.advance(1_000 + second, float(second))
        fast.advance(second * 10, float(second))
    joint = Virtual.joint([slow, fast])
    assert joint.now == max(slow.now, fast.now)
    assert joint.reach - joint.now == fast.reach - fast.now
    assert Virtual.joint([fast]) == fast


def test_a_pool_is_an_identity() -> None:
    """Two pools are never the same, and each has a number for people."""
    assert Pool(1) != Pool(1)
    assert repr(Pool(7)) == "<Pool 7>"
