"""Who is served next, and where: the scheduler, and the rules that it is compared to.

Every policy is told the core's events and answers with its decisions, so the scheduler is one of
them as it is. The others are written to be read: short, and slow where that is plainer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

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
    Rule,
    Start,
    Submitted,
    Weighed,
    Why,
)
from anser.core.fairness import price
from anser.core.ledger import Usage
from anser.core.prefix import BLOCK_BYTES, PrefixIndex
from anser.core.rules import DESIGN, Rules
from anser.core.scheduler import Scheduler

__all__ = [
    "POLICIES",
    "Anser",
    "CacheAware",
    "Dlpm",
    "Fcfs",
    "LeastLoaded",
    "Policy",
    "RequestsPerMinute",
    "RoundRobin",
    "Vtc",
]

_QUEUED_MAX = 1_000_000
_TRIES_MAX = 3
_WHY = Why(rule=Rule.FREE)


class Policy(Protocol):
    """What a pool asks."""

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take one thing that has happened and say what has to be done."""
        ...

    def paid(self) -> Mapping[str, int]:
        """What each member has been charged so far, in micro-credits, where that is counted."""
        ...


class Anser(Scheduler):
    """The scheduler as it is."""

    def __init__(self, rules: Rules = DESIGN) -> None:
        super().__init__(_QUEUED_MAX, _TRIES_MAX, rules)

    def paid(self) -> Mapping[str, int]:
        """What each member has been charged so far, in micro-credits."""
        return {row.member: row.service for row in self.standings()}


@dataclass(slots=True, eq=False)
class Node:
    """A node as a policy sees it."""

    id: str
    slots: int
    taken: int = 0
    queue: deque[Request] = field(default_factory=deque[Request])  # of those that push

    @property
    def load(self) -> float:
        """Requests here, for each slot."""
        return (self.taken + len(self.queue)) / self.slots


@dataclass(slots=True, eq=False)
class _Running:
    request: Request
    node: Node
    charged: int = 0


class _Baseline:
    """Slots, leases and retries; who waits where, and who is next, is each policy's own."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.running: dict[str, _Running] = {}
        self.tries: dict[str, int] = {}
        self.weights: dict[str, float] = {}
        self.now = 0.0

    @abstractmethod
    def put(self, request: Request, *, front: bool) -> None:
        """Let a request wait."""

    @abstractmethod
    def take(self, node: Node) -> Request | None:
        """The request that gets a free slot of `node`."""

    @abstractmethod
    def remove(self, request: str) -> None:
        """Let a request wait no longer, because its client has gone."""

    def charge(self, member: str, micro_credits: int) -> None:
        """Account for what a member was served."""

    def costs(self, usage: Usage) -> int:
        """What so much costs: all input alike, as VTC has it."""
        return price(fresh=usage.prompt_tokens, output=usage.completion_tokens, factor_milli=1_000)

    def paid(self) -> Mapping[str, int]:
        """Not counted in the metric of the bench."""
        return {}

    def admits(self, request: Request) -> bool:
        """Whether a request may come in at all."""
        del request
        return True

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take one thing that has happened and say what has to be done."""
        self.now = now
        match event:
            case Progressed():
                self._progress(event)
                return []  # the most frequent by far, and it frees nothing
            case Submitted():
                decisions = self._submit(event.request)
            case Finished() | Failed():
                decisions = self._end(event)
            case Cancelled():
                decisions = self._cancel(event.request)
            case _:
                decisions = self._pool(event)
        return decisions + self._fill()

    def _submit(self, request: Request) -> list[Decision]:
        if not self.admits(request):
            return [Refused(request=request.id, code="overloaded")]
        self.put(request, front=False)
        return []

    def _pool(self, event: NodeChanged | NodeGone | Weighed) -> list[Decision]:
        match event:
            case NodeChanged():
                self._change(event.node, event.slots)
            case NodeGone():
                self._change(event.node, 0)
            case Weighed():
                self.weights[event.member] = event.weight / 1_000
        return []

    def _progress(self, event: Progressed) -> None:
        running = self.running[event.lease]
        tokens = self.costs(Usage(completion_tokens=event.tokens))
        running.charged += tokens
        self.charge(running.request.member, tokens)

    def _end(self, event: Finished | Failed) -> list[Decision]:
        running = self.running.pop(event.lease)
        running.node.taken -= 1
        usage = event.usage if isinstance(event, Finished) else event.delivered
        self.charge(running.request.member, self.costs(usage) - running.charged)
        if isinstance(event, Failed) and event.retry:
            if self.tries[running.request.id] >= _TRIES_MAX:
                return [Refused(request=running.request.id, code="retries_exhausted")]
            self.put(running.request, front=True)
        return []

    def _cancel(self, request: str) -> list[Decision]:
        for lease, running in self.running.items():
            if running.request.id == request:
                return [Abort(lease=lease)]
        self.remove(request)
        return []

    def _change(self, id: str, slots: int) -> None:
        node = self.nodes.pop(id, None)
        if slots:
            self.nodes[id] = Node(id, slots)
        if node is not None:
            for request in node.queue:
                self.put(request, front=False)

    def _fill(self) -> list[Decision]:
        decisions: list[Decision] = []
        closed: set[str] = set()
        while True:
            free = [n for n in self.nodes.values() if n.taken < n.slots and n.id not in closed]
            if not free:
                return decisions
            node = min(free, key=lambda one: one.taken / one.slots)
            request = self.take(node)
            if request is None:
                closed.add(node.id)
                continue
            decisions.append(self._start(request, node))

    def _start(self, request: Request, node: Node) -> Start:
        node.taken += 1
        attempt = self.tries[request.id] = self.tries.get(request.id, 0) + 1
        lease = Lease(
            id=f"{request.id}.{attempt}",
            request=request.id,
            node=node.id,
            model=request.model,
            attempt=attempt,
        )
        charged = self.start_cost(request, node)
        self.running[lease.id] = _Running(request, node, charged)
        self.charge(request.member, charged)
        return Start(lease=lease, request=request, why=_WHY)

    def start_cost(self, request: Request, node: Node) -> int:
        """What a request pays as it starts."""
        del node
        return self.costs(Usage(prompt_tokens=request.prompt_tokens))


