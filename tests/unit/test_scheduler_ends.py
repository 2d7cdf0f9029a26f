"""The scheduler: how requests fail, are tried again and are cancelled."""

from __future__ import annotations

from anser.core.events import (
    Abort,
    Cancelled,
    Failed,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
)
from anser.core.ledger import Usage
from tests.scheduling import Pool, leases

# Failure


def test_a_failed_request_goes_to_another_node_unseen() -> None:
    """Its attempt is counted, and the failed node is shunned even if it is the freest."""
    pool = Pool()
    pool.node("n1", 8)
    pool.submit("r1")
    pool.node("n2", 1)
    assert pool.retry("r1.1") == ["r1.2 n2"]
    assert pool.state == (0, 1, 0)


def test_all_that_was_not_delivered_is_refunded() -> None:
    """A failure before the first token costs nothing; one after it, what was delivered."""
    pool = Pool()
    pool.node("n1", 3)
    pool.submit("hold", prompt=0)
    pool.submit("r1")
    pool.node("n1", 0)
    pool.tell(Progressed(lease="r1.1", tokens=10))
    pool.retry("r1.1")
    assert pool.credits("alice") == 0
    pool.node("n2", 1)
    assert pool.credits("alice") == 100
    pool.tell(Progressed(lease="r1.2", tokens=10))
    delivered = Usage(prompt_tokens=100, completion_tokens=7)
    assert pool.tell(Failed(lease="r1.2", delivered=delivered, retry=False)) == []
    assert pool.credits("alice") == 128
    assert pool.state == (0, 1, 0)


def test_a_failed_request_goes_to_the_front_of_its_members_queue() -> None:
    """Its client has waited longest."""
    pool = Pool()
    pool.node("n1", 1)
    for name in ("r1", "r2", "r3"):
        pool.submit(name)
    assert pool.retry("r1.1") == ["r1.2 n1"]
    assert pool.retry("r1.2") == ["r1.3 n1"]


def test_failed_requests_keep_their_order() -> None:
    """Of two that failed, the older goes first, whichever failure was reported first."""
    pool = Pool()
    pool.node("n1", 2)
    for name in ("r1", "r2", "r3"):
        pool.submit(name)
    pool.tell(NodeGone(node="n1"))
    pool.retry("r2.1")
    pool.retry("r1.1")
    assert pool.node("n2", 3) == ["r1.2 n2", "r2.2 n2", "r3.1 n2"]


def test_a_failed_request_goes_before_older_ones_that_never_started() -> None:
    """Also where those wait for another model: the front is the front of the whole queue."""
    pool = Pool()
    older = Request(id="r1", member="alice", model="other", prompt_tokens=1, output_tokens_max=1)
    pool.tell(Submitted(request=older))
    pool.node("n1", 1)
    pool.submit("r2")
    pool.tell(NodeGone(node="n1"))
    pool.retry("r2.1")
    assert pool.node("n2", 1, "m", "other") == ["r2.2 n2"]


def test_a_request_shuns_all_nodes_on_which_it_failed() -> None:
    """Not only the last one."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.node("n2", 1)
    pool.submit("r2")
    pool.node("n3", 1)
    pool.submit("r3")
    pool.retry("r1.1")
    assert pool.finish("r2.1") == ["r1.2 n2"]
    assert pool.retry("r1.2") == []
    assert pool.finish("r3.1") == ["r1.3 n3"]


def test_a_retry_waits_for_the_freed_slot_like_anybody_else() -> None:
    """The slot of the failed lease goes by key, not to the one that has just failed there."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("a1", "alice")
    pool.submit("b1", "bob")
    assert pool.retry("a1.1") == ["b1.1 n1"]
    assert pool.finish("b1.1") == ["a1.2 n1"]


def test_tries_are_limited() -> None:
    """After its last try a request is refused, and its slot goes on to the next."""
    pool = Pool(retries_max=2)
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    assert pool.retry("r1.1") == ["r1.2 n1"]
    refused, following = pool.tell(Failed(lease="r1.2", delivered=Usage(), retry=True))
    assert refused == Refused(request="r1", code="retries_exhausted")
    assert isinstance(following, Start)
    assert following.lease.id == "r2.1"
    assert pool.state == (0, 1, 0)


def test_a_shunned_node_serves_when_nobody_else_does() -> None:
    """When the other nodes of the model go, failing again beats waiting for ever."""
    pool = Pool()
    pool.node("n1", 1)
    pool.node("n2", 1)
    pool.submit("r1")
    pool.submit("r2")
    assert pool.retry("r1.1") == []
    decisions = pool.tell(NodeGone(node="n2"))
    assert leases(decisions) == ["r1.2 n1"]


# Cancel


def test_a_waiting_request_is_forgotten() -> None:
    """Cancelled in the queue, it leaves no trace and gives no decision."""
    pool = Pool()
    pool.submit("r1")
    assert pool.tell(Cancelled(request="r1")) == []
    assert pool.state == (0, 0, 0)
    assert pool.scheduler.standings() == []
    assert pool.node("n1", 1) == []


def test_a_running_request_is_aborted_and_keeps_its_slot() -> None:
    """The slot is free when the engine says so, and what it generated until then is paid."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.submit("r2")
    assert pool.tell(Cancelled(request="r1")) == [Abort(lease="r1.1")]
    assert pool.state == (1, 1, 0)
    pool.tell(Progressed(lease="r1.1", tokens=10))
    assert pool.credits("alice") == 140
    assert pool.finish("r1.1", output=12) == ["r2.1 n1"]
    assert pool.credits("alice") == 148 + 100


def test_a_cancelled_request_is_not_tried_again() -> None:
    """If its node fails, nobody wants the answer any more."""
    pool = Pool()
    pool.node("n1", 1)
    pool.submit("r1")
    pool.tell(Cancelled(request="r1"))
    assert pool.retry("r1.1") == []
    assert pool.state == (0, 0, 0)
