"""What a decision costs: CPU time of the scheduler alone, and memory of those who do nothing.

*Queued*: all slots are taken and everybody waits; a request comes and a lease ends, so one request
is submitted, picked, dispatched and finished. *Free*: nobody waits and slots are free; a request
starts as it comes, and ends. CPU time of this process, the best of several batches, so that what
else the machine does counts little. Prompts are of 60 blocks, half of them shared with others.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from time import process_time

from anser.core.events import Event, Finished, NodeChanged, Progressed, Request, Start, Submitted
from anser.core.ledger import Usage
from anser.core.prefix import Chain
from anser.core.scheduler import Scheduler
from bench.policies import Anser
from bench.rows import Options, Row, at_most, figure

__all__ = ["EXPERIMENTS", "measure"]

EXPERIMENTS: Mapping[str, object] = {}
"""It is one."""

_MODELS = frozenset(("m",))
_SLOTS = 8
_BLOCKS = 60
_BATCHES = 5
_WAITING_MAX = 100_000  # at once; other members have an account and wait for nothing


@dataclass(slots=True)
class _Pool:
    """A scheduler at work, and which of its leases ends next."""

    members: int
    nodes: int
    organisations: int = 20
    blocks: int = _BLOCKS
    policy: Scheduler = field(default_factory=Anser)
    leases: list[Start] = field(default_factory=list[Start])
    unread: list[Start] = field(default_factory=list[Start])
    now: float = 0.0
    step_s: float = 0.001  # from one event to the next
    numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        for number in range(self.nodes):
            self.tell(NodeChanged(node=f"n{number}", slots=_SLOTS, models=_MODELS))

    def tell(self, event: Event) -> None:
        """One thing happens."""
        self.now += self.step_s
        for decision in self.policy.handle(event, self.now):
            if isinstance(decision, Start):
                self.leases.append(decision)
                self.unread.append(decision)

    def read(self) -> None:
        """What has started has its first token, or its node would be closed to more of its kind."""
        while self.unread:
            self.tell(Progressed(lease=self.unread.pop().lease.id, tokens=1))

    def request(self, member: int) -> Request:
        """The member's next request."""
        number = next(self.numbers)
        organisation = member % self.organisations
        return Request(
            id=str(number),
            member=f"o{organisation}/p{member % 7}/m{member}",
            model="m",
            prompt_tokens=64 * self.blocks + 30,
            output_tokens_max=500,
            chain=self.chain(member, number),
            text_bytes=256 * self.blocks + 120,
        )

    def chain(self, member: int, number: int) -> Chain:
        """Half of it is the member's own beginning, the rest is new."""
        half = self.blocks // 2
        old = [(member << 20 | place).to_bytes(8, "big") for place in range(half)]
        new = [(number << 20 | 1 << 19 | place).to_bytes(8, "big") for place in range(half)]
        return (*old, *new)

    def finished(self, start: Start) -> Finished:
        """The end of a lease."""
        tokens = start.request.prompt_tokens
        usage = Usage(prompt_tokens=tokens, cached_tokens=0, completion_tokens=200)
        return Finished(lease=start.lease.id, usage=usage)

    def crowd(self) -> None:
        """The slots are taken, all but those that wait for the light, and every member waits."""
        waiting = min(self.members, _WAITING_MAX)
        for number in range(self.nodes * _SLOTS + 2 * waiting):
            if self.policy.queued >= waiting:
                break
            self.tell(Submitted(request=self.request(number % self.members)))
            self.read()

    def serve(self, members: range) -> None:
        """Each of them has one answer, one after the other."""
        for member in members:
            self.tell(Submitted(request=self.request(member)))
            self.tell(self.finished(self.leases.pop()))
            self.unread.clear()

    def us(self, events: int) -> float:
        """Microseconds of CPU for a request that comes and a lease that ends."""
        best = float("inf")
        for _ in range(_BATCHES):
            spent = 0.0
            for number in range(events):
                request = self.request(number * 7_919 % self.members)
                finished = self.finished(self.leases.pop(len(self.leases) // 2))
                begun = process_time()
                self.tell(Submitted(request=request))
                self.tell(finished)
                spent += process_time() - begun
                self.read()
            best = min(best, spent)
        return best / events * 1e6

    def free_us(self, events: int) -> tuple[float, float]:
        """Microseconds for a request that starts as it comes, and for its end."""
        start, end = float("inf"), float("inf")
        events = min(events, self.nodes * _SLOTS // 2)
        for _ in range(_BATCHES):
            asked = [self.request(n * 7_919 % self.members) for n in range(events)]
            begun = process_time()
            for request in asked:
                self.tell(Submitted(request=request))
            started = process_time()
            while self.leases:
                self.tell(self.finished(self.leases.pop()))
            ended = process_time()
            start, end = min(start, started - begun), min(end, ended - started)
        return start / events * 1e6, end / events * 1e6

    def tokens_us(self, events: int) -> float:
        """Microseconds of CPU for tokens of a lease that runs."""
        lease = self.leases[0].lease.id
        self.tell(Progressed(lease=lease, tokens=1))
        begun = process_time()
        for _ in range(events):
            self.tell(Progressed(lease=lease, tokens=5))
        return (process_time() - begun) / events * 1e6


def _crowded(members: int, nodes: int, events: int) -> _Pool:
    gc.collect()
    pool = _Pool(members, nodes)
    pool.crowd()
    gc.freeze()  # what a process that runs for days has behind it
    pool.us(events // 4 or 1)
    return pool


def _idle_bytes(members: int) -> tuple[float, float]:
    """Bytes for a member that was served a moment ago, and for one that was long ago."""
    pool = _Pool(members, nodes=64, blocks=0, step_s=0.0)  # all of them a moment ago
    pool.serve(range(1_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pool.serve(range(1_000, members))
        gc.collect()
        soon = tracemalloc.get_traced_memory()[0] - before
        pool.now += 3_600
        pool.serve(range(200))
        gc.collect()
        late = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return soon / (members - 1_000), late / (members - 1_000)


def measure(options: Options, experiment: str | None = None) -> list[Row]:
    """All figures: the two with targets first, then how they grow."""
    del experiment
    events = 50 if options.quick else 2_000
    members, nodes = (200, 8) if options.quick else (10_000, 64)
    options.tell(f"queued: {members} members, {nodes} nodes")
    pool = _crowded(members, nodes, events)
    rows = [
        at_most("queued decision", pool.us(events), "us", 250),
        figure("tokens of a lease", pool.tokens_us(events), "us"),
    ]
    for label, blocks in (("free slot", 0), (f"free slot, {_BLOCKS} blocks", _BLOCKS)):
        options.tell(label)
        free = _Pool(members, nodes, blocks=blocks)
        free.free_us(events)
        start, end = free.free_us(events)
        rows.append(figure(label, start, "us") if blocks else at_most(label, start, "us", 15))
        rows.append(figure(f"{label}, its end", end, "us"))
    for number in (100, 200) if options.quick else (100, 1_000, 10_000, 100_000, 1_000_000):
        options.tell(f"{number} members")
        rows.append(figure(f"{number} members", _crowded(number, nodes, events).us(events), "us"))
        gc.unfreeze()
    for number in (4, 8) if options.quick else (4, 64, 512, 4_096):
        options.tell(f"{number} nodes")
        rows.append(figure(f"{number} nodes", _crowded(members, number, events).us(events), "us"))
        gc.unfreeze()
    options.tell("memory")
    soon, late = _idle_bytes(2_000 if options.quick else 20_000)
    rows.append(at_most("memory of an idle member", soon, "bytes", 1_024))
    rows.append(figure("memory of a member long idle", late, "bytes"))
    return rows