class Fcfs(_Baseline):
    """First come, first served, from one queue; the freest node."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: deque[Request] = deque()

    def put(self, request: Request, *, front: bool) -> None:
        """Behind all others."""
        (self._queue.appendleft if front else self._queue.append)(request)

    def take(self, node: Node) -> Request | None:
        """Who came first."""
        del node
        return self._queue.popleft() if self._queue else None

    def remove(self, request: str) -> None:
        """Forget it."""
        self._queue = deque(one for one in self._queue if one.id != request)


class RequestsPerMinute(Fcfs):
    """First come, first served, but no more than so many requests a minute of each member."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._lately: dict[str, deque[float]] = {}

    def admits(self, request: Request) -> bool:
        """Whether the last minute has room for it."""
        lately = self._lately.setdefault(request.member, deque())
        while lately and lately[0] <= self.now - 60:
            lately.popleft()
        if len(lately) >= self.limit:
            return False
        lately.append(self.now)
        return True


class _Push(_Baseline):
    """A request is given to a node's queue as it comes."""

    @abstractmethod
    def choose(self, request: Request) -> Node:
        """The node that it is sent to."""

    def put(self, request: Request, *, front: bool) -> None:
        """At once to a node."""
        queue = self.choose(request).queue
        (queue.appendleft if front else queue.append)(request)

    def take(self, node: Node) -> Request | None:
        """Who came first here."""
        return node.queue.popleft() if node.queue else None

    def remove(self, request: str) -> None:
        """Forget it."""
        for node in self.nodes.values():
            node.queue = deque(one for one in node.queue if one.id != request)


class RoundRobin(_Push):
    """Node after node."""

    _turn = 0

    def choose(self, request: Request) -> Node:
        """The next one."""
        del request
        self._turn += 1
        return list(self.nodes.values())[self._turn % len(self.nodes)]


class LeastLoaded(_Push):
    """The node with the fewest requests for its slots."""

    def choose(self, request: Request) -> Node:
        """The least loaded one."""
        del request
        return min(self.nodes.values(), key=lambda node: node.load)


class CacheAware(_Push):
    """SGLang's router, with its defaults.

    While the queues are uneven, the shortest; else the node with the longest known beginning if
    that is more than 0.3 of the prompt, else the one that knows least.
    """

    def __init__(self, *, match: float = 0.3, absolute: int = 64, relative: float = 1.5) -> None:
        super().__init__()
        self._match, self._absolute, self._relative = match, absolute, relative
        self._index = PrefixIndex()
        self._known: dict[str, int] = {}

    def choose(self, request: Request) -> Node:
        """By load where that is uneven, else by cache."""
        nodes = list(self.nodes.values())
        loads = {node.id: node.taken + len(node.queue) for node in nodes}
        least, most = min(loads.values()), max(loads.values())
        node = min(nodes, key=lambda one: loads[one.id])
        if most - least <= self._absolute or most <= self._relative * least:
            known = {n.id: self._index.known(n.id, request.chain) for n in nodes}
            best = max(nodes, key=lambda one: known[one.id])
            if known[best.id] * BLOCK_BYTES > self._match * max(1, request.text_bytes):
                node = best
            else:
                node = min(nodes, key=lambda one: self._known.get(one.id, 0))
        self._index.resize(node.id, 1 << 20)
        self._index.add(node.id, request.chain)
        self._known[node.id] = self._known.get(node.id, 0) + len(request.chain)
        return node


