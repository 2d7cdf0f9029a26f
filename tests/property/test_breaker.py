"""A node's health under any history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anser.core.health import (
    Answered,
    Drained,
    Health,
    HealthEvent,
    HealthRules,
    NodeState,
    Resumed,
    Silent,
    Spared,
    StreamDeclined,
    StreamFailed,
    StreamFinished,
    Ticked,
)

_RULES = HealthRules()
_EVENTS: st.SearchStrategy[HealthEvent] = st.one_of(
    st.just(Answered()),
    st.builds(Silent, loading=st.booleans()),
    st.just(StreamFinished()),
    st.builds(StreamFailed, jitter=st.floats(0, 1)),
    st.builds(StreamDeclined, pause_s=st.none() | st.floats(0, 10_000), jitter=st.floats(0, 1)),
    st.just(Spared()),
    st.just(Resumed()),
    st.just(Ticked()),
)
_HISTORY = st.lists(st.tuples(st.floats(0, 200), _EVENTS), max_size=120)


@given(_HISTORY, st.integers(1, 64), st.integers(0, 120))
def test_invariants_hold_after_any_history(
    history: list[tuple[float, HealthEvent]], slots: int, drained_at: int
) -> None:
    """Slots follow from the state alone, and a back-off is never longer than its cap."""
    health = Health(_RULES)
    now = 0.0
    for index, (pause, event) in enumerate(history):
        now += pause
        was_open = health.retry_at is not None
        state = health.handle(Drained() if index == drained_at else event, now)
        health.validate()
        allowed = {NodeState.UP: {slots}, NodeState.SUSPECT: {0, min(slots, 1)}}.get(state, {0})
        assert health.slots(slots) in allowed
        if health.retry_at is not None:
            assert now <= health.retry_at <= now + _RULES.backoff_max_s * 1.25
            assert was_open or isinstance(event, StreamFailed)
        if health.aside_until is not None:
            assert now <= health.aside_until <= now + _RULES.aside_max_s


@given(_HISTORY)
def test_the_same_history_gives_the_same_health(
    history: list[tuple[float, HealthEvent]],
) -> None:
    """Nothing but events and time decides."""

    def play() -> list[str]:
        health, now, seen = Health(_RULES), 0.0, []
        for pause, event in history:
            now += pause
            health.handle(event, now)
            seen.append(repr(health))
        return seen

    assert play() == play()


@given(_HISTORY)
def test_every_node_can_come_back(history: list[tuple[float, HealthEvent]]) -> None:
    """Whatever has happened, an answer, the cap's time and some good streams bring all back."""
    health, now = Health(_RULES), 0.0
    for pause, event in history:
        now += pause
        health.handle(event, now)
    now += _RULES.aside_max_s
    health.handle(Answered(), now)
    for _ in range(_RULES.trials):
        health.handle(StreamFinished(), now)
    assert (health.state, health.slots(8)) == (NodeState.UP, 8)


@given(st.integers(1, 2_000))
def test_a_node_that_fails_fast_draws_little(seconds: int) -> None:
    """A node that fails at once, whenever it is asked, gets a logarithm of the time in requests."""
    health, now, served = Health(_RULES), 0.0, 0
    health.handle(Answered(), now)
    while now < seconds:
        if health.slots(64):
            served += 1
            health.handle(StreamFailed(), now)
            now += 0.001
        else:
            now += 0.5
            health.handle(Ticked(), now)
    doublings = 6  # 2 s to 120 s
    assert served <= _RULES.failures_max + doublings + seconds / _RULES.backoff_max_s + 1
