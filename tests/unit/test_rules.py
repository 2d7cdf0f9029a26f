"""The rules beyond the least key: locality, light members, held requests, deadlines, throttling."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from anser.core.events import (
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Rule,
    Start,
    Submitted,
    Weighed,
)
from anser.core.ledger import Usage
from anser.core.prefix import BLOCK_BYTES, Chain
from anser.core.rules import DESIGN, STRICT, Rules
from anser.core.scheduler import Scheduler

NO_LIGHT = replace(DESIGN, light_first=False, hold=False)


class Pool:
    """A scheduler, a clock, and short words for what happens."""

    def __init__(self, rules: Rules = DESIGN, *, queued_max: int = 100) -> None:
        self.scheduler = Scheduler(queued_max, 3, rules)
        self.now = 0.0
        self.starts: dict[str, Start] = {}

    def handle(self, event: Event, after_s: float = 0.001) -> list[str]:
        """What starts, as "request node", or is refused, as "request code"."""
        self.now += after_s
        decisions: list[Decision] = self.scheduler.handle(event, self.now)
        self.scheduler.validate()
        told: list[str] = []
        for decision in decisions:
            if isinstance(decision, Start):
                self.starts[decision.request.id] = decision
                told.append(f"{decision.request.id} {decision.lease.node}")
            elif isinstance(decision, Refused):
                told.append(f"{decision.request} {decision.code}")
        return told

    def node(self, name: str, slots: int, *models: str) -> list[str]:
        """A node changes."""
        served = frozenset(models or ("m",))
        return self.handle(NodeChanged(node=name, slots=slots, models=served))

    def ask(
        self,
        id: str,
        member: str = "heavy",
        *,
        chain: Chain = (),
        prompt: int = 100,
        deadline: float | None = None,
        batch: bool = False,
    ) -> list[str]:
        """A request arrives; `chain` is all of its prompt."""
        request = Request(
            id=id,
            member=member,
            model="m",
            prompt_tokens=prompt,
            output_tokens_max=100,
            chain=chain,
            text_bytes=len(chain) * BLOCK_BYTES,
            deadline=deadline,
            batch=batch,
        )
        return self.handle(Submitted(request=request))

    def first(self, id: str, after_s: float = 0.1) -> list[str]:
        """The first token of a request comes."""
        return self.handle(Progressed(lease=self.starts[id].lease.id, tokens=1), after_s)

    def end(self, id: str, *, cached: int = 0, after_s: float = 0.1) -> list[str]:
        """A request ends after ten tokens."""
        start = self.starts[id]
        usage = Usage(
            prompt_tokens=start.request.prompt_tokens, cached_tokens=cached, completion_tokens=10
        )
        return self.handle(Finished(lease=start.lease.id, usage=usage), after_s)

    def why(self, id: str) -> Rule:
        """By which rule it was started."""
        return self.starts[id].why.rule


def names(word: str, blocks: int = 8) -> Chain:
    """The chain of a prompt that shares nothing with others."""
    return tuple(f"{word}{number}".encode() for number in range(blocks))


# Locality


def test_an_engine_that_keeps_nothing_has_no_beginnings() -> None:
    """What an engine tells of its cache is as much as is expected there."""
    pool = Pool()
    models = frozenset(("m",))
    for node, slots, cache_tokens in (("n1", 4, 0), ("n2", 4, 8 * 64), ("n1", 0, 64)):
        change = NodeChanged(node=node, slots=slots, models=models, cache_tokens=cache_tokens)
        pool.handle(change)
    (first,) = pool.ask("r1", chain=names("a"), prompt=800)
    pool.end("r1")
    (second,) = pool.ask("r2", chain=names("a"), prompt=800)
    assert (first, second) == ("r1 n2", "r2 n2")
    assert pool.starts["r2"].why.cached_tokens == 800
    pool.handle(NodeChanged(node="n2", slots=4, models=models, cache_tokens=0))
    pool.ask("r3", chain=names("a"), prompt=800)
    assert pool.starts["r3"].why.cached_tokens == 0


def test_a_request_goes_where_its_beginning_is() -> None:
    """Of free slots, the one on the node that has read the prompt before."""
    pool = Pool()
    pool.node("n1", 4)
    pool.node("n2", 4)
    (first,) = pool.ask("r1", chain=names("a"), prompt=8_000)
    home = first.split()[1]
    pool.first("r1")
    pool.end("r1")
    for number in range(3):
        assert pool.ask(f"again{number}", chain=names("a"), prompt=8_000)[0].endswith(home)
    assert pool.starts["again2"].why.cached_tokens == 8_000


def test_a_cached_prompt_is_charged_as_cached() -> None:
    """What is expected in the node's cache costs a tenth from the start."""
    pool = Pool()
    pool.node("n1", 4)
    pool.ask("r1", "a", chain=names("x"), prompt=800)
    pool.ask("r2", "b", chain=names("x"), prompt=800)
    service = {row.member: row.service for row in pool.scheduler.standings()}
    assert service == {"a": 800_000_000, "b": 80_000_000}