class _ByMember(_Baseline):
    """A queue for each member."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, deque[Request]] = {}

    def put(self, request: Request, *, front: bool) -> None:
        """In its member's queue."""
        queue = self.queues.get(request.member)
        if not queue:
            self.arrives(request.member)
            queue = self.queues.setdefault(request.member, deque())
        (queue.appendleft if front else queue.append)(request)

    def arrives(self, member: str) -> None:
        """A member that had nothing waiting has."""

    def remove(self, request: str) -> None:
        """Forget it."""
        for member, queue in self.queues.items():
            self.queues[member] = deque(one for one in queue if one.id != request)

    def waiting(self) -> list[str]:
        """Members with requests that wait."""
        return [member for member, queue in self.queues.items() if queue]


class Vtc(_ByMember):
    """The virtual token counter (Sheng et al., OSDI 2024), on the freest node.

    A counter for each client: all input alike and output, per share. The least is next; who comes
    back is lifted to the least of those who wait (without: a least counter first rule).
    """

    def __init__(self, *, lift: bool = True) -> None:
        super().__init__()
        self._lift = lift
        self.counters: dict[str, float] = {}
        self._last = 0.0

    def arrives(self, member: str) -> None:
        """Lift it to the least counter of those who wait, or to the last one served."""
        counter = self.counters.setdefault(member, 0.0)
        if self._lift:
            waiting = [self.counters[other] for other in self.waiting()]
            self.counters[member] = max(counter, min(waiting, default=self._last))

    def take(self, node: Node) -> Request | None:
        """The oldest of the member of the least counter."""
        del node
        waiting = self.waiting()
        if not waiting:
            return None
        member = min(waiting, key=self.counters.__getitem__)
        self._last = max(self._last, self.counters[member])
        return self.queues[member].popleft()

    def charge(self, member: str, micro_credits: int) -> None:
        """By its share."""
        self.counters[member] += micro_credits / self.weights.get(member, 1.0)


class Dlpm(_ByMember):
    """Deficit longest prefix match (Cao et al., 2025), as one queue for all nodes.

    Of those whose deficit is positive, the request with the longest beginning on the node; where
    nobody's is, all who wait get a quantum more. Cached input is a tenth, as everywhere here.
    """

    def __init__(self, quantum: float = 4_000) -> None:
        super().__init__()
        self._quantum = quantum * 1_000_000
        self._deficits: dict[str, float] = {}
        self._index = PrefixIndex()

    def costs(self, usage: Usage) -> int:
        """What so much costs, cached input a tenth."""
        return price(
            fresh=usage.prompt_tokens - usage.cached_tokens,
            cached=usage.cached_tokens,
            output=usage.completion_tokens,
            factor_milli=1_000,
        )

    def arrives(self, member: str) -> None:
        """A newcomer has no credit."""
        self._deficits.setdefault(member, 0.0)

    def take(self, node: Node) -> Request | None:
        """The longest match among those with a deficit left."""
        waiting = self.waiting()
        if not waiting:
            return None
        while not (open_ := [one for one in waiting if self._deficits[one] > 0]):
            for member in waiting:
                quantum = self._quantum * self.weights.get(member, 1.0)
                self._deficits[member] = min(self._deficits[member] + quantum, quantum)
        found = [
            (self._index.known(node.id, request.chain), -place, request)
            for member in open_
            for place, request in enumerate(islice(self.queues[member], 64))
        ]
        _, _, request = max(found, key=lambda one: one[:2])
        self.queues[request.member].remove(request)
        return request

    def start_cost(self, request: Request, node: Node) -> int:
        """What is fresh of it, and a tenth of the rest."""
        cached = self._index.known(node.id, request.chain) * 64
        self._index.add(node.id, request.chain)
        usage = Usage(
            prompt_tokens=request.prompt_tokens,
            cached_tokens=min(cached, request.prompt_tokens),
        )
        return self.costs(usage)

    def charge(self, member: str, micro_credits: int) -> None:
        """From its deficit."""
        self._deficits[member] -= micro_credits


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "fcfs": Fcfs,
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "cache aware": CacheAware,
    "20 a minute": lambda: RequestsPerMinute(20),
    "vtc": Vtc,
    "dlpm": Dlpm,
    "anser": Anser,
}
