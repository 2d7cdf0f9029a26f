"""The contract of a Clock, kept by the machine's and by the one that is set by hand."""

from __future__ import annotations

import pytest

from anser.adapters.clock import SystemClock
from anser.adapters.memory import MemoryClock
from anser.ports import Clock


@pytest.fixture(params=[SystemClock, MemoryClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    """Each clock in turn."""
    made: Clock = request.param()
    return made


def test_now_never_goes_back(clock: Clock) -> None:
    """Durations are never negative."""
    moments = [clock.now() for _ in range(1_000)]
    assert moments == sorted(moments)


def test_wall_is_unix_time_in_seconds(clock: Clock) -> None:
    """The wall clock tells a time of this century, in seconds since 1970."""
    assert 1_700_000_000 < clock.wall() < 4_102_444_800


def test_a_jump_of_the_wall_clock_leaves_durations_alone() -> None:
    """When the machine's clock is set, `wall` follows and `now` does not."""
    clock = MemoryClock()
    now, wall = clock.now(), clock.wall()
    clock.jump(-3_600)
    assert (clock.now(), clock.wall()) == (now, wall - 3_600)
    clock.advance(5)
    assert (clock.now(), clock.wall()) == (now + 5, wall - 3_595)
    assert repr(clock) == f"<MemoryClock now={now + 5:.3f} wall={wall - 3_595:.3f}>"


def test_time_is_not_taken_back() -> None:
    """Asking the hand-set clock to run backwards is a bug of the caller."""
    with pytest.raises(AssertionError):
        MemoryClock().advance(-1)
