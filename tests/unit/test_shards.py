"""Shards: what they tell each other, and the slots they lend."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anser.core.events import (
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.gossip import CALLS_MAX, UNHEARD_MAX, Message
from anser.core.ledger import Usage
from anser.core.rules import DESIGN, STRICT, Rules
from anser.core.shards import Gossip, Shard
from tests.scheduling import CREDIT

MODELS = frozenset(("m",))
_GOSSIP = Gossip()


class Ring:
    """Shards that hear each other at once, unless they are to be silent; short words for events."""

    def __init__(self, *names: str, rules: Rules = STRICT, gossip: Gossip = _GOSSIP) -> None:
        self.now = 0.0
        self.gossip = gossip
        self.silent: set[str] = set()
        self.starts: dict[str, str] = {}  # lease to node
        self.shards = {
            name: Shard(
                name,
                [other for other in names if other != name],
                queued_max=1_000,
                retries_max=3,
                rules=rules,
                gossip=gossip,
            )
            for name in names
        }
        self.talk()

    def tell(self, name: str, event: Event) -> list[str]:
        """What starts at this shard by it, each lease with its node."""
        return self.started(name, self.shards[name].handle(event, self.now))

    def started(self, name: str, decisions: list[Decision]) -> list[str]:
        """The leases that start, each with its node."""
        self.shards[name].validate()
        starts = [one for one in decisions if isinstance(one, Start)]
        return [f"{start.lease.id} {start.lease.node}" for start in starts]

    def node(self, name: str, node: str, slots: int) -> list[str]:
        """A node of this shard has so many slots from now on."""
        return self.tell(name, NodeChanged(node=node, slots=slots, models=MODELS))

    def submit(self, name: str, id: str, member: str = "a", *, model: str = "m") -> list[str]:
        """A request of 100 prompt tokens comes to this shard."""
        request = Request(
            id=id, member=member, model=model, prompt_tokens=100, output_tokens_max=100
        )
        return self.tell(name, Submitted(request=request))

    def finish(self, name: str, lease: str, *, output: int = 0) -> list[str]:
        """A lease of this shard ends."""
        usage = Usage(prompt_tokens=100, completion_tokens=output)
        return self.tell(name, Finished(lease=lease, usage=usage))

    def messages(self, name: str) -> list[Message]:
        """What this shard says a round later."""
        self.now += self.gossip.every_s
        return self.shards[name].speak(self.now)

    def hear(self, message: Message) -> list[str]:
        """What starts by a message."""
        shard = self.shards[message.receiver]
        return self.started(message.receiver, shard.hear(message, self.now))

    def talk(self, rounds: int = 3) -> list[str]:
        """All say how things are, and all hear it, some times over; what starts by it."""
        found: list[str] = []
        for _ in range(rounds):
            self.now += self.gossip.every_s
            talking = [shard for name, shard in self.shards.items() if name not in self.silent]
            for message in [one for shard in talking for one in shard.speak(self.now)]:
                if message.receiver not in self.silent:
                    found += self.hear(message)
        return found


# Lending


def test_a_free_slot_goes_to_who_waits_elsewhere() -> None:
    """A request that came to a shard without nodes runs in a slot that another one lends."""
    ring = Ring("s", "t")
    assert ring.node("s", "n", 1) == []
    assert ring.submit("t", "r") == []
    assert ring.talk() == ["r.1 n"]
    assert ring.submit("s", "q") == []
    assert ring.shards["t"].scheduler.running_on("n") == 1
    assert "1 lent" in repr(ring.shards["s"])
    assert "1 held" in repr(ring.shards["t"])


def test_a_borrowed_slot_goes_back_when_its_lease_ends() -> None:
    """No second request of the borrower follows into it: the owner decides anew."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r", "a")
    ring.talk()
    ring.submit("t", "r2", "a")
    ring.submit("s", "q", "b")
    assert ring.finish("t", "r.1") == []
    assert ring.talk() == ["q.1 n"]
    assert ring.finish("s", "q.1", output=50) == []
    assert ring.talk() == ["r2.1 n"]


