"""The scheduler, one sentence of its docstring at a time."""

from __future__ import annotations

import pytest

from anser.core.events import (
    Cancelled,
    Decision,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Start,
    Submitted,
    Weighed,
)
from anser.core.ledger import Usage
from anser.core.scheduler import Scheduler
from tests.scheduling import CREDIT, Pool, request

# Late binding


def test_a_request_starts_at_once_where_a_slot_is_free() -> None:
    """The decision names the lease, its node, its model and the request as it came."""
    pool = Pool()
    pool.node("n1", 1)
    (start,) = pool.tell(Submitted(request=request("r1")))
    assert isinstance(start, Start)
    assert start.request == request("r1")
    assert start.lease.id == "r1.1"
    assert start.lease.request == "r1"
    assert start.lease.node == "n1"
    assert start.lease.model == "m"
    assert start.lease.attempt == 1
    assert pool.state == (0, 1, 0)


def test_a_request_waits_until_a_slot_is_free() -> None:
    """Engines never queue: without a free slot a request stays here."""
    pool = Pool()
    pool.node("n1", 1)
    assert pool.submit("r1") == ["r1.1 n1"]
    assert pool.submit("r2") == []
    assert pool.state == (1, 1, 0)
    assert pool.finish("r1.1") == ["r2.1 n1"]
    assert pool.state == (0, 1, 0)


def test_a_new_node_takes_what_waits() -> None:
    """All free slots are filled at once, in the order of the queue."""
    pool = Pool()
    for number in range(4):
        pool.submit(f"r{number}")
    assert pool.node("n1", 3) == ["r0.1 n1", "r1.1 n1", "r2.1 n1"]
    assert pool.state == (1, 3, 0)


def test_a_request_runs_only_where_its_model_is_served() -> None:
    """A free slot of another model's node is of no use."""
    pool = Pool()
    pool.node("n1", 1, "other")
    assert pool.submit("r1") == []
    assert pool.node("n1", 1, "other", "m") == ["r1.1 n1"]


def test_a_freed_slot_goes_to_the_member_of_least_key() -> None:
    """Not to the request that has waited longest."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("a1", "alice")
    pool.submit("a2", "alice")
    pool.submit("a3", "alice")
    pool.submit("b1", "bob")
    assert pool.finish("a1.1", output=10) == ["b1.1 n1"]


def test_weights_divide_the_service() -> None:
    """A member of three times the weight gets three times as much."""
    pool = Pool()
    pool.node("n1", 1)
    pool.tell(Weighed(member="alice", weight=3_000))
    for number in range(40):
        pool.submit(f"a{number}", "alice")
        pool.submit(f"b{number}", "bob")
    lease = "a0.1"
    started = []
    for _ in range(40):
        (name,) = pool.finish(lease)
        lease = name.split()[0]
        started.append(lease[0])
    assert started.count("a") == 30
    assert started.count("b") == 10


# Charge


def test_prompt_is_charged_at_the_start_and_output_as_it_comes() -> None:
    """A running answer counts before it ends."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1", prompt=50)
    assert pool.credits("alice") == 50
    pool.tell(Progressed(lease="r1.1", tokens=10))
    assert pool.credits("alice") == 90
    assert pool.scheduler.service == 90 * CREDIT


def test_end_corrects_to_the_usage_reported() -> None:
    """What counts in the end is what the engine reports: cached tokens cost a tenth."""
    pool = Pool()
    pool.node("n1", 2)
    pool.submit("hold", prompt=0)
    pool.submit("r1", prompt=50)
    pool.tell(Progressed(lease="r1.1", tokens=10))
    usage = Usage(prompt_tokens=60, cached_tokens=40, completion_tokens=12)
    pool.tell(Finished(lease="r1.1", usage=usage))
    assert pool.credits("alice") == 20 + 4 + 48


def test_the_models_factor_multiplies_the_price() -> None:
    """A model of half the size costs half as much, at each step."""
    pool = Pool()
    pool.node("n1", 2)
    pool.submit("hold", prompt=0)
    pool.tell(Submitted(request=request("r1", prompt=50, factor=500)))
    assert pool.credits("alice") == 25
    pool.tell(Progressed(lease="r1.1", tokens=10))
    assert pool.credits("alice") == 45
    pool.tell(Finished(lease="r1.1", usage=Usage(prompt_tokens=10, completion_tokens=10)))
    assert pool.credits("alice") == 25


# Limits


def test_queue_is_limited() -> None:
    """At the limit a request still waits; beyond it, it is refused and leaves no account."""
    pool = Pool(queued_max=1)
    pool.submit("r1")
    assert pool.tell(Submitted(request=request("r2", "bob"))) == [
        Refused(request="r2", code="overloaded")
    ]
    assert pool.state == (1, 0, 0)
    assert [row.member for row in pool.scheduler.standings()] == ["alice"]


def test_a_full_queue_refuses_nobody_who_can_start() -> None:
    """The limit is on waiting: whoever finds a free slot needs no place in the queue."""
    pool = Pool(queued_max=0)
    pool.node("n1", 1)
    assert pool.submit("r1") == ["r1.1 n1"]


