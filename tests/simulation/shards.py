"""Several shards in one seeded world: nodes and shards fail, and the network does what it can.

Messages between shards are lost, doubled, late and out of order, and pairs of shards are cut off
from each other for a while. After each event no node may run more than it has slots, and each
request must be in one place; at the end, when the network is whole again, every request has had one
end, and all shards know the same sums, which are the price of what was reported.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from anser.core.events import (
    Abort,
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    Lease,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.fairness import price
from anser.core.gossip import Message
from anser.core.ledger import Usage
from anser.core.rules import DESIGN, STRICT
from anser.core.shards import Gossip, Shard

__all__ = ["ShardWorld", "simulate_shards"]

_MODELS = ("m", "k")
_MEMBERS = ("a", "a/p", "a/p/x", "a/p/y", "a/q/z", "b/p/x", "b", "anonymous/7", "anonymous/8")
_TICK_S = 0.05
_PROBE_S = 1.0
_QUIET_S = 8.0  # of a whole network at the end, at least
_LIFE_S = 2_000.0  # nobody may still wait then
_CHECK_EVERY = 10  # messages


@dataclass(eq=False)
class _Machine:
    """One node: what runs on it, whoever's it is."""

    id: str
    slots: int
    models: frozenset[str]
    up: bool = True
    running: dict[str, _Run] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """One lease at its machine."""

    lease: Lease
    request: Request
    home: str
    tokens: int
    written: int = 0
    aborted: bool = False
    over: bool = False

    def usage(self) -> Usage:
        prompt = self.request.prompt_tokens if self.written else 0
        return Usage(prompt_tokens=prompt, completion_tokens=self.written)