def test_a_freed_slot_takes_what_gains_most_there() -> None:
    """Any request of any member in the window counts, not only the oldest of the first."""
    pool = Pool(NO_LIGHT)
    pool.node("n1", 1)
    pool.ask("r1", "a", chain=names("a"), prompt=800)
    pool.ask("r2", "b", chain=names("b"), prompt=800)
    pool.ask("r3", "c", chain=names("c"), prompt=800)
    pool.ask("r4", "c", chain=(*names("a"), b"more"), prompt=900)
    assert pool.end("r1") == ["r4 n1"]
    assert pool.why("r4") is Rule.NEAREST
    assert pool.end("r4") == ["r2 n1"]
    assert pool.why("r2") is Rule.LEAST


def test_the_window_bounds_what_locality_may_cost() -> None:
    """A member too far ahead waits, however much of its prompt the node has."""
    pool = Pool(replace(NO_LIGHT, window=1_000_000_000))
    pool.node("n1", 1)
    pool.ask("r1", "a", chain=names("a"))
    pool.ask("r2", "a", chain=names("a"))
    pool.ask("r3", "b", chain=names("b"))
    pool.handle(Progressed(lease=pool.starts["r1"].lease.id, tokens=300))
    usage = Usage(prompt_tokens=100, completion_tokens=300)
    assert pool.handle(Finished(lease=pool.starts["r1"].lease.id, usage=usage)) == ["r3 n1"]


def test_a_request_that_waited_long_goes_before_its_members_others() -> None:
    """Locality inside a member's queue has its end: nobody is passed for ever."""
    pool = Pool(replace(NO_LIGHT, passed_max=2))
    pool.node("n1", 1)
    pool.ask("r1", chain=names("a"))
    pool.ask("old", chain=names("b"))
    for number in range(2, 6):
        pool.ask(f"r{number}", chain=names("a"))
    assert pool.end("r1", after_s=40.0) == ["r2 n1"]
    assert pool.end("r2") == ["r3 n1"]
    assert pool.end("r3") == ["old n1"]


def test_a_request_that_was_passed_often_waits_until_it_has_waited_long() -> None:
    """While nobody waits long, the order inside a member's queue is free."""
    pool = Pool(replace(NO_LIGHT, passed_max=1))
    pool.node("n1", 1)
    pool.ask("r1", chain=names("a"))
    pool.ask("old", chain=names("b"))
    for number in range(2, 5):
        pool.ask(f"r{number}", chain=names("a"))
    assert pool.end("r1") == ["r2 n1"]
    assert pool.end("r2") == ["r3 n1"]


def test_a_request_is_put_back_before_its_members_others() -> None:
    """What a node has failed goes first, wherever its beginning is."""
    pool = Pool(NO_LIGHT)
    pool.node("n1", 1)
    pool.ask("r1", chain=names("a"))
    pool.ask("r2", chain=names("a"))
    lease = pool.starts["r1"].lease.id
    assert pool.handle(Failed(lease=lease, delivered=Usage(), retry=True)) == ["r1 n1"]


def test_a_node_that_goes_has_no_cache() -> None:
    """It is not waited for, and its blocks are forgotten."""
    pool = Pool()
    pool.node("n1", 1)
    pool.ask("r1", chain=names("a"), prompt=8_000)
    pool.first("r1")
    pool.end("r1")
    pool.handle(NodeGone(node="n1"))
    pool.node("n2", 2)
    assert pool.ask("r2", chain=names("a"), prompt=8_000) == ["r2 n2"]
    assert pool.starts["r2"].why.cached_tokens == 0


def test_a_free_slot_is_chosen_by_the_least_estimated_finish() -> None:
    """A node known to be slow is not taken while a fast one has a slot."""
    pool = Pool()
    pool.node("slow", 2)
    pool.ask("r1", prompt=100)
    pool.first("r1", after_s=1.0)
    pool.end("r1", after_s=10.0)
    pool.node("fast", 2)
    assert [pool.ask(f"s{n}")[0].split()[1] for n in range(2)] == ["fast", "fast"]


# Light members


def flood(pool: Pool, count: int, member: str = "heavy") -> None:
    """So many requests of one member."""
    for number in range(count):
        pool.ask(f"{member}-{number}", member, prompt=1)


