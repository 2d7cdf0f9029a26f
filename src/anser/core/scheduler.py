"""The scheduler: which waiting request gets which free slot, and what its member pays for it.

Theory of operation
-------------------
`handle(event, now)` takes one thing that has happened and returns what has to be done: it decides,
the caller acts. The same events give the same decisions, so a day of traffic can be replayed.

*Late binding*: a request waits here, in its member's queue, and leaves only into a free slot of a
node that serves its model; engines never queue. A request that finds a free slot which nobody waits
for starts at once, at a cost that depends on neither members nor nodes. A freed slot goes to one of
those whose members have had least (`fairness`), by the rules of `picking`, which may also keep it
free for a member that asks little. What keeps it free changes with what happens elsewhere, so such
slots are tried again a few times a second.

*Charge*: the prompt when a request starts, output as it is produced; at the end both are corrected
to the usage reported, so that a cached prompt token costs its tenth.

*Failure*: all that was not delivered is refunded. A request of which nothing has reached its client
goes back to the front of its member's queue and shuns the nodes it failed on while others serve its
model (`slots`), until its tries are used up.

*Refusal*: a request that cannot start before its deadline is refused when it comes. When the queue
is longer than it may be, the newest request of who has most waiting for its weight goes.

*Cancel*: a waiting request is forgotten. A running one is aborted, and keeps its slot and pays for
what it generates until the engine's end of it is reported, because until then the slot is in use.

Events about what is not known (again the same request, a lease that has ended) are dropped and
counted: the network repeats and delays, and nothing late may change what is now.

Invariants: a request is in one place, its queue or a slot; no slot is taken twice; a request leaves
by exactly one of Finished, Failed, Cancelled in the queue, or Refused; those of `fairness` and
`slots`.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from math import inf
from typing import assert_never

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
from anser.core.fairness import Shares, Standing, price
from anser.core.job import Job
from anser.core.ledger import Usage
from anser.core.picking import Picker
from anser.core.prefix import BLOCK_TOKENS, PrefixIndex
from anser.core.rules import DESIGN, Rules
from anser.core.slots import Lane, NodeSlots, Slots
from anser.core.virtual import Pool

__all__ = ["Scheduler"]

_AGAIN_S = 0.25
_LANES_MAX = 8
_NODES_MAX = 4
_FREE = Why(rule=Rule.FREE)
_FRONT = 1 << 62  # ahead of every turn that will ever be given


class Scheduler:
    """Hierarchical weighted fair queueing with late binding: `handle(event, now)`."""

    def __init__(
        self,
        queued_max: int,
        retries_max: int,
        rules: Rules = DESIGN,
        *,
        shares: Shares | None = None,
        slots: Slots | None = None,
    ) -> None:
        assert queued_max >= 0
        assert retries_max >= 1
        self.rules = rules
        self.queued_max = queued_max
        self.retries_max = retries_max
        self.dropped = 0
        self._now = float("-inf")
        self._shares = shares or Shares(rules.awake_s)
        self._slots = slots or Slots()
        self._index = PrefixIndex()
        self._picker = Picker(rules, self._shares, self._slots)
        self._jobs: dict[str, Job] = {}  # by request
        self._leases: dict[str, Job] = {}
        self._looked_at = float("-inf")  # when free slots were last tried once more
        self._looks = 0
        self._turn = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return self._shares.queued

    @property
    def running(self) -> int:
        """Leases that have not ended."""
        return len(self._leases)

    @property
    def service(self) -> int:
        """The price of all service so far, in micro-credits."""
        return self._shares.service

    def queued_of(self, member: str) -> int:
        """Requests of this member and all below it that wait."""
        account = self._shares.find(member)
        return account.queued if account else 0

    def running_of(self, member: str) -> int:
        """Leases of this member and all below it that have not ended."""
        account = self._shares.find(member)
        return account.running if account else 0

    def running_on(self, node: str) -> int:
        """Leases on this node that have not ended."""
        return self._slots.taken(node)

    def standings(self) -> list[Standing]:
        """A row for each member that waits, runs or is ahead of others; parents come first."""
        return self._shares.standings()

    def awake_weight(self, member: str | None = None) -> int:
        """Of this member while it is awake, else 0; of all organisations, if none is named."""
        return self._shares.awake_weight(member)

    def key_of(self, member: str) -> tuple[Pool, int] | None:
        """The pool in which it, or something below it, waits, and its key there.

        None where nothing waits, or it is in several: then a key says what others served it, too.
        """
        account = self._shares.find(member)
        if account is None or not account.lanes or len(account.stands) != 1:
            return None
        [pool] = account.stands
        return pool, account.key_in(pool)

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take one event at monotonic time `now` (seconds) and say what has to be done."""
        assert now >= self._now
        self._now = now
        self._shares.tick(now)
        decisions = self._take(event)
        for job in self._picker.released(now):
            decisions += self._place_again(job)
        if self._shares.queued and now - self._looked_at >= _AGAIN_S:
            decisions += self._look_again()
        return decisions

    def _look_again(self) -> list[Decision]:
        """Try once more, now and then, free slots that were closed to all who waited for them.

        What closes them (who is light, who is awake) changes with what happens elsewhere. A few
        lanes and nodes at a time, in turns.
        """
        decisions: list[Decision] = []
        self._looked_at = self._now
        lanes = self._slots.lanes()
        self._looks = (self._looks + _LANES_MAX) % len(lanes)
        for lane in (lanes[self._looks :] + lanes)[:_LANES_MAX]:
            for node in list(islice(self._slots.freest(lane), _NODES_MAX)):
                decisions += self._fill(node)
        return decisions

    def wait_s(self, member: str, model: str) -> float:
        """How long one more request of this member would wait for a slot, as far as can be told."""
        return self._picker.wait_s(member, self._slots.lane(model))

    def _take(self, event: Event) -> list[Decision]:
        match event:
            case Submitted():
                return self._submit(event.request)
            case Progressed() | Finished() | Failed():
                return self._leased(event)
            case Cancelled():
                return self._cancel(event.request)
            case NodeChanged():
                if event.slots and event.cache_tokens is not None:
                    self._index.resize(event.node, event.cache_tokens // BLOCK_TOKENS)
                return self._change(event.node, event.slots, event.models)
            case NodeGone():
                self._index.drop(event.node)
                return self._change(event.node, 0, frozenset())
            case Weighed():
                self._shares.weigh(event.member, event.weight)
                return []
            case _:
                assert_never(event)

    def __repr__(self) -> str:
        return (
            f"<Scheduler {self.queued} queued, {self.running} running, {self.dropped} dropped,"
            f" {self._slots!r}>"
        )

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        self._slots.validate()
        self._shares.validate()
        waiting = [job for job in self._jobs.values() if job.node is None]
        running = [job for job in self._jobs.values() if job.node is not None]
        assert self._leases == {job.lease: job for job in running}
        assert self._shares.queued == len(waiting)
        assert self._shares.running == len(running)
        assert sum(lane.waiting for lane in self._slots.lanes()) == len(waiting)
        assert all(job in job.account.lanes[job.lane] for job in waiting)
        assert not any(job.cancelled for job in waiting)
        taken = Counter(job.node for job in running)
        assert all(taken[node] == node.taken for node in self._slots.nodes())
        assert sum(node.taken for node in self._slots.nodes()) == len(running)
        for node in self._slots.nodes():
            assert node.reading == sum(job.reading for job in running if job.node is node)
            prompts = sum(
                job.request.prompt_tokens for job in running if job.is_reading and job.node is node
            )
            assert node.prompts == prompts
            assert not node.free or not self._slots.waiting_for(node) or self._may_idle()
        self._index.validate()

    def _may_idle(self) -> bool:
        """Whether a slot may stay free though somebody waits for it."""
        return self.rules.light_first or self.rules.hold

    def _drop(self) -> list[Decision]:
        self.dropped += 1
        return []

    def _submit(self, request: Request) -> list[Decision]:
        if request.id in self._jobs:
            return self._drop()
        self._turn += 1
        job = Job(
            id=request.id,
            account=self._shares.leaf(request.member),
            lane=self._slots.lane(request.model, batch=request.batch),
            key=self._turn,
            request=request,
        )
        if request.chain:
            match = self._index.match(request.chain)
            job.homes, job.hit = match.nodes, job.tokens_of(match.blocks)
        self._shares.arrive(job.account, job.lane.pool)
        node = self._free_node(job, more=1)
        deadline = request.deadline
        if node is None and deadline is not None and self._now + self._wait_s(request) > deadline:
            self._leave(job)
            return [self._refused(request, "deadline")]
        self._jobs[job.id] = job
        return self._wait_or_start(job, node)

    def _leave(self, job: Job) -> None:
        """It does not wait in its lane: a pool that was of it alone ends."""
        supply = job.lane.supply
        if not supply.nodes and not supply.lanes:
            self._shares.leave(job.account, job.lane.pool)
        self._shares.retire(job.account, self._now)

    def _wait_s(self, request: Request) -> float:
        return self.wait_s(request.member, request.model)

    def _refused(self, request: Request, code: str) -> Refused:
        wait_s = self._wait_s(request)
        known = wait_s if wait_s < inf else None
        return Refused(request=request.id, code=code, retry_after_s=known)

    def _cancel(self, request: str) -> list[Decision]:
        job = self._jobs.get(request)
        if job is None or job.cancelled:
            return self._drop()
        if job.node is not None:
            job.cancelled = True
            return [Abort(lease=job.lease)]
        self._dequeue(job)
        self._forget(job)
        return []

    def _leased(self, event: Progressed | Finished | Failed) -> list[Decision]:
        job = self._leases.get(event.lease)
        if job is None:
            return self._drop()
        assert job.node is not None
        match event:
            case Progressed():
                self._charge(job, price(output=event.tokens, factor_milli=job.factor_milli))
                return self._began(job, job.node) if event.tokens else []
            case Finished():
                self._settle(job, event.usage)
                self._learn(job, job.node, event.usage)
                return self._end(job, job.node)
            case Failed():
                self._settle(job, event.delivered)
                if event.retry and not job.cancelled:
                    return self._retry(job, job.node)
                return self._end(job, job.node)
            case _:
                assert_never(event)

    def _began(self, job: Job, node: NodeSlots) -> list[Decision]:
        """A lease produces tokens; its first ones say that its prompt has been read."""
        if job.first_at is not None:
            return []
        job.first_at = self._now
        took_s = self._now - job.started_at
        if self.rules.throttle:
            whole = job.request.prompt_tokens + job.ahead_whole
            node.pace.judge(whole=whole, took_s=took_s, running=node.taken)
            self._slots.throttle(node)
        node.pace.began(tokens=job.reading, ahead=job.ahead, took_s=took_s)
        self._read(job, node)
        return self._fill(node)

    def _read(self, job: Job, node: NodeSlots) -> None:
        if job.is_reading:
            node.reading -= job.reading
            node.reading_heavy -= job.reading if job.heavy else 0
            node.prompts -= job.request.prompt_tokens
            job.reading, job.is_reading = 0, False

    def _learn(self, job: Job, node: NodeSlots, usage: Usage) -> None:
        """What the end of an answer tells about its node and its member."""
        if job.cached:
            self._index.learn(node.id, predicted=job.cached, found=usage.cached_tokens)
        if job.cancelled or not usage.completion_tokens:
            return
        job.account.answered(usage.completion_tokens)
        if job.first_at is not None:
            node.pace.ended(
                tokens=usage.completion_tokens - 1,
                wrote_s=self._now - job.first_at,
                held_s=self._now - job.started_at,
            )

    def _change(self, id: str, slots: int, models: frozenset[str]) -> list[Decision]:
        touched = sorted({*models, *self._slots.models(id)})
        bit = self._index.bit(id) if slots else 0
        node = self._slots.change(id, slots=slots, models=models, bit=bit)
        self._regroup()
        decisions = self._fill(node)
        # A model may now be served only by nodes on which some of its requests have failed.
        for other in self._slots.freed_by_exclusion(touched):
            decisions += self._fill(other)
        return decisions

    def _retry(self, job: Job, node: NodeSlots) -> list[Decision]:
        if job.attempt >= self.retries_max:
            return [
                Refused(request=job.id, code="retries_exhausted"),
                *self._end(job, node),
            ]
        self._stop(job, node)
        if job.key > 0:
            job.key -= _FRONT
        excluded = job.lane.excluded | {node.id}
        job.lane = self._slots.lane(job.request.model, excluded, batch=job.lane.batch)
        # The slot is given back only then: whoever waits for it goes by its key, not by luck.
        self._shares.arrive(job.account, job.lane.pool)
        decisions = self._wait_or_start(job, self._free_node(job, more=1))
        self._slots.give_back(node)
        return decisions + self._fill(node)

    def _free_node(self, job: Job, *, more: int) -> NodeSlots | None:
        """The free slot that is for `job` now; `more` for what is not counted yet of it."""
        job.heavy = not self._picker.is_light(job, more=more)
        return self._picker.place(job, self._now, light=not job.heavy)

    def _wait_or_start(self, job: Job, node: NodeSlots | None) -> list[Decision]:
        """Start at once where nobody waits for that slot; else wait, and whoever is next has it."""
        if node is not None and self._at_once(job, node):
            cached = job.cached_on(node)
            why = Why(rule=Rule.FREE, cached_tokens=cached) if cached else _FREE
            return [self._start(job, node, why)]
        job.since = self._now
        self._shares.enqueue(job)
        self._slots.wait(job.lane)
        if node is None and not job.attempt and self._shares.queued > self.queued_max:
            decisions: list[Decision] = [self._push_out(job)]
        else:
            decisions = [] if node is None else self._fill(node)
        if job.node is None and node is not None and (decisions or self._is_idle(job.lane)):
            self._looked_at = -inf  # that slot was another's or nobody's; there are more
        return decisions

    def _at_once(self, job: Job, node: NodeSlots) -> bool:
        """Whether nobody else is to be asked before `job` gets a free slot of `node`."""
        del job
        return not (self._shares.queued and self._slots.waiting_for(node))

    def _is_idle(self, lane: Lane) -> bool:
        """Whether a node that might take what waits in `lane` does nothing at all."""
        node = next(self._slots.freest(lane), None)
        return node is not None and not node.taken

    def _push_out(self, job: Job) -> Refused:
        """The queue is longer than it may be: a batch loses one, or else who has most waiting."""
        batch = [lane for lane in self._slots.lanes() if lane.batch and lane.waiting]
        place = self._shares.longest(job.account, batch).newest(batch)
        other = self._jobs[place.id]
        self._dequeue(other)
        self._forget(other)
        return self._refused(other.request, "overloaded")

    def _place_again(self, job: Job) -> list[Decision]:
        """Its home has not had a slot for it in time: any other will do."""
        if self._jobs.get(job.id) is not job or job.node is not None:
            return []
        node = self._free_node(job, more=0)
        return [] if node is None else self._fill(node)

    def _fill(self, node: NodeSlots) -> list[Decision]:
        decisions: list[Decision] = []
        while node.free and self._shares.queued:
            picked = self._picker.next(node, self._now)
            if picked is None:
                break
            job, why = picked
            job.heavy = why.rule is not Rule.LIGHT
            self._dequeue(job)
            decisions.append(self._start(job, node, why))
            if why.rule is not Rule.LIGHT and self._picker.is_closed(node):
                break  # or a light one would have had the slot
        return decisions

    def _start(self, job: Job, node: NodeSlots, why: Why) -> Start:
        request = job.request
        self._slots.take(node)
        job.node, job.started_at, job.first_at = node, self._now, None
        job.attempt += 1
        job.cached = 0
        if request.chain:
            job.cached = job.tokens_of(self._index.known(node.id, request.chain))
            self._index.add(node.id, request.chain)
        job.reading, job.ahead = request.prompt_tokens - job.cached, node.reading
        job.is_reading, job.ahead_whole = True, node.prompts
        node.prompts += request.prompt_tokens
        node.reading += job.reading
        node.reading_heavy += job.reading if job.heavy else 0
        job.charged = price(fresh=job.reading, cached=job.cached, factor_milli=job.factor_milli)
        self._picker.bands.pay(job.charged, self._now, batch=job.lane.batch)
        self._shares.start(job.account, job.lane.pool, job.charged, self._now)
        lease = Lease(
            id=job.lease,
            request=job.id,
            node=node.id,
            model=request.model,
            attempt=job.attempt,
        )
        self._leases[lease.id] = job
        return Start(lease=lease, request=request, why=why)

    def _charge(self, job: Job, micro_credits: int) -> None:
        job.charged += micro_credits
        self._picker.bands.pay(micro_credits, self._now, batch=job.lane.batch)
        self._shares.charge(job.account, job.lane.pool, micro_credits)

    def _settle(self, job: Job, usage: Usage) -> None:
        self._charge(job, job.price(usage) - job.charged)

    def _stop(self, job: Job, node: NodeSlots) -> None:
        self._read(job, node)
        del self._leases[job.lease]
        job.node = None
        self._shares.end(job.account)

    def _end(self, job: Job, node: NodeSlots) -> list[Decision]:
        self._stop(job, node)
        self._forget(job)
        self._slots.give_back(node)
        return self._fill(node)

    def _dequeue(self, job: Job) -> None:
        self._shares.dequeue(job)
        self._slots.leave(job.lane)
        self._regroup()

    def _regroup(self) -> None:
        for moved in self._slots.moved():
            self._shares.move(moved)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        self._shares.retire(job.account, self._now)