@dataclass
class ShardWorld:
    """What a seed makes."""

    seed: int
    now: float = 0.0
    story: list[str] = field(default_factory=list)
    shards: dict[str, Shard] = field(default_factory=dict)
    machines: dict[str, _Machine] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)  # shards
    homes: dict[str, str] = field(default_factory=dict)  # of requests
    ends: dict[str, str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    paid: dict[str, int] = field(default_factory=dict)  # micro-credits by shard that was told
    seen: set[str] = field(default_factory=set)  # what happened, for who asks whether it did
    messages: int = 0
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        draw = self.draw = random.Random(f"shards {self.seed}")
        names = [f"s{number}" for number in range(draw.choice((2, 2, 3, 3, 4, 5, 8)))]
        self.gossip = Gossip(
            every_s=draw.choice((0.1, 0.25, 0.25, 1.0)),
            lost_s=draw.choice((2.0, 4.0)),
            rows_max=draw.choice((3, 4_096)),
        )
        self.loss = draw.choice((0.0, 0.1, 0.5))
        self.late_s = draw.choice((0.01, 0.3, 3.0))
        self.span_s = draw.choice((3.0, 10.0))
        self.heals_at = self.span_s + 5.0
        self.cuts = [self._cut(names) for _ in range(draw.randint(0, 3))]
        rules = draw.choice((STRICT, DESIGN, DESIGN))
        queued_max = draw.choice((4, 1_000, 1_000))
        for name in names:
            others = [other for other in names if other != name]
            self.shards[name] = Shard(
                name, others, queued_max=queued_max, retries_max=3, rules=rules, gossip=self.gossip
            )
            self._at(draw.random() * _TICK_S, partial(self._tick, name))

    def run(self) -> None:
        """From the first request to the last, and until all is quiet."""
        self._plan()
        self._at(_PROBE_S, self._probe)
        quiet_from: float | None = None
        while quiet_from is None or self.now < quiet_from + self._quiet_s():
            self.now, _, action = heapq.heappop(self._heap)
            action()
            assert self.now < _LIFE_S, f"starved: {self._open()}"
            if quiet_from is None and self.now > self.heals_at and not self._open():
                quiet_from = self.now
        self._check_end()

    def _quiet_s(self) -> float:
        """How long a whole network is given to hear of all: each account has its turn twice."""
        accounts = max(len(shard.sums) for shard in self.shards.values())
        rounds = 2 * accounts / self.gossip.rows_max
        return max(_QUIET_S, rounds * self.gossip.every_s)

    def _plan(self) -> None:
        """Draw weights, machines, requests and mishaps."""
        draw = self.draw
        for member in _MEMBERS[:4]:
            weight = draw.choice((1_000, 2_000))
            for name in self.shards:
                self._tell(name, Weighed(member=member, weight=weight))
        for _ in range(draw.randint(0, 3)):
            event = Weighed(member=draw.choice(_MEMBERS), weight=draw.choice((500, 3_000)))
            for name in self.shards:  # each hears of it when it does
                self._at(draw.random() * self.span_s, partial(self._tell, name, event))
        self._machines()
        served = sorted({model for machine in self.machines.values() for model in machine.models})
        for number in range(draw.randint(10, 80)):
            self._at(draw.random() * self.span_s, partial(self._submit, f"r{number}", served))
        for _ in range(draw.randint(0, 4)):
            self._at(draw.random() * self.span_s, self._crash)
        if draw.random() < 0.3 and len(self.shards) > 2:
            self._at(draw.random() * self.span_s, self._vanish)

    def _machines(self) -> None:
        draw = self.draw
        for number in range(draw.randint(1, 5)):
            models = frozenset(draw.sample(_MODELS, draw.choice((1, 2, 2))))
            models |= {_MODELS[number]} if number < len(_MODELS) else frozenset()
            machine = _Machine(f"n{number}", draw.randint(1, 4), models)
            self.machines[machine.id] = machine
            self.owners[machine.id] = draw.choice(list(self.shards))
            self._list(machine)

    def tell(self, line: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.now:9.3f} {line}")

    def _at(self, when: float, action: Callable[[], None]) -> None:
        self._turn += 1
        heapq.heappush(self._heap, (when, self._turn, action))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(self.now + seconds, action)

    def _open(self) -> list[str]:
        return [request for request in self.homes if request not in self.ends]

    # Clients

    def _submit(self, id: str, models: list[str]) -> None:
        draw = self.draw
        living = [name for name in self.shards if name not in self.gone]
        home = self.homes[id] = draw.choice(living)
        member = self.members[id] = draw.choice(_MEMBERS)
        request = Request(
            id=id,
            member=member,
            model=draw.choice(models),
            prompt_tokens=draw.choice((1, 100, 3_000)),
            output_tokens_max=100,
            factor_milli=draw.choice((1_000, 333)),
            chain=tuple(bytes((member.encode()[-1], block)) for block in range(draw.randint(0, 4))),
            text_bytes=1_024,
        )
        self.tell(f"{id} of {member} comes to {home}")
        self._tell(home, Submitted(request=request))
        if draw.random() < 0.1:
            self._after(draw.random() * 2, partial(self._cancel, id))
        if draw.random() < 0.05 and id not in self.ends:
            self._tell(home, Submitted(request=request))  # the network repeats

    def _cancel(self, id: str) -> None:
        home = self.homes[id]
        if id not in self.ends and home not in self.gone:
            waits = not any(run.request.id == id for run in self._runs())
            self._tell(home, Cancelled(request=id))
            if waits:
                self._end(id, "cancelled while it waited")

    def _end(self, id: str, how: str) -> None:
        assert id not in self.ends, f"{id} ends twice: {self.ends[id]}, {how}"
        self.ends[id] = how
        self.seen.add(how)
        self.tell(f"{id} {how}")

    # Decisions

    def _tell(self, name: str, event: Event) -> None:
        if name not in self.gone:
            shard = self.shards[name]
            self._do(name, shard.handle(event, self.now))
            shard.validate()
            self._speak(name)

    def _do(self, name: str, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start():
                    self._start(name, decision)
                case Refused():
                    self._end(decision.request, f"refused: {decision.code}")
                case Abort():
                    run = next(run for run in self._runs() if run.lease.id == decision.lease)
                    run.aborted = True

    def _runs(self) -> list[_Run]:
        return [run for machine in self.machines.values() for run in machine.running.values()]

    def _start(self, name: str, start: Start) -> None:
        lease = start.lease
        machine = self.machines[lease.node]
        assert self.homes[lease.request] == name, "a request of another shard"
        assert lease.request not in self.ends, "it has ended"
        assert lease.request not in {run.request.id for run in self._runs()}, "it runs already"
        assert lease.model in machine.models
        run = _Run(lease, start.request, name, tokens=self.draw.randint(1, 20))
        machine.running[lease.id] = run
        assert len(machine.running) <= machine.slots, f"{machine.id} is overbooked"
        if self.owners[machine.id] != name:
            self.seen.add("a slot is lent")
        self.tell(f"{lease.id} of {name} on {machine.id}")
        fails = not machine.up or self.draw.random() < 0.1
        self._after(0.2, partial(self._fail if fails else self._write, machine, run))

    # Machines

    def _write(self, machine: _Machine, run: _Run) -> None:
        if run.over:
            return
        if run.written >= run.tokens or run.aborted:
            self._leave(machine, run)
            self._pay(run)
            self._tell(run.home, Finished(lease=run.lease.id, usage=run.usage()))
            self._end(run.request.id, "aborted" if run.aborted else "answered")
            return
        tokens = min(self.draw.randint(1, 8), run.tokens - run.written)
        run.written += tokens
        self._after(self.draw.choice((0.1, 0.2, 1.0)), partial(self._write, machine, run))
        self._tell(run.home, Progressed(lease=run.lease.id, tokens=tokens))

    def _fail(self, machine: _Machine, run: _Run) -> None:
        if run.over:
            return
        self._leave(machine, run)
        self._pay(run)
        retry = not run.written
        cancelled = run.aborted
        refused = len(self.ends)
        event = Failed(lease=run.lease.id, delivered=run.usage(), retry=retry)
        self._tell(run.home, event)
        if (not retry or cancelled) and len(self.ends) == refused:
            self._end(run.request.id, "broken off")

    def _leave(self, machine: _Machine, run: _Run) -> None:
        run.over = True
        del machine.running[run.lease.id]

    def _pay(self, run: _Run) -> None:
        usage = run.usage()
        self.paid[run.home] = self.paid.get(run.home, 0) + price(
            fresh=usage.prompt_tokens,
            output=usage.completion_tokens,
            factor_milli=run.request.factor_milli,
        )

    def _list(self, machine: _Machine) -> None:
        event = NodeChanged(node=machine.id, slots=machine.slots, models=machine.models)
        self._tell(self.owners[machine.id], event)

    def _crash(self) -> None:
        machine = self.draw.choice(list(self.machines.values()))
        if not machine.up or self.owners[machine.id] in self.gone:
            return
        self.tell(f"{machine.id} crashes")
        self.seen.add("a node crashes")
        machine.up = False
        for run in list(machine.running.values()):
            self._after(0.1 + self.draw.random(), partial(self._fail, machine, run))
        self._tell(self.owners[machine.id], NodeGone(node=machine.id))
        self._after(self.draw.choice((0.05, 2.0, 5.0)), partial(self._recover, machine))

    def _recover(self, machine: _Machine) -> None:
        self.tell(f"{machine.id} is back")
        machine.up = True
        self._list(machine)

    # Shards

    def _vanish(self) -> None:
        """A shard is gone with all that waited there; its streams end, so engines stop."""
        name = self.draw.choice([name for name in self.shards if name not in self.gone])
        self.tell(f"{name} vanishes")
        self.seen.add("a shard vanishes")
        self.gone.add(name)
        lost = [id for id, home in self.homes.items() if home == name and id not in self.ends]
        for machine in self.machines.values():
            for run in list(machine.running.values()):
                if run.home == name:
                    run.aborted = True  # its engine notices with its next token
                    lost.remove(run.request.id)
        for id in lost:
            self._end(id, "lost with its shard")

    def _probe(self) -> None:
        """Each node is asked what it runs, and one whose shard has gone is listed with another."""
        self._after(_PROBE_S, self._probe)
        for id, machine in self.machines.items():
            owner = self.owners[id]
            if not machine.up:
                continue
            if owner not in self.gone:
                running = len(machine.running)
                self._do(owner, self.shards[owner].reclaim(id, running=running, now=self.now))
            elif not machine.running and self._silent_s(owner) > 2 * self.gossip.lost_s:
                living = [name for name in self.shards if name not in self.gone]
                self.owners[id] = self.draw.choice(living)
                self.tell(f"{id} is listed with {self.owners[id]}")
                self._list(machine)

    def _silent_s(self, name: str) -> float:
        """For how long nobody has heard of it."""
        others = [shard for other, shard in self.shards.items() if other not in self.gone]
        heard = [shard._neighbours.all[name].heard_at for shard in others]
        return self.now - max(heard)

    # The network

    def _tick(self, name: str) -> None:
        if name not in self.gone:
            self._speak(name)
            self._after(_TICK_S, partial(self._tick, name))

    def _speak(self, name: str) -> None:
        for message in self.shards[name].speak(self.now):
            assert len(message.rows) <= self.gossip.rows_max
            self._send(message)

    def _send(self, message: Message) -> None:
        draw, late_s = self.draw, self.late_s
        copies = 1 + (draw.random() < self.loss / 2)
        if self.now >= self.heals_at:
            copies, late_s = 1, 0.01
        elif draw.random() < self.loss or self._is_cut(message):
            self.seen.add("a message is lost")
            return
        for _ in range(copies):
            self._after(draw.random() * late_s, partial(self._hear, message))

    def _hear(self, message: Message) -> None:
        if message.receiver in self.gone:
            return
        self.messages += 1
        shard = self.shards[message.receiver]
        self._do(message.receiver, shard.hear(message, self.now))
        if self.messages % _CHECK_EVERY == 0:
            shard.validate()
        self._speak(message.receiver)

    def _cut(self, names: list[str]) -> tuple[frozenset[str], float, float]:
        draw = self.draw
        begins = draw.random() * self.span_s
        return frozenset(draw.sample(names, 2)), begins, begins + draw.choice((1.0, 8.0))

    def _is_cut(self, message: Message) -> bool:
        pair = {message.sender, message.receiver}
        return any(pair == cut and a <= self.now < b for cut, a, b in self.cuts)

    # The end

    def _check_end(self) -> None:
        living = {name: shard for name, shard in self.shards.items() if name not in self.gone}
        for name, shard in living.items():
            shard.validate()
            assert (shard.scheduler.queued, shard.scheduler.running) == (0, 0), shard
            assert shard.sums.own("") == 0
            tops = {account for account in shard.sums.totals() if account and "/" not in account}
            assert sum(map(shard.sums.own, tops)) == self.paid.get(name, 0)
            known = {
                account: [(other, self._row(shard, account, other)) for other in living]
                for account in shard.sums.totals()
            }
            for other in living.values():
                for account, rows in known.items():
                    assert rows == [(one, self._row(other, account, one)) for one in living]
                if not self.gone:
                    assert shard.sums.totals() == other.sums.totals()
                    assert all(shard.sums.key(one) == other.sums.key(one) for one in known)
            lent = [one.lent for one in shard._neighbours.all.values()]
            assert not any(lent), f"{name} still lends {lent}"

    def _row(self, shard: Shard, account: str, writer: str) -> tuple[int, ...]:
        """What `shard` knows of what `writer` has charged."""
        entry = shard.sums._entries.get(account)
        if entry is None:
            return (0,) * 5  # only one that has vanished has charged it, and told others
        row = entry.own() if shard.name == writer else entry.rows.get(writer)
        return (row.charged, row.refunded, row.raised, row.lowered, row.turns) if row else (0,) * 5


def simulate_shards(seed: int) -> ShardWorld:
    """Live through the world of this seed. Raises AssertionError where an invariant is broken."""
    world = ShardWorld(seed)
    world.run()
    return world