def test_own_members_go_first_among_equals() -> None:
    """A slot stays with its owner unless somebody elsewhere is further behind than the window."""
    ring = Ring("s", "t", rules=replace(STRICT, window=1_000 * CREDIT))
    ring.submit("t", "r", "b")
    ring.submit("s", "q", "a")
    ring.talk()
    assert ring.node("s", "n", 1) == ["q.1 n"]
    ring.submit("s", "q2", "a")
    assert ring.finish("s", "q.1", output=10) == ["q2.1 n"]
    ring.submit("s", "q3", "a")
    assert ring.finish("s", "q2.1", output=50) == []
    assert ring.talk() == ["r.1 n"]


def test_a_newcomer_does_not_pass_who_waits_elsewhere() -> None:
    """A free slot that is due elsewhere is not taken by who finds nobody waiting here."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    ring.finish("s", "q.1", output=50)
    ring.node("s", "n", 0)
    for number in range(2 * UNHEARD_MAX):
        ring.submit("t", f"r{number}", "b")
    ring.talk()
    ring.silent = {"t"}
    ring.node("s", "n", UNHEARD_MAX + 1)
    assert ring.submit("s", "q2", "a") == []
    assert ring.submit("s", "q3", "a") == []
    assert ring.shards["s"].scheduler.queued == 2


def test_a_slot_that_nobody_takes_goes_back() -> None:
    """Whoever has nothing for a lent slot returns it, and is not offered another for a moment."""
    ring = Ring("s", "t")
    ring.submit("t", "r", "b")
    ring.talk()
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    [lent] = ring.messages("s")
    assert [loan.node for loan in lent.loans] == ["n"]
    ring.tell("t", Cancelled(request="r"))
    assert ring.hear(lent) == []
    [back] = ring.messages("t")
    assert [one.used for one in back.returned] == [False]
    assert ring.hear(back) == ["q.1 n"]
    ring.talk()
    assert ring.messages("t")[0].returned == ()


def test_messages_that_come_twice_or_late_book_no_slot() -> None:
    """Only the newest message counts: an old one brings no loan back, and none counts twice."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r")
    [calls] = ring.messages("t")
    ring.hear(calls)
    [lent] = ring.messages("s")
    assert ring.hear(lent) == ["r.1 n"]
    ring.submit("t", "r2")
    assert ring.hear(lent) == []
    ring.finish("t", "r.1")
    [back] = ring.messages("t")
    ring.submit("s", "q")
    assert ring.hear(back) == ["q.1 n"]
    assert ring.hear(back) == []
    [closed] = ring.messages("s")
    assert ring.hear(closed) == []
    assert ring.hear(lent) == []
    assert ring.shards["t"].scheduler.queued == 1


def test_a_loan_is_told_until_it_is_heard() -> None:
    """A lost message is made good by the next one."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r")
    ring.hear(ring.messages("t")[0])
    ring.messages("s")
    assert ring.hear(ring.messages("s")[0]) == ["r.1 n"]


def test_a_loan_of_unknown_age_is_not_taken() -> None:
    """A message that may have been under way for long lends nothing: its slot may be another's."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r")
    ring.hear(ring.messages("t")[0])
    [lent] = ring.messages("s")
    ring.now += ring.gossip.take_s + 1
    assert ring.hear(lent) == []
    assert ring.talk() == ["r.1 n"]


def test_a_light_member_elsewhere_gets_a_slot_that_is_kept_for_such() -> None:
    """An express slot is lent to who asks little, and to nobody else."""
    ring = Ring("s", "t", rules=replace(DESIGN, hold=False))
    ring.node("s", "n", 4)
    ring.submit("s", "c", "c")
    for number in range(6):
        ring.submit("s", f"q{number}", "a")
    ring.submit("t", "r", "b")
    assert ring.shards["t"].speak(ring.now + ring.gossip.every_s / 4), "in haste"
    assert ring.talk() == ["r.1 n"]
    ring.finish("t", "r.1")
    ring.talk()
    for number in range(4):
        ring.submit("t", f"p{number}", "b")
    ring.talk()
    assert ring.shards["t"].scheduler.running_on("n") <= 1


