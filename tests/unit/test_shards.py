"""Shards: the slots that they lend each other."""

from __future__ import annotations

from dataclasses import replace

from anser.core.events import (
    Cancelled,
    Failed,
    NodeChanged,
    NodeGone,
    Progressed,
)
from anser.core.gossip import UNHEARD_MAX, Call, Lent, Loan, Neighbour, Neighbours, Returned
from anser.core.ledger import Usage
from anser.core.rules import DESIGN, STRICT
from anser.core.sums import Row, Sums
from tests.ring import MODELS, Ring
from tests.scheduling import CREDIT

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
    ring = Ring("s", "t", rules=replace(STRICT, window=4_000 * CREDIT))
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
    ring.finish("s", "q.1", output=5_000)
    ring.node("s", "n", 0)
    for number in range(2 * UNHEARD_MAX):
        ring.submit("t", f"r{number}", "b")
    ring.talk()
    ring.silent = {"t"}
    ring.node("s", "n", UNHEARD_MAX + 1)
    assert ring.submit("s", "q2", "a") == []
    assert ring.submit("s", "q3", "a") == []
    assert ring.shards["s"].scheduler.queued == 2


def serve(ring: Ring, member: str) -> None:
    """Let this member be served a prompt at `s`, and wait there again."""
    ring.node("s", "n", 1)
    ring.submit("s", "q", member)
    ring.finish("s", "q.1")
    ring.node("s", "n", 0)
    ring.submit("s", "q2", member)


def test_a_slot_that_is_under_way_counts_as_used() -> None:
    """Who is lent one is charged for it in thought, until the borrower tells the charge."""
    ring = Ring("s", "t")
    ring.submit("t", "r", "b")
    ring.submit("t", "r2", "b")
    serve(ring, "a")
    ring.talk()
    assert ring.node("s", "n", 2) == ["q2.1 n"]
    assert ring.talk() == ["r.1 n"]


def test_two_shards_do_not_start_the_same_member_at_once() -> None:
    """A free slot is for who is least where it is that shard's turn to start it, else the next."""
    ring = Ring("s", "t", rules=replace(STRICT, window=4_000 * CREDIT, candidates=16))
    ring.node("s", "n", 1)
    for number, (member, output) in enumerate((("a", 0), ("a", 0), ("b", 10))):
        ring.submit("s", f"p{number}", member)
        ring.finish("s", f"p{number}.1", output=output)
    ring.node("s", "n", 0)
    for name in ring.shards:
        for member in ("a", "b"):
            ring.submit(name, f"{member}{name}", member)
    ring.talk()
    ring.node("t", "o", 0)
    assert ring.node("s", "n", 1) == ["as.1 n"], "two of its requests have started: the first's"
    assert ring.node("t", "o", 1) == ["bt.1 o"]


def test_the_turn_to_start_a_member_goes_round() -> None:
    """With each start it is another shard's of those where the member waits and that are there."""
    sums = Sums(10)
    neighbours = Neighbours("s", ["t", "u"], sums, lost_s=2.0)
    neighbours.now = 0.0
    for one in neighbours.all.values():
        one.heard_at = 0.0
    assert neighbours.starter("a") == "s", "who waits nowhere"
    sums.merge("t", [Row(account="a", turns=1)])
    assert neighbours.starter("a") == "t", "the only one where it waits"
    sums.turn("a", waits=True)
    assert neighbours.starter("a") == "s"
    sums.start("a")
    assert neighbours.starter("a") == "t"
    sums.merge("t", [Row(account="a", turns=1, started=1)])
    assert neighbours.starter("a") == "s"
    sums.start("a")
    assert neighbours.starter("a") == "t"
    neighbours.now = 3.0
    assert neighbours.starter("a") == "s", "the other is silent"


def test_a_call_of_who_has_not_the_turn_counts_as_after_its_start() -> None:
    """The least key that is called for is that of a shard which may start it now."""
    sums = Sums(10)
    neighbours = Neighbours("s", ["t", "u"], sums, lost_s=2.0)
    neighbours.now = 0.0
    sums.turn("a", waits=True)
    for name in ("t", "u"):
        sums.merge(name, [Row(account="a", turns=1)])
    for (name, one), key in zip(neighbours.all.items(), (0, 50), strict=True):
        call = Call(parent="", model="m", child="a", key=key, cost=100)
        one.heard_at, one.waiting, one.calls = 0.0, {"m": 1}, {"": {"m": call}}
        assert neighbours.starter("a") == "s", name
    assert neighbours.least("", ["m"]) == 100
    neighbours.all["u"].calls[""]["m"] = Call(parent="", model="m", child="b", key=120)
    assert neighbours.least("", ["m"]) == 100
    neighbours.all["u"].calls[""]["m"] = Call(parent="", model="m", child="b", key=50)
    assert neighbours.least("", ["m"]) == 50


def test_what_others_than_the_caller_served_counts() -> None:
    """A call is as old as its message; what has been served since is known without it."""
    ring = Ring("s", "t")
    ring.submit("t", "r", "b")
    serve(ring, "a")
    ring.talk()
    ring.submit("s", "r2", "b")
    assert ring.node("s", "n", 2) == ["r2.1 n", "q2.1 n"]


def test_a_slot_that_nobody_light_takes_says_nothing_of_the_others() -> None:
    """Only calls of light members count no more until the borrower calls again."""
    ring = Ring("s", "t")
    ring.submit("t", "r", "b")
    (calls,) = ring.messages("t")
    loan = Loan(number=1, node="n", models=MODELS, light=True)
    one = Neighbour(name="t", lent={1: Lent(loan=loan, told=0, costs={})})
    calls = replace(calls, light={"m": 1}, returned=(Returned(number=1, used=False),))
    assert one.hears(calls, ring.now)
    assert one.wants(["m"]) == 1
    assert one.calls[""]["m"].child == "b"
    assert one.wants(["m"], light=True) == 0


def test_who_is_light_is_judged_by_all_shards() -> None:
    """What a member has in flight elsewhere counts, and so do the slots there."""
    ring = Ring("s", "t", rules=replace(DESIGN, hold=False))
    ring.node("t", "n", 10)
    ring.submit("t", "c", "c")
    ring.talk()
    for number in range(3):
        ring.submit("s", f"q{number}", "a")
    assert ring.shards["s"].scheduler.waits_light("q2"), "of ten slots"
    for number in range(5):
        ring.submit("t", f"r{number}", "b")
    ring.talk()
    assert ring.submit("s", "p", "b") == []
    assert not ring.shards["s"].scheduler.waits_light("p"), "six in flight"


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
