"""What is learnt of a node: how fast it reads and writes, and how much it does at once."""

from __future__ import annotations

import pytest

from anser.core.pace import Pace, Smooth


def test_the_first_sample_replaces_the_guess() -> None:
    """Until something is known the value is a guess, and worth nothing afterwards."""
    rate = Smooth(1_000.0)
    rate.observe(10.0)
    assert (rate.value, rate.samples) == (10.0, 1)


def test_an_outlier_moves_it_little() -> None:
    """One sample counts as at most four times, and at least a quarter, of what is known."""
    rate = Smooth(0.0)
    rate.observe(100.0)
    rate.observe(1e9)
    assert rate.value == pytest.approx(160.0)
    rate.observe(1e-9)
    assert rate.value == pytest.approx(160.0 - 0.2 * 120.0)


def test_a_real_change_is_followed() -> None:
    """Twenty samples of a new speed are enough."""
    rate = Smooth(0.0)
    rate.observe(100.0)
    for _ in range(20):
        rate.observe(1_000.0)
    assert rate.value > 950


def began(pace: Pace, took_s: float, *, tokens: int = 500, running: int = 8) -> None:
    """A first token comes."""
    pace.judge(whole=tokens, took_s=took_s, running=running)
    pace.began(tokens=tokens, ahead=0, took_s=min(took_s, 0.5))


def test_reading_is_learnt_from_first_tokens() -> None:
    """What was read, for others too, in the time until the first token."""
    pace = Pace()
    pace.began(tokens=300, ahead=200, took_s=0.5)
    assert pace.read_s(2_000) == pytest.approx(2.0)


@pytest.mark.parametrize(("tokens", "took_s"), [(10, 0.5), (500, 0.0)])
def test_what_measures_nothing_teaches_nothing(tokens: int, took_s: float) -> None:
    """A short prompt measures the way there; no time at all measures the clock."""
    pace = Pace()
    pace.began(tokens=tokens, ahead=0, took_s=took_s)
    assert pace.prefill_tokens_s.samples == 0


def test_writing_and_holding_are_learnt_from_ends() -> None:
    """Tokens after the first by the time that they took; and how soon one of the slots is free."""
    pace = Pace()
    pace.ended(tokens=100, wrote_s=4.0, held_s=5.0)
    pace.ended(tokens=0, wrote_s=0.0, held_s=0.0)
    assert pace.decode_tokens_s.value == 25.0
    assert pace.free_s(10) == 0.5
    assert pace.free_s(0) == 5.0


def test_an_engine_that_queues_inside_is_throttled() -> None:
    """First tokens far later than the prompts explain: a third less at once, down to one."""
    pace = Pace()
    assert pace.slots(10_000) == 10_000
    began(pace, 0.5)
    began(pace, 60.0, running=9)
    assert pace.slots(10_000) == 6
    for _ in range(100):
        began(pace, 60.0, running=1)
    assert pace.slots(10_000) == 1
    assert pace.slots(0) == 0


def test_it_is_narrowed_once_for_each_window() -> None:
    """Leases that began under the old window do not narrow the new one again and again."""
    pace = Pace()
    began(pace, 0.5)
    began(pace, 60.0, running=90)
    assert pace.window == 60
    for _ in range(59):
        began(pace, 60.0, running=60)
    assert pace.window == 60
    began(pace, 60.0, running=60)
    assert pace.window == 40


def test_it_is_widened_while_it_keeps_up() -> None:
    """Each first token in time of a full window widens it by one, up to what the node claims."""
    pace = Pace()
    began(pace, 0.5)
    began(pace, 60.0, running=3)
    assert pace.window == 2
    began(pace, 0.5, running=1)
    assert pace.window == 2
    for _ in range(10):
        began(pace, 0.5, running=pace.slots(8))
    assert pace.slots(8) == 8


def test_who_is_late_at_first_may_just_be_slow() -> None:
    """Before anything is known of its speed, nothing is too late."""
    pace = Pace()
    began(pace, 60.0)
    assert pace.window is None


def test_an_engine_that_queues_short_prompts_inside_is_throttled() -> None:
    """They say nothing of its reading, but what the best of them took explains no queue."""
    pace = Pace()
    began(pace, 9.0, tokens=10, running=8)
    assert pace.window is None, "nothing was known"
    pace.way_s = 0.5
    began(pace, 1.9, tokens=10, running=8)
    assert pace.window is None
    began(pace, 9.0, tokens=10, running=9)
    assert pace.slots(10_000) == 6


def test_an_engine_that_is_slow_at_best_is_not_late() -> None:
    """A machine that takes three seconds for any first token is given its time."""
    pace = Pace()
    for _ in range(10):
        pace.judge(whole=10, took_s=3.0, running=4)
        pace.began(tokens=10, ahead=0, took_s=3.0)
    assert pace.window is None


def test_the_best_way_is_forgotten_slowly() -> None:
    """One lucky first token is no measure for ever."""
    pace = Pace()
    pace.began(tokens=10, ahead=0, took_s=0.1)
    for _ in range(500):
        pace.began(tokens=10, ahead=0, took_s=5.0)
    assert pace.way_s == 5.0
