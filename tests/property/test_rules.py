"""All rules together, against what they may never do: break the window, keep a slot from the light,
lose a request, starve anybody."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from anser.core.events import (
    Cancelled,
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
    Why,
)
from anser.core.job import Job
from anser.core.ledger import Usage
from anser.core.prefix import Chain
from anser.core.rules import DESIGN, Rules
from anser.core.scheduler import Scheduler
from anser.core.slots import NodeSlots

MEMBERS = ("a", "a/p", "a/p/x", "a/p/y", "a/q", "b", "b/p/x", "b/q/x", "c/p/x", "anonymous/7")
MODELS = ("m1", "m2", "m3")
NODES = ("n1", "n2", "n3", "n4")
STEPS = 80


class Watched(Scheduler):
    """The real one, each start held against the window at each level."""

    def _start(self, job: Job, node: NodeSlots, why: Why) -> Start:
        pool = job.lane.pool
        lanes = [lane for lane in self._slots.waiting_for(node) if lane.pool is pool]
        for account, parent in job.account.path:
            least = parent.least(lanes)
            if least is not None:
                assert account.key_in(pool) <= least.key_in(pool) + self.rules.window
        if not self._picker.is_light(job, more=1):
            assert not self._picker.is_closed(node)
        return super()._start(job, node, why)


@dataclass
class World:
    """Any events, drawn from a seed."""

    draw: random.Random
    rules: Rules
    scheduler: Watched = field(init=False)
    now: float = 0.0
    asked: int = 0
    waiting_or_running: set[str] = field(default_factory=set)
    leases: list[str] = field(default_factory=list)
    running: dict[str, Start] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheduler = Watched(12, 3, self.rules)

    def handle(self, event: Event) -> None:
        """One thing happens."""
        self.now += self.draw.choice((0.01, 0.1, 70.0))
        for decision in self.scheduler.handle(event, self.now):
            if isinstance(decision, Start):
                self.leases.append(decision.lease.id)
                self.running[decision.lease.id] = decision
            elif isinstance(decision, Refused):
                self.waiting_or_running.discard(decision.request)
        self.scheduler.validate()
        assert set(self.scheduler._jobs) == self.waiting_or_running

    def submit(self) -> None:
        """A request, often of a prompt that was there before."""
        draw = self.draw
        chain: Chain = tuple(bytes((draw.randint(0, 2), n)) for n in range(draw.randint(0, 4)))
        self.asked += 1
        id = f"r{self.asked}"
        self.waiting_or_running.add(id)
        request = Request(
            id=id,
            member=draw.choice(MEMBERS),
            model=draw.choice(MODELS),
            prompt_tokens=draw.choice((5, 500, 50_000)),
            output_tokens_max=9,
            chain=chain,
            text_bytes=256 * len(chain) + draw.randint(0, 255),
            batch=draw.random() < 0.2,
            deadline=None if draw.random() < 0.8 else self.now + draw.random() * 100,
        )
        self.handle(Submitted(request=request))

    def end(self, lease: str) -> None:
        """A lease ends, in whatever way."""
        request = self.running.pop(lease).request
        cached = self.draw.randint(0, request.prompt_tokens)
        usage = Usage(
            prompt_tokens=request.prompt_tokens,
            cached_tokens=cached,
            completion_tokens=self.draw.randint(0, 50),
        )
        retry = self.draw.random() < 0.3
        if not retry or request.id in self.cancelled:
            self.waiting_or_running.discard(request.id)
        failed = Failed(lease=lease, delivered=Usage(), retry=True)
        self.handle(failed if retry else Finished(lease=lease, usage=usage))

    def step(self) -> None:
        """Something happens."""
        draw, what = self.draw, self.draw.random()
        if what < 0.4:
            self.submit()
        elif what < 0.55 and self.leases:
            self.handle(Progressed(lease=draw.choice(self.leases), tokens=draw.randint(0, 50)))
        elif what < 0.75 and self.running:
            self.end(draw.choice(list(self.running)))
        elif what < 0.8:
            id = f"r{draw.randint(0, self.asked)}"
            self.cancelled.add(id)
            if id not in {start.request.id for start in self.running.values()}:
                self.waiting_or_running.discard(id)
            self.handle(Cancelled(request=id))
        elif what < 0.9:
            models = frozenset(draw.sample(MODELS, draw.randint(0, 3)))
            self.handle(
                NodeChanged(node=draw.choice(NODES), slots=draw.randint(0, 12), models=models)
            )
        elif what < 0.95:
            self.handle(NodeGone(node=draw.choice(NODES)))
        else:
            self.handle(Weighed(member=draw.choice(MEMBERS), weight=draw.randint(1, 10_000)))

    def finish(self) -> None:
        """A node for everything: whatever waits is served, however long it takes."""
        self.handle(NodeChanged(node="n1", slots=1, models=frozenset(MODELS)))
        for _ in range(1_000):
            if not self.waiting_or_running:
                return
            for lease in list(self.running):
                self.handle(Progressed(lease=lease, tokens=1))
                if lease in self.running:
                    self.end(lease)
            self.handle(Weighed(member="nobody", weight=1))
        raise AssertionError(f"{self.waiting_or_running} starve: {self.scheduler}")


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize(
    "rules",
    [
        DESIGN,
        replace(DESIGN, window=0),
        replace(DESIGN, express=0.0, gate_s=1e9),
        replace(DESIGN, hold=False, patience_s=0.0),
    ],
    ids=["design", "window 0", "open", "no hold"],
)
def test_any_events(rules: Rules, seed: int) -> None:
    """No start is outside the window, no request is lost or answered twice, and nobody starves."""
    world = World(random.Random(seed), rules)
    for _ in range(STEPS):
        world.step()
    world.finish()