def test_a_light_member_finds_a_slot() -> None:
    """A tenth of a node's slots, and at least one, is for those within their share."""
    pool = Pool()
    pool.node("n1", 10)
    pool.ask("hello", "light")
    flood(pool, 30)
    assert pool.scheduler.running == 9
    assert pool.ask("world", "light2") == ["world n1"]
    assert pool.why("world") is Rule.LIGHT


def test_a_light_member_goes_first() -> None:
    """Of those who wait, whoever has no more in flight than its share has the next slot."""
    pool = Pool()
    pool.node("n1", 2)
    pool.ask("early", "light")
    flood(pool, 10)
    pool.ask("a", "light2")
    pool.ask("b", "light3")
    assert pool.end("early") == ["a n1"]
    assert pool.why("a") is Rule.LIGHT


def test_who_is_alone_may_fill_everything() -> None:
    """Slots are kept for others only while there are any, or were half a minute ago."""
    pool = Pool()
    pool.node("n1", 10)
    for number in range(15):
        pool.ask(f"long-{number}", prompt=5_000)
    assert pool.scheduler.running == 10
    for number in range(5):
        pool.end(f"long-{number}")
    assert pool.scheduler.running == 10
    other = Pool()
    other.node("n1", 10)
    other.ask("hello", "light")
    other.first("hello")
    other.end("hello")
    flood(other, 15)
    assert other.scheduler.running == 9
    other.handle(Weighed(member="nobody", weight=1), after_s=31.0)
    assert other.scheduler.running == 10


def test_a_single_slot_is_kept_for_nobody() -> None:
    """A node with one slot works for whoever wants it."""
    pool = Pool()
    pool.node("n1", 1)
    pool.ask("hello", "light")
    pool.end("hello")
    flood(pool, 3)
    assert pool.scheduler.running == 1


def test_long_prompts_of_the_heavy_are_let_in_one_by_one() -> None:
    """A node that would read for more than a quarter of a second takes no more of them."""
    pool = Pool(replace(DESIGN, express=0.0))
    pool.node("n1", 8)
    pool.ask("hello", "light")
    started = [pool.ask(f"h{number}", prompt=900) for number in range(1, 7)]
    assert started[4:] == [["h5 n1"], []]  # four are within its share, one makes it much
    assert pool.ask("world", "light2") == ["world n1"]
    assert pool.first("h5") == ["h6 n1"]


def test_nobody_is_light_where_the_rule_is_off() -> None:
    """Without it, only keys decide."""
    pool = Pool(STRICT)
    pool.node("n1", 2)
    pool.ask("hello", "light")
    flood(pool, 5)
    assert pool.scheduler.running == 2


def test_a_member_that_becomes_light_is_looked_at_again() -> None:
    """What closes a slot to somebody changes elsewhere; it is noticed within a quarter second."""
    pool = Pool()
    pool.node("n1", 4)
    pool.node("n2", 4)
    pool.ask("hello", "light")
    flood(pool, 8)
    assert pool.scheduler.queued > 0
    waiting = pool.scheduler.queued
    for id in ("heavy-0", "heavy-1", "heavy-2", "heavy-3"):
        if id in pool.starts:
            pool.end(id)
    pool.handle(Weighed(member="nobody", weight=1), after_s=1.0)
    assert pool.scheduler.queued < waiting


# Held requests


def test_a_light_request_waits_for_its_beginning_while_that_saves() -> None:
    """Ski rental: as long as reading it again would take, and others take the slot meanwhile."""
    pool = Pool()
    pool.node("home", 1)
    pool.ask("r0", "x", chain=names("a"), prompt=1_000)
    pool.first("r0", after_s=1.0)
    pool.end("r0", after_s=0.1)
    assert pool.ask("busy", "y", chain=names("a"), prompt=1_000) == ["busy home"]
    pool.node("other", 1)
    assert pool.ask("held", "x", chain=names("a"), prompt=10_000) == []
    assert pool.ask("any", "z") == ["any other"]
    assert pool.end("busy", cached=1_000) == ["held home"]


def test_a_held_request_goes_elsewhere_when_its_time_is_over() -> None:
    """It never waits longer than its beginning saves."""
    pool = Pool()
    pool.node("home", 1)
    pool.ask("r0", "x", chain=names("a"), prompt=1_000)
    pool.first("r0", after_s=1.0)
    pool.end("r0", after_s=0.1)
    pool.ask("busy", "y", chain=names("a"), prompt=1_000)
    pool.node("other", 1)
    assert pool.ask("held", "x", chain=names("a"), prompt=10_000) == []
    assert pool.first("busy", after_s=60.0) == ["held other"]


