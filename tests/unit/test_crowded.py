"""Who goes first, and who is sent away, where more is asked than there is."""

from __future__ import annotations

from anser.core.events import Rule
from tests.unit.test_rules import Pool


def test_a_batch_is_sent_away_before_anybody_who_waits_now() -> None:
    """At the queue's limit the lowest class is shed first, whoever has how much waiting."""
    pool = Pool(queued_max=3)
    pool.node("n1", 1)
    pool.ask("r0", "a")
    pool.ask("b1", "org/one", batch=True)
    pool.ask("r1", "a")
    pool.ask("r2", "a")
    assert pool.ask("r3", "a") == ["b1 overloaded"]
    assert pool.ask("r4", "a") == ["r4 overloaded"]
    assert pool.ask("b2", "b", batch=True) == ["b2 overloaded"]


def test_many_light_members_of_one_organisation_are_no_lighter_than_it_is() -> None:
    """A crowd of strangers, each with one request, has the share of its organisation, no more."""
    pool = Pool()
    pool.node("n1", 1)
    for number in range(30):
        pool.ask(f"s{number}", f"anonymous/bucket-{number}")
    for number in range(8):
        pool.ask(f"a{number}", "org/ada")
    running, order = "s0", ""
    for _ in range(20):
        (started,) = pool.end(running)
        running = started.split()[0]
        order += running[0]
    assert order[:16].count("a") >= 6, order


def test_light_members_go_first_within_their_organisation() -> None:
    """That their organisation has much in flight is no reason to wait behind its heavy ones."""
    pool = Pool()
    pool.node("n1", 2)
    for number in range(8):
        pool.ask(f"h{number}", "org/heavy")
    pool.ask("x", "other")
    pool.end("h0")
    pool.ask("l", "org/light")
    pool.end("h1")
    assert pool.why("l") is Rule.LIGHT