def test_a_prompt_is_told_in_haste() -> None:
    """It was charged in one piece, so the others are not left to think otherwise for long."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.talk()
    soon = ring.now + ring.gossip.every_s / 4
    assert ring.shards["s"].speak(soon) == []
    ring.submit("s", "r")
    (message,) = ring.shards["s"].speak(soon)
    assert [row.charged for row in message.rows if row.account == "a"] == [100 * CREDIT]


def test_what_is_read_for_others_closes_a_node() -> None:
    """Its owner counts what borrowers have to read there, and lends no more until that is read."""
    ring = Ring("s", "t", rules=replace(DESIGN, hold=False, express=0.0))
    ring.node("s", "n", 8)
    for number in range(8):
        ring.submit("t", f"r{number}", "a")
        ring.submit("t", f"q{number}", "b")
    ring.talk(20)  # a node of which nothing is known reads 250 tokens in a quarter of a second
    assert ring.shards["t"].scheduler.running_on("n") == 3
    for lease in ("r0.1", "q0.1", "r1.1"):
        ring.tell("t", Progressed(lease=lease, tokens=1))
    ring.talk(20)
    assert ring.shards["t"].scheduler.running_on("n") > 3


def test_a_silent_shard_is_not_counted_with() -> None:
    """Whoever has not been heard of for a while holds nobody back."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("s", "q", "a")
    ring.submit("t", "r", "b")
    ring.talk()
    ring.silent = {"t"}
    ring.submit("s", "q2", "a")
    assert ring.finish("s", "q.1", output=50) == []
    ring.now += ring.gossip.lost_s
    ring.talk(1)
    assert ring.tell("s", NodeChanged(node="n2", slots=1, models=MODELS)) == ["q2.1 n2"]


def test_few_slots_are_lent_to_who_does_not_answer() -> None:
    """A shard that has gone takes at most so many slots with it."""
    ring = Ring("s", "t")
    for number in range(2 * UNHEARD_MAX):
        ring.submit("t", f"r{number}")
    ring.talk()
    ring.silent = {"t"}
    ring.node("s", "n", 2 * UNHEARD_MAX)
    assert len(ring.messages("s")[0].loans) == UNHEARD_MAX
    ring.silent = set()
    assert len(ring.talk(8)) == 2 * UNHEARD_MAX


def test_slots_of_a_shard_that_has_gone_come_back_when_the_node_is_idle() -> None:
    """Silence alone does not end a loan, nor does an idle moment of a shard that is there."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r")
    ring.talk()
    ring.submit("s", "q")
    shard = ring.shards["s"]
    assert shard.reclaim("n", running=0, now=ring.now) == []
    ring.silent = {"t"}
    ring.now += 2 * ring.gossip.lost_s + 1
    assert shard.reclaim("n", running=1, now=ring.now) == []
    assert shard.reclaim("unknown", running=0, now=ring.now) == []
    assert ring.started("s", shard.reclaim("n", running=0, now=ring.now)) == ["q.1 n"]
    ring.silent = set()
    ring.talk()
    ring.tell("t", Failed(lease="r.1", delivered=Usage(), retry=False))
    ring.talk()
    assert ring.messages("t")[0].returned == ()


def test_a_lost_node_comes_back_without_the_slots_that_are_lent() -> None:
    """What a borrower still holds is not booked again, whatever has become of the node."""
    ring = Ring("s", "t")
    ring.node("s", "n", 2)
    ring.submit("t", "r")
    ring.talk()
    ring.submit("s", "q")
    ring.tell("s", NodeGone(node="n"))
    ring.tell("s", NodeGone(node="unknown"))
    ring.tell("s", Failed(lease="q.1", delivered=Usage(), retry=True))
    assert ring.node("s", "n", 2) == ["q.2 n"]
    ring.submit("s", "q2")
    assert ring.tell("t", Failed(lease="r.1", delivered=Usage(), retry=False)) == []
    assert ring.talk() == ["q2.1 n"]
    ring.tell("s", NodeChanged(node="n", slots=0, models=frozenset()))
    ring.tell("s", NodeChanged(node="never", slots=0, models=frozenset()))


def test_a_request_shuns_the_node_that_failed_it_also_when_borrowed() -> None:
    """It calls for slots of others only when no node of its own is left to try."""
    ring = Ring("s", "t")
    ring.node("s", "n", 1)
    ring.submit("t", "r")
    ring.talk()
    ring.node("t", "own", 1)
    ring.submit("t", "p")
    ring.tell("t", Failed(lease="r.1", delivered=Usage(), retry=True))
    assert ring.messages("t")[0].waiting == {}
    assert ring.finish("t", "p.1") == ["r.2 own"]


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