def test_a_held_request_that_is_gone_is_not_placed() -> None:
    """Its client has left, or its home has taken it."""
    pool = Pool()
    pool.node("home", 1)
    pool.ask("r0", "x", chain=names("a"), prompt=1_000)
    pool.first("r0", after_s=1.0)
    pool.end("r0", after_s=0.1)
    pool.ask("busy", "y", chain=names("a"), prompt=1_000)
    pool.node("other", 1)
    pool.ask("held", "x", chain=names("a"), prompt=10_000)
    assert pool.end("busy") == ["held home"]
    assert pool.first("held", after_s=60.0) == []


# Deadlines


def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    """With the time that it would have waited, computed from the queue."""
    pool = Pool()
    pool.node("n1", 1)
    pool.ask("r1")
    pool.first("r1")
    pool.end("r1", after_s=2.0)
    pool.ask("r2")
    assert pool.ask("soon", deadline=pool.now + 1.0) == ["soon deadline"]
    assert pool.ask("later", deadline=pool.now + 60.0) == []
    assert pool.scheduler.wait_s("heavy", "m") == pytest.approx(4.2, abs=0.1)


def test_a_free_slot_meets_every_deadline() -> None:
    """Who does not wait is not refused."""
    pool = Pool()
    pool.node("n1", 1)
    assert pool.scheduler.wait_s("heavy", "m") == 0.0
    assert pool.ask("r1", deadline=pool.now) == ["r1 n1"]


def test_without_a_node_nothing_is_known() -> None:
    """A model that nobody serves now keeps everybody waiting for a time that nobody knows."""
    pool = Pool(queued_max=1)
    assert pool.scheduler.wait_s("heavy", "m") == inf
    assert pool.ask("never", deadline=pool.now + 1e9) == ["never deadline"]
    assert pool.ask("r1") == []


# A queue that is full


def test_a_full_queue_loses_what_waits_longest_for_its_member() -> None:
    """Who floods is cut, not who comes last; and the newest goes first."""
    pool = Pool(queued_max=3)
    pool.node("n1", 1)
    pool.ask("running", "x")
    flood(pool, 3)
    assert pool.ask("r1", "light") == ["heavy-2 overloaded"]
    assert pool.ask("heavy-9") == ["heavy-9 overloaded"]
    assert pool.ask("r2", "light2") == ["heavy-1 overloaded"]


def test_longest_is_for_its_weight() -> None:
    """A member of twice the weight may have twice as much waiting."""
    pool = Pool(queued_max=4)
    pool.handle(Weighed(member="big", weight=2_000))
    pool.node("n1", 1)
    pool.ask("running", "x")
    flood(pool, 2, "big")
    flood(pool, 2, "small")
    assert pool.ask("r1", "light") == ["small-1 overloaded"]


# Throttling


def test_a_node_that_claims_more_than_it_keeps_is_throttled() -> None:
    """First tokens that come far too late say that it queues inside: it gets fewer leases."""
    pool = Pool(replace(DESIGN, light_first=False))
    pool.node("n1", 12)
    pool.ask("r0", prompt=1_000)
    pool.first("r0", after_s=1.0)
    for number in range(1, 12):
        pool.ask(f"r{number}")
    pool.first("r1", after_s=60.0)
    pool.ask("more")
    pool.end("r0")
    assert "more" not in pool.starts


# The batch band


def test_batch_takes_what_others_leave() -> None:
    """Nobody who wants an answer now waits for a batch, but for a twentieth of the service."""
    pool = Pool(STRICT)
    pool.node("n1", 1)
    served = {True: 0, False: 0}
    running = "r0"
    pool.ask(running, "now")
    for number in range(1, 400):
        pool.ask(f"r{number}", "now")
        pool.ask(f"b{number}", "batch", batch=True)
        (started,) = pool.end(running)
        running = started.split()[0]
        served[running.startswith("b")] += 1
    assert 0.03 <= served[True] / 399 <= 0.08


def test_batch_has_all_while_nobody_else_waits() -> None:
    """Idle slots are not kept from it."""
    pool = Pool()
    pool.node("n1", 2)
    assert pool.ask("b1", batch=True) == ["b1 n1"]
    assert pool.ask("b2", batch=True) == ["b2 n1"]
    pool.ask("b3", batch=True)
    assert pool.end("b1") == ["b3 n1"]


def test_who_waits_with_batches_holds_no_newcomer_back() -> None:
    """Members are compared within their band: a batch that waits for ever pins no level."""
    pool = Pool(replace(STRICT, batch_share=0.0))
    pool.node("n1", 1)
    pool.ask("r0", "a")
    pool.ask("b0", "patient", batch=True)
    running, served = "r0", {"a": 0, "b": 0}
    for number in range(1, 200):
        pool.ask(f"a{number}", "a")
        if number >= 100:
            pool.ask(f"b-{number}", "b")
        (started,) = pool.end(running)
        running = started.split()[0]
        served[running[0]] += number >= 100
    assert abs(served["a"] - served["b"]) <= 4
