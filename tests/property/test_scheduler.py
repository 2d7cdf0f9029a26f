"""The scheduler against its oracle, and against the fairness that it promises."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
from anser.core.ledger import Usage
from anser.core.rules import STRICT
from anser.core.scheduler import Scheduler
from tests.property.oracle import Oracle

MEMBERS = (
    "a",
    "a/p",
    "a/p/x",
    "a/p/y",
    "a/q",
    "b",
    "b/p/x",
    "b/q/x",
    "c/p/x",
    "anonymous/bucket-7",
)
WEIGHED = ("a", "a/p", "a/p/x", "b", "b/p", "c", "anonymous", "never/seen")
MODELS = ("m1", "m2", "m3")
NODES = ("n1", "n2", "n3", "n4")

tokens = st.integers(0, 500)
model_sets = st.frozensets(st.sampled_from(MODELS), max_size=3)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Any usage that an engine may report, whatever was expected."""
    prompt = draw(tokens)
    cached = draw(st.integers(0, prompt))
    return Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=draw(tokens))


class Pool(RuleBasedStateMachine):
    """Any events in any order, also late, repeated and senseless ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(12, 3, STRICT)
        self.oracle = Oracle(queued_max=12, retries_max=3)
        self.now = 0.0
        self.submitted: set[str] = set()
        self.leases: list[str] = []  # all that ever were
        self.ends: Counter[str] = Counter()  # by request

    def handle(self, event: Event) -> list[Decision]:
        """Give the event to both, and note what left."""
        self.now += 0.1
        before = set(self.oracle.jobs)
        decisions = self.scheduler.handle(event, self.now)
        self.oracle.check(event, decisions, self.now)
        self.ends.update(before - set(self.oracle.jobs))
        refused = [d.request for d in decisions if isinstance(d, Refused)]
        self.ends.update(id for id in refused if id not in before)
        self.leases += [d.lease.id for d in decisions if isinstance(d, Start)]
        return decisions

    @rule(
        member=st.sampled_from(MEMBERS),
        model=st.sampled_from(MODELS),
        prompt=tokens,
        factor=st.sampled_from((1, 333, 1_000, 70_000)),
    )
    def submit(self, member: str, model: str, prompt: int, factor: int) -> None:
        """A request arrives."""
        id = f"r{len(self.submitted)}"
        self.submitted.add(id)
        request = Request(
            id=id,
            member=member,
            model=model,
            prompt_tokens=prompt,
            output_tokens_max=9,
            factor_milli=factor,
        )
        self.handle(Submitted(request=request))

    @precondition(lambda self: self.oracle.jobs)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        """The network repeats a request."""
        job = self.oracle.jobs[data.draw(st.sampled_from(sorted(self.oracle.jobs)))]
        self.handle(Submitted(request=job.request))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), amount=tokens)
    def progress(self, data: st.DataObject, amount: int) -> None:
        """A lease, perhaps an ended one, produces tokens."""
        self.handle(Progressed(lease=data.draw(st.sampled_from(self.leases)), tokens=amount))

    @precondition(lambda self: self.oracle.running())
    @rule(data=st.data(), usage=usages())
    def finish(self, data: st.DataObject, usage: Usage) -> None:
        """A lease ends."""
        lease = data.draw(st.sampled_from([job.lease for job in self.oracle.running()]))
        self.handle(Finished(lease=lease, usage=usage))

    @precondition(lambda self: self.oracle.running())
    @rule(data=st.data(), delivered=usages(), retry=st.booleans())
    def fail(self, data: st.DataObject, delivered: Usage, retry: bool) -> None:
        """A lease fails, before or after its first token."""
        lease = data.draw(st.sampled_from([job.lease for job in self.oracle.running()]))
        used = Usage() if retry else delivered
        self.handle(Failed(lease=lease, delivered=used, retry=retry))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), usage=usages(), failed=st.booleans())
    def end_late(self, data: st.DataObject, usage: Usage, failed: bool) -> None:
        """Any lease, most likely one that has ended long ago, ends."""
        lease = data.draw(st.sampled_from(self.leases))
        end = Failed(lease=lease, delivered=usage, retry=True) if failed else None
        self.handle(end or Finished(lease=lease, usage=usage))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves, perhaps twice, perhaps too late."""
        self.handle(Cancelled(request=data.draw(st.sampled_from(sorted(self.submitted)))))

    @rule(node=st.sampled_from(NODES), slots=st.integers(0, 4), models=model_sets)
    def change_node(self, node: str, slots: int, models: frozenset[str]) -> None:
        """A node comes, grows, shrinks, drains or serves something else."""
        self.handle(NodeChanged(node=node, slots=slots, models=models))

    @rule(node=st.sampled_from(NODES))
    def lose_node(self, node: str) -> None:
        """A node is lost; its leases may be reported later, or never."""
        self.handle(NodeGone(node=node))

    @rule(member=st.sampled_from(WEIGHED), weight=st.integers(1, 10_000))
    def weigh(self, member: str, weight: int) -> None:
        """A member's weight changes."""
        self.handle(Weighed(member=member, weight=weight))

    @rule()
    def babble(self) -> None:
        """Events about what never was."""
        self.handle(Cancelled(request="nobody"))
        self.handle(Finished(lease="nobody.1", usage=Usage()))
        self.handle(Failed(lease="nobody.1", delivered=Usage(), retry=True))
        self.handle(Progressed(lease="nobody.1", tokens=1))

    @invariant()
    def consistent(self) -> None:
        """Its own invariants hold, no slot is overbooked, and the counts are true."""
        self.scheduler.validate()
        assert self.scheduler.dropped == self.oracle.dropped
        assert self.scheduler.queued == len(self.oracle.waiting())
        assert self.scheduler.running == len(self.oracle.running())
        for node in NODES:
            assert self.scheduler.running_on(node) == sum(
                job.node == node for job in self.oracle.running()
            )

    @invariant()
    def answered_once(self) -> None:
        """No request is lost, and none is answered twice."""
        assert set(self.ends) | set(self.oracle.jobs) == self.submitted
        assert not set(self.ends) & set(self.oracle.jobs)
        assert all(count == 1 for count in self.ends.values())

    @invariant()
    def books_agree(self) -> None:
        """Each key and each service is what the rules say, and only who may be is forgotten."""
        self.oracle.compare(self.scheduler)

    def teardown(self) -> None:
        """Nobody starves: once every model has a node, all that waits is started and ends."""
        self.handle(NodeChanged(node="n1", slots=1, models=frozenset(MODELS)))
        while self.oracle.jobs:
            usage = Usage(prompt_tokens=10, completion_tokens=10)
            self.handle(Finished(lease=self.oracle.running()[0].lease, usage=usage))
        self.consistent()
        self.answered_once()
        self.books_agree()


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestPool = Pool.TestCase
