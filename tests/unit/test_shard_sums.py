"""Shards: what they tell each other of service and keys, and how much at most."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anser.core.events import (
    Failed,
    Progressed,
    Refused,
    Request,
    Submitted,
    Weighed,
)
from anser.core.gossip import CALLS_MAX
from anser.core.ledger import Usage
from anser.core.rules import STRICT
from anser.core.shards import Gossip
from tests.ring import Ring
from tests.scheduling import CREDIT

# What is known of each other


def test_service_elsewhere_counts() -> None:
    """Who was served by one shard is behind at another."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    ring.finish("s", "q.1", output=50)
    ring.talk()
    sums = ring.shards["t"].sums
    assert sums.total("a") == sums.total("a/") == 300 * CREDIT
    assert sums.key("a") == 300 * CREDIT
    assert sums.own("a") == sums.own("nobody") == sums.key("nobody") == sums.virtual("nobody") == 0
    assert sums.total("nobody") == 0


def test_a_refund_elsewhere_puts_forward() -> None:
    """What another shard gives back lowers a key here, also of who waits or rests."""
    ring = Ring("s", "t", rules=replace(STRICT, awake_s=0.0))
    ring.node("s", "n", 2)
    ring.submit("s", "q", "a")
    ring.submit("s", "q2", "b")
    ring.node("t", "own", 1)
    ring.submit("t", "r", "c")
    ring.talk()
    ring.submit("t", "p", "a")
    ring.submit("t", "p2", "b")
    ring.tell("s", Progressed(lease="q.1", tokens=100))
    ring.tell("s", Progressed(lease="q2.1", tokens=50))
    ring.talk()
    ring.tell("s", Failed(lease="q.1", delivered=Usage(), retry=False))
    ring.talk()
    keys = {row.member: row.key for row in ring.shards["t"].scheduler.standings()}
    assert keys["a"] < keys["b"]


def test_a_refund_elsewhere_reaches_who_has_nothing_here_any_more() -> None:
    """An account that is kept because it is ahead is less so from then on."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.node("t", "own", 1)
    ring.submit("t", "r", "a")
    ring.submit("s", "q", "a")
    ring.talk()
    ring.finish("s", "q.1", output=50)
    root = ring.shards["s"].scheduler._shares._root
    [idle] = root.idle.values()
    assert [(one.member, one.queued + one.running) for one in idle] == [("a", 0)]
    before = idle.least().key_in(ring.shards["s"].scheduler._slots.pool)
    ring.tell("t", Failed(lease="r.1", delivered=Usage(), retry=False))
    ring.talk()
    assert idle.least().key_in(ring.shards["s"].scheduler._slots.pool) == before - 100 * CREDIT


def test_a_newcomer_is_lifted_to_the_least_that_waits_anywhere() -> None:
    """Idleness earns nothing, whichever shard one comes to; who waits elsewhere has been lifted."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    ring.submit("s", "q2", "a")
    ring.tell("s", Progressed(lease="q.1", tokens=100))
    ring.talk()
    ring.submit("t", "r", "b")
    assert ring.shards["t"].sums.key("b") == ring.shards["s"].sums.key("a")
    ring.talk()
    ring.tell("s", Progressed(lease="q.1", tokens=100))
    ring.submit("s", "q3", "b")
    assert ring.shards["s"].sums.key("b") < ring.shards["s"].sums.key("a")


def test_a_newcomer_is_lifted_to_virtual_time_when_nobody_waits() -> None:
    """The largest key that was ever given a slot, at any shard."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    ring.finish("s", "q.1", output=50)
    ring.submit("s", "q2", "a")
    ring.finish("s", "q2.1")
    ring.talk()
    ring.submit("t", "r", "b")
    assert ring.shards["t"].sums.key("b") == ring.shards["s"].sums.virtual("") > 0


def test_keys_agree_whenever_a_weight_is_heard_of() -> None:
    """A charge counts by the weight that its shard knew, so nothing jumps when it changes."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a/p/x")
    ring.tell("t", Weighed(member="a", weight=4_000))
    ring.tell("s", Progressed(lease="q.1", tokens=100))
    ring.tell("s", Weighed(member="a", weight=2_000))
    ring.tell("s", Progressed(lease="q.1", tokens=100))
    ring.talk()
    keys = [[shard.sums.key(one) for one in ("a", "a/p/x")] for shard in ring.shards.values()]
    assert keys[0] == keys[1] == [800 * CREDIT - 200 * CREDIT + 100 * CREDIT, 900 * CREDIT]


