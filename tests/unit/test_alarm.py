"""services.alarm: one timer for waits that follow each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from anser.adapters.memory import MemoryClock
from anser.services.alarm import Alarm
from tests.simulation import virtual


def rung(play: Callable[[Alarm], Awaitable[None]], *, early_s: float = 10.0) -> list[float]:
    """When the alarm rang while `play` was on, and for a thousand seconds after it."""
    clock = MemoryClock()
    times: list[float] = []

    async def main() -> None:
        began = clock.now()
        alarm = Alarm(lambda: times.append(round(clock.now() - began, 3)), early_s=early_s)
        await play(alarm)
        await asyncio.sleep(1_000)

    virtual.run(main, clock=clock, jumped=lambda: None)
    return times


def test_it_rings_when_it_is_due() -> None:
    """However early its timer looks, it rings at the time that was set."""

    async def play(alarm: Alarm) -> None:
        alarm.set(25.0)

    for early_s in (1.0, 10.0, 100.0):
        assert rung(play, early_s=early_s) == [25.0]


def test_the_last_setting_counts() -> None:
    """Later or earlier than before, rung once."""

    async def later(alarm: Alarm) -> None:
        alarm.set(5.0)
        await asyncio.sleep(4)
        alarm.set(5.0)

    async def earlier(alarm: Alarm) -> None:
        alarm.set(50.0)
        alarm.set(2.0)

    assert rung(later) == [9.0]
    assert rung(earlier) == [2.0]


def test_what_is_unset_or_cancelled_is_silent() -> None:
    """Nothing is waited for; setting it once more makes it ring."""

    async def unset(alarm: Alarm) -> None:
        alarm.set(5.0)
        alarm.unset()

    async def cancelled(alarm: Alarm) -> None:
        alarm.set(5.0)
        alarm.cancel()
        alarm.cancel()

    async def again(alarm: Alarm) -> None:
        await unset(alarm)
        await asyncio.sleep(7)
        alarm.set(1.0)

    assert rung(unset) == []
    assert rung(cancelled) == []
    assert rung(again) == [8.0]


def test_time_does_not_count_while_it_is_held() -> None:
    """What a client takes is added to what its engine has."""

    async def play(alarm: Alarm) -> None:
        alarm.set(5.0)
        await asyncio.sleep(3)
        alarm.hold()
        assert alarm.held
        await asyncio.sleep(100)
        alarm.go_on()
        alarm.go_on()
        assert not alarm.held

    async def held_for_ever(alarm: Alarm) -> None:
        alarm.set(5.0)
        alarm.hold()
        assert "held=True" in repr(alarm)

    assert rung(play) == [105.0]
    assert rung(held_for_ever) == []
