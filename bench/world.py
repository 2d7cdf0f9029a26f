"""A pool in virtual time: sources ask, a policy decides, engines answer, and all is written down.

Theory of operation. One heap of what happens next; no threads, no clock. A policy is told what the
gateway would tell the scheduler, as the core's own events: a Progressed for a first token at once
and then every 100 ms, a Finished or Failed at the end, half a round trip after it happened. It
answers with the core's decisions. So the scheduler itself is one policy, with nothing in between.

What is measured is what clients get: `Record` by request, and for each member the price of all that
has been delivered, in credits (1 fresh prompt token; 0.1 cached; 4 an output token), with samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from anser.core.events import (
    Abort,
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
from bench.engine_model import FLEET, Answer, Engine, NodeSpec
from bench.policies import Policy
from bench.trace import Record, Trace
from bench.workloads import Ask, Source

__all__ = ["MODEL", "Fault", "World", "run"]

MODEL = "m"
_COALESCE_S = 0.1
_SAMPLE_S = 0.5
_NOTICED_S = 1.0  # after a node has died
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """At a moment a node dies (speed 0), comes back, or becomes slower."""

    at: float
    node: str
    speed: float


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended."""

    ask: Ask
    source: Source
    record: Record


@dataclass(slots=True)
class World:
    """One run of one policy."""

    policy: Policy
    fleet: Sequence[NodeSpec] = FLEET
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    faults: Sequence[Fault] = ()
    now: float = 0.0
    trace: Trace = field(default_factory=Trace)
    _heap: list[tuple[float, int, Callable[[], None]]] = field(
        default_factory=list[tuple[float, int, Callable[[], None]]]
    )
    _turn: int = 0
    _asked: int = 0
    _live: dict[str, _Live] = field(default_factory=dict[str, _Live])
    _engines: dict[str, Engine] = field(default_factory=dict[str, Engine])
    _flushed: dict[str, float] = field(default_factory=dict[str, float])
    _node_of: dict[str, str] = field(default_factory=dict[str, str])  # by lease
    _lost: set[str] = field(default_factory=set[str])  # leases of dead nodes

    def run(self, sources: Iterable[Source], seconds: float) -> Trace:
        """Let `sources` ask for so long."""
        for spec in self.fleet:
            self._join(spec)
        for member, weight in self.weights.items():
            self._tell(Weighed(member=member, weight=round(1_000 * weight)))
        for fault in self.faults:
            self._at(fault.at, partial(self._fail, fault))
        for source in sources:
            self._pull(source, None)
        self._at(_SAMPLE_S, self._sample)
        while self._heap and self._heap[0][0] <= seconds:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = seconds
        self.trace.close(seconds)
        return self.trace

    def _at(self, when: float, action: Callable[[], None]) -> None:
        self._turn += 1
        heapq.heappush(self._heap, (max(when, self.now), self._turn, action))

    def _sample(self) -> None:
        self.trace.sample(self.now, self.policy.paid())
        self._at(self.now + _SAMPLE_S, self._sample)

    def _join(self, spec: NodeSpec) -> None:
        self._engines[spec.id] = Engine(spec)
        self._flushed[spec.id] = 0.0
        self._tell(NodeChanged(node=spec.id, slots=spec.slots, models=frozenset((MODEL,))))

    # Clients

    def _pull(self, source: Source, answered: float | None) -> None:
        try:
            ask = next(source) if answered is None else source.send(answered)
        except StopIteration:
            return
        self._at(ask.at, lambda: self._submit(ask, source))

    def _submit(self, ask: Ask, source: Source) -> None:
        self._asked += 1
        id = str(self._asked)
        self._live[id] = _Live(ask, source, self.trace.submitted(id, ask, self.now))
        if not ask.waits:
            self._pull(source, self.now)
        request = Request(
            id=id,
            member=ask.member,
            model=MODEL,
            prompt_tokens=ask.prompt_tokens,
            output_tokens_max=2 * ask.output_tokens,
            chain=ask.prompt,
            text_bytes=_BYTES_PER_TOKEN * ask.prompt_tokens,
        )
        self._tell(Submitted(request=request))

    def _ended(self, id: str) -> None:
        live = self._live.pop(id)
        if live.ask.waits:
            self._pull(live.source, self.now)

    # The policy's decisions

    def _tell(self, event: Event) -> None:
        self._act(self.policy.handle(event, self.now))

    def _act(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start():
                    self._start(decision)
                case Refused():
                    self.trace.refused(self._live[decision.request].record, self.now)
                    self._ended(decision.request)
                case Abort():
                    self._abort(decision.lease)

    def _start(self, start: Start) -> None:
        live, node = self._live[start.request.id], start.lease.node
        engine, ask = self._engines[node], live.ask
        cached = engine.hit(ask.prompt, ask.prompt_tokens)
        self.trace.started(live.record, node, cached)
        answer = Answer(
            lease=start.lease.id,
            prompt=ask.prompt,
            prompt_tokens=ask.prompt_tokens,
            output_tokens=ask.output_tokens,
            after=ask.after or ask.prompt,
        )
        self._node_of[answer.lease] = node
        half_s = engine.spec.round_trip_s / 2
        self._at(self.now + half_s, lambda: self._admit(engine, answer))

    def _admit(self, engine: Engine, answer: Answer) -> None:
        if not engine.speed:
            self._lose([answer])
            return
        engine.admit(answer)
        if not engine.busy:
            self._step(engine)

    def _abort(self, lease: str) -> None:
        engine = self._engines[self._node_of[lease]]
        half_s = engine.spec.round_trip_s / 2
        self._at(self.now + half_s, lambda: engine.abort(lease))

    # Engines

    def _step(self, engine: Engine) -> None:
        self._at(self.now + engine.begin(), lambda: self._stepped(engine))

    def _stepped(self, engine: Engine) -> None:
        if not engine.busy:
            return  # it has died meanwhile
        stepped = engine.end()
        events: list[tuple[Answer, int]] = []
        node, half_s = engine.spec.id, engine.spec.round_trip_s / 2
        if self.now - self._flushed[node] >= _COALESCE_S:
            self._flushed[node] = self.now
            events = [_report(answer) for answer in engine.writing.values()]
        else:
            events = [_report(answer) for answer in stepped.began if answer not in stepped.ended]
        ended = stepped.ended
        if events or ended:
            self._at(self.now + half_s, lambda: self._arrive(events, ended))
        if engine.running:
            self._step(engine)

    def _arrive(self, events: list[tuple[Answer, int]], ended: list[Answer]) -> None:
        for answer, tokens in events:
            if tokens and answer.lease in self._node_of and answer.lease not in self._lost:
                self._deliver(answer, tokens)
                self._tell(Progressed(lease=answer.lease, tokens=tokens))
        for answer in ended:
            if answer.lease in self._node_of and answer.lease not in self._lost:
                self._finish(answer)

    def _deliver(self, answer: Answer, tokens: int) -> None:
        """The client gets these tokens; one who wanted no more goes away."""
        id = answer.lease.partition(".")[0]
        live = self._live[id]
        self.trace.delivered(live.record, self.now, tokens, answer.cached)
        leaves = live.ask.leaves_after
        if leaves is not None and live.record.output >= leaves and not live.record.left:
            live.record.left = True
            self._tell(Cancelled(request=id))

    def _finish(self, answer: Answer) -> None:
        id = answer.lease.partition(".")[0]
        if answer.written > answer.reported:
            self._deliver(answer, answer.written - answer.reported)
        record = self._live[id].record
        self.trace.finished(record, self.now)
        del self._node_of[answer.lease]
        usage = Usage(
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached,
            completion_tokens=answer.written,
        )
        self._tell(Finished(lease=answer.lease, usage=usage))
        self._ended(id)

    # Faults

    def _fail(self, fault: Fault) -> None:
        engine = self._engines[fault.node]
        was, engine.speed = engine.speed, fault.speed
        if not fault.speed:
            engine.busy = False
            lost = engine.lose()
            self._at(self.now + _NOTICED_S, lambda: self._notice(fault.node))
            self._lose(lost)
        elif not was:
            spec = engine.spec
            self._tell(NodeChanged(node=spec.id, slots=spec.slots, models=frozenset((MODEL,))))

    def _notice(self, node: str) -> None:
        if not self._engines[node].speed:
            self._tell(NodeGone(node=node))

    def _lose(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if answer.lease in self._node_of:
                self._lost.add(answer.lease)
                self._at(self.now + _NOTICED_S, partial(self._failed, answer))

    def _failed(self, answer: Answer) -> None:
        id = answer.lease.partition(".")[0]
        record = self._live[id].record
        del self._node_of[answer.lease]
        begun = bool(record.output)
        delivered = Usage()
        if begun:
            delivered = Usage(
                prompt_tokens=answer.prompt_tokens,
                cached_tokens=record.cached,
                completion_tokens=record.output,
            )
        self.trace.failed(record, self.now, retry=not begun)
        self._tell(Failed(lease=answer.lease, delivered=delivered, retry=not begun))
        if begun:
            self._ended(id)


def _report(answer: Answer) -> tuple[Answer, int]:
    new, answer.reported = answer.written - answer.reported, answer.written
    return answer, new


def run(
    policy: Policy,
    sources: Iterable[Source],
    seconds: float,
    *,
    fleet: Sequence[NodeSpec] = FLEET,
    weights: Mapping[str, float] | None = None,
    faults: Sequence[Fault] = (),
) -> Trace:
    """One run of one policy, and what came of it."""
    return World(policy, fleet, weights or {}, faults).run(sources, seconds)