def test_a_message_for_another_is_dropped() -> None:
    """Nor does one from nobody count."""
    ring = Ring("s", "t")
    [message] = ring.messages("s")
    assert ring.hear(replace(message, sender="u")) == []
    assert ring.shards["s"].hear(message, ring.now) == []
    assert [shard.dropped for shard in ring.shards.values()] == [1, 1]


def test_a_batch_request_is_not_for_a_shard() -> None:
    """There is no batch band across shards."""
    request = Request(
        id="r", member="a", model="m", prompt_tokens=1, output_tokens_max=1, batch=True
    )
    with pytest.raises(AssertionError):
        Ring("s", "t").tell("s", Submitted(request=request))


def test_a_deadline_that_no_own_node_can_meet_is_refused() -> None:
    """A shard without nodes promises no time."""
    ring = Ring("s", "t")
    request = Request(
        id="r", member="a", model="m", prompt_tokens=1, output_tokens_max=1, deadline=ring.now + 1
    )
    [refused] = ring.shards["s"].handle(Submitted(request=request), ring.now)
    assert isinstance(refused, Refused)
    assert refused.code == "deadline"


# Bounds


def test_members_beyond_what_a_shard_may_know_are_refused() -> None:
    """There is room for so many accounts; those that are known go on."""
    ring = Ring("s", "t", gossip=Gossip(accounts_max=3))
    assert ring.submit("s", "q", "a") == []
    request = Request(id="q2", member="b", model="m", prompt_tokens=1, output_tokens_max=1)
    decisions = ring.shards["s"].handle(Submitted(request=request), ring.now)
    assert decisions == [Refused(request="q2", code="overloaded")]
    ring.submit("s", "q3", "a")
    assert ring.shards["s"].scheduler.queued == 2
    ring.submit("t", "r", "b")
    ring.talk()
    assert len(ring.shards["s"].sums) == 3
    assert len(ring.shards["t"].sums) == 3


def test_what_there_is_no_room_for_is_told_again() -> None:
    """Rows that did not fit are not acknowledged."""
    ring = Ring("s", "t", gossip=Gossip(accounts_max=3))
    ring.submit("s", "q", "a")
    ring.submit("t", "r", "b")
    ring.talk()
    assert {row.account for row in ring.messages("s")[0].rows} == {"a", "a/"}


def test_messages_are_bounded_and_tell_everything_in_time() -> None:
    """A message has so many rows and calls at most; the next ones go on."""
    ring = Ring("s", "t", gossip=Gossip(rows_max=64))
    for number in range(CALLS_MAX):
        ring.submit("s", f"q{number}", f"m{number}")
    [message] = ring.messages("s")
    assert len(message.rows) == 64
    assert len(message.calls) == CALLS_MAX
    ring.talk(20)
    assert ring.shards["t"].sums.totals().keys() >= {f"m{n}" for n in range(CALLS_MAX)}
    assert ring.messages("s")[0].rows == ()


def test_a_gap_is_not_taken_for_the_whole() -> None:
    """Who has missed a message is sent its rows again."""
    ring = Ring("s", "t")
    ring.submit("s", "q", "a")
    [first] = ring.messages("s")
    assert first.rows
    [second] = ring.messages("s")
    assert {row.account for row in second.rows} == {row.account for row in first.rows}
    ring.hear(replace(second, since=second.upto - 1, rows=second.rows[1:]))
    ring.talk()
    assert ring.shards["t"].sums.totals().keys() >= {"a", "a/"}


def test_neighbours_tell_of_themselves() -> None:
    """Each thing with a state shows it."""
    ring = Ring("s", "t")
    neighbours = ring.shards["s"]._neighbours
    assert "1/1 heard" in repr(neighbours)
    assert repr(ring.shards["s"].sums) == "<Sums of 0 accounts, stamp 0>"
    assert "t" in repr(neighbours.all["t"])
    for _ in range(300):
        ring.messages("s")
    assert len(neighbours.all["t"].sent_at) <= 256