def test_a_retry_is_not_refused_by_a_full_queue() -> None:
    """It has been admitted already."""
    pool = Pool(queued_max=1)
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    pool.tell(NodeGone(node="n1"))
    assert pool.retry("r1.1") == []
    assert pool.state == (2, 0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scheduler(-1, 3),
        lambda: Scheduler(1, 0),
        lambda: request("r1", prompt=-1),
        lambda: request("r1", factor=0),
        lambda: Progressed(lease="r1.1", tokens=-1),
        lambda: NodeChanged(node="n1", slots=-1, models=frozenset()),
        lambda: Weighed(member="a", weight=0),
    ],
)
def test_senseless_numbers_are_broken_invariants(make: object) -> None:
    """No event can be made that would turn a key backwards or a count below nothing."""
    assert callable(make)
    with pytest.raises(AssertionError):
        make()


# Nodes


def test_a_draining_node_takes_nothing_new() -> None:
    """What runs goes on; the slot is not filled again."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    assert pool.node("n1", 0) == []
    assert pool.finish("r1.1") == []
    assert pool.state == (1, 0, 0)


def test_a_node_that_shrinks_below_what_runs_takes_nothing_new() -> None:
    """Nothing is stopped; the surplus is waited for."""
    pool = Pool()
    pool.node("n1", 2)
    for name in ("r1", "r2", "r3"):
        pool.submit(name)
    assert pool.node("n1", 1) == []
    assert pool.finish("r1.1") == []
    assert pool.finish("r2.1") == ["r3.1 n1"]


@pytest.mark.parametrize("lost_first", [True, False])
def test_a_lost_node_and_its_leases_may_be_reported_in_any_order(lost_first: object) -> None:
    """Either way the requests run elsewhere, and nothing is left of the node."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.node("n2", 1)
    if lost_first:
        assert pool.tell(NodeGone(node="n1")) == []
        assert pool.retry("r1.1") == ["r1.2 n2"]
    else:
        assert pool.retry("r1.1") == ["r1.2 n2"]
        assert pool.tell(NodeGone(node="n1")) == []
    assert pool.scheduler.running_on("n1") == 0
    assert pool.scheduler.running_on("n2") == 1


# What is not known


def test_a_request_that_is_known_is_not_taken_again() -> None:
    """The same id twice is a repetition, whether it waits or runs."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    assert pool.submit("r1") == []
    assert pool.submit("r2") == []
    assert pool.state == (1, 1, 2)


def test_events_about_ended_leases_are_dropped() -> None:
    """Nothing late may change what is now."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.retry("r1.1")
    before = pool.credits("alice")
    pool.tell(Progressed(lease="r1.1", tokens=1_000))
    pool.finish("r1.1", output=1_000)
    pool.retry("r1.1")
    assert pool.credits("alice") == before
    assert pool.state == (0, 1, 3)


def test_cancelling_twice_or_too_late_is_dropped() -> None:
    """One abort is enough, and what has ended cannot be cancelled."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.tell(Cancelled(request="r1"))
    assert pool.tell(Cancelled(request="r1")) == []
    pool.finish("r1.1")
    assert pool.tell(Cancelled(request="r1")) == []
    assert pool.state == (0, 0, 2)


def test_time_does_not_run_backwards() -> None:
    """`now` is monotonic; a caller that breaks this would make replays differ."""
    scheduler = Scheduler(1, 1)
    scheduler.handle(NodeGone(node="n1"), 2.0)
    scheduler.handle(NodeGone(node="n1"), 2.0)
    with pytest.raises(AssertionError):
        scheduler.handle(NodeGone(node="n1"), 1.9)


# What others see


def test_counts_of_members_are_of_all_below_them() -> None:
    """An organisation's counts are those of its people."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1", "org/p/x")
    pool.submit("r2", "org/p/x")
    pool.submit("r3", "org")
    scheduler = pool.scheduler
    assert (scheduler.queued_of("org"), scheduler.running_of("org")) == (2, 1)
    assert (scheduler.queued_of("org/p/x"), scheduler.running_of("org/p")) == (1, 1)
    assert (scheduler.queued_of("other"), scheduler.running_of("other")) == (0, 0)
    assert scheduler.running_on("n1") == 1


def test_repr_tells_the_state_in_a_line() -> None:
    """What waits, runs and was dropped, and how full the nodes are."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    pool.retry("r9.1")
    shown = "<Scheduler 1 queued, 1 running, 1 dropped, <Slots 1/1 taken on 1 nodes>>"
    assert repr(pool.scheduler) == shown


def test_the_same_events_give_the_same_decisions() -> None:
    """A day of traffic can be replayed."""

    def day() -> list[Decision]:
        pool = Pool()
        pool.node("n1", 2)
        pool.node("n2", 2)
        decisions: list[Decision] = []
        for number in range(30):
            decisions += pool.tell(Submitted(request=request(f"r{number}", f"u{number % 7}")))
        for number in range(20):
            usage = Usage(prompt_tokens=number, completion_tokens=number % 3)
            decisions += pool.tell(Finished(lease=f"r{number}.1", usage=usage))
        return decisions

    assert day() == day()
