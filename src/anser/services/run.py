"""One request in flight: what was asked, where it stands, and what its receipt will say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

from anser.config import Timeouts
from anser.core.errors import (
    AnserError,
    AnswerTimeout,
    DeadlineUnreachable,
    EngineBroken,
    EngineError,
    QueueTimeout,
    TokenGapTimeout,
)
from anser.core.events import Lease, Rule
from anser.core.fleet import EngineKind, Offer
from anser.core.ledger import LeaseRecord, Outcome, Receipt, Usage
from anser.core.limits import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, START_WAIT_S
from anser.core.prefix import Chain
from anser.ports import Call, Clock, Route
from anser.services.chunks import Ending, Tally
from anser.services.reservation import Reservation
from anser.services.seam import Said, go_on

__all__ = ["Demand", "Patience", "Run", "call_for", "come_back_s"]

_RETRY_AFTER_S = 5.0  # where nobody knows better
_OF_A_LEASE = ("job", "lease", "lease_started_ms", "opened_at", "owner", "tally")
_LOOK_S = 5.0  # how often a request looks whether its model still starts
_OVERRUN_SLACK = 1  # the rest of the last token may come in a chunk of its own
_CLOCKS_S = 1e-3  # two sums of the same times may differ by a little


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a member wants: one answer from one model. `body` holds checked OpenAI fields only."""

    id: str
    member: str
    route: Route
    model: str
    body: dict[str, object]
    prompt_tokens: int
    prompt_bytes: int
    output_tokens_max: int
    chain: Chain = ()  # its prompt's blocks, if caches are kept of such prompts
    cache_salt: str | None = None  # for engines that keep caches apart by it
    batch: bool = False  # it takes what nobody else wants
    deadline: float | None = None  # monotonic seconds: its first token is of no use after it

    def left_s(self, now: float) -> float:
        """Seconds until its deadline."""
        return inf if self.deadline is None else self.deadline - now


@dataclass(slots=True)
class Patience:
    """How long one request waits for a slot: `most_s`, from when its model can be asked at all.

    A model that is still being fetched or loaded has no slot to wait for, so its time counts
    against START_WAIT_S only.
    """

    asked_at: float
    most_s: float
    starting: bool = True  # at the last look; a model that has started starts no more
    counted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.counted_at = self.asked_at

    def left_s(self, now: float, *, starting: bool) -> float:
        """Seconds until it is to be asked again; 0.0 or less when it is at its end."""
        if self.starting:
            self.counted_at = now
            self.starting = starting
        if self.starting:
            return min(self.asked_at + START_WAIT_S - now, _LOOK_S)
        return self.counted_at + self.most_s - now


@dataclass(slots=True)
class Run:
    """One admitted request: where it stands, and what its receipt will say."""

    demand: Demand
    reservation: Reservation
    timeouts: Timeouts
    patience: Patience
    queued_ms: int
    ready: asyncio.Future[Lease]
    tally: Tally
    said: Said
    job: str = ""  # its name at the scheduler: its id, or its shadow's where that was faster
    lease: Lease | None = None
    rule: Rule | None = None  # by which it was given
    lease_started_ms: int = 0
    leases: list[LeaseRecord] = field(default_factory=list[LeaseRecord])
    delivered: int = 0
    before: int = 0  # delivered by earlier leases, on which the present one goes on
    admitted_at: float = field(init=False)
    told: int = 0
    told_at: float = 0.0
    opened: bool = False  # its engine has been asked,
    opened_at: float = 0.0  # at that time
    began: bool = False  # its engine has answered
    late: bool = False  # its deadline has passed while its engine worked
    blame: EngineError | None = None  # what its node did wrong, though the answer ended well
    owner: str = ""  # of the node that was asked last
    factor_milli: int = 1_000  # the model's price factor, in thousandths
    over_at: float = inf  # monotonic: then its time for a whole answer is over
    first_token_ms: int | None = None
    closed: bool = False
    _latest_ms: int = 0

    def __post_init__(self) -> None:
        self.admitted_at = self.patience.asked_at
        self.job = self.job or self.demand.id

    @property
    def waits_since(self) -> float:
        """Since when it has waited for its slot, or for its next one once a node has died."""
        return self.patience.asked_at

    def go_on(self, patience: Patience) -> None:
        """Its node has died: another is to go on from what the client has been sent."""
        self.before = self.delivered
        self.said.cut()
        self.patience = patience

    def again(self) -> None:
        """Nothing has come of its lease: the next one begins where that did."""
        self.opened = False
        self.ready = asyncio.get_running_loop().create_future()
        self.tally = self._new_tally()

    def shadow(self, wall_ms: int) -> Run:
        """The same once more, for a second lease; `record` tells of it in the list of this one."""
        return replace(
            self,
            job=f"{self.demand.id}+1",
            queued_ms=self.moment(wall_ms),
            ready=asyncio.get_running_loop().create_future(),
            tally=self._new_tally(),
            lease=None,
        )

    def swap(self, shadow: Run) -> None:
        """Go on with the other lease, of which nothing has been read yet, and leave it this one."""
        for name in _OF_A_LEASE:
            mine = getattr(self, name)
            setattr(self, name, getattr(shadow, name))
            setattr(shadow, name, mine)

    def _new_tally(self) -> Tally:
        demand, said_bytes = self.demand, len(self.said.text.encode()) if self.before else 0
        prompt_tokens = demand.prompt_tokens + self.before
        return Tally(prompt_tokens, demand.prompt_bytes + said_bytes)

    def wanted(self, kind: EngineKind) -> Demand:
        """What is asked of an engine of this kind: the answer, or the rest of it.

        Raises EngineRefused where it cannot go on with what another began.
        """
        demand = self.demand
        if not self.before:
            return demand
        text, tokens = self.said.text, self.before
        body = go_on(demand.body, text, tokens=tokens, route=demand.route, kind=kind)
        return replace(demand, body=body)

    def left_s(self, now: float) -> float:
        """Seconds until its deadline, which is for its first token."""
        return inf if self.before else self.demand.left_s(now)

    def over(self, now: float) -> AnswerTimeout | None:
        """What it fails of once its time for a whole answer is over."""
        if now < self.over_at - _CLOCKS_S:
            return None
        return AnswerTimeout(f"The whole answer took longer than {self.timeouts.answer_s:g} s.")

    def too_slow(self, now: float) -> AnserError:
        """What it fails of in mid-answer, when its time or its engine's is over."""
        return self.over(now) or TokenGapTimeout("The engine went silent in mid-answer.")

    def is_too_long(self, tokens: int) -> bool:
        """Whether its engine has gone past the longest answer asked for."""
        if tokens <= self.demand.output_tokens_max + _OVERRUN_SLACK:
            return False
        self.blame = EngineBroken("The engine went past the longest answer asked for.")
        return True

    def is_whole(self, ending: Ending, error: AnserError) -> bool:
        """Whether it has broken off when nothing of the answer was missing but the usage."""
        full = self.delivered >= self.demand.output_tokens_max
        if not ending.finished and full and self.said.last is not None:
            self.tally.cut(self.delivered - self.before)
            ending.cut(self.said.last)
        if ending.finished and isinstance(error, EngineError):
            self.blame = error
        return ending.finished

    def settled(self) -> Usage:
        """What its lease has come to; what was said before it is no part of the prompt."""
        usage = self.tally.settled()
        if not self.before:
            return usage
        prompt = max(1, usage.prompt_tokens - self.before)
        return replace(usage, prompt_tokens=prompt, cached_tokens=min(usage.cached_tokens, prompt))

    def part(self, delivered: Usage) -> Usage:
        """What of all that was delivered is the present lease's."""
        if not self.before:
            return delivered
        return replace(delivered, completion_tokens=delivered.completion_tokens - self.before)

    def spent(self, generated: Usage, delivered: Usage) -> Usage:
        """What counts for its member's limits: what was worked for, and what came before."""
        if not self.before:
            return generated
        prompt = max(generated.prompt_tokens, delivered.prompt_tokens)
        return self.whole(replace(generated, prompt_tokens=prompt))

    def whole(self, usage: Usage) -> Usage:
        """With what earlier leases have delivered."""
        if not self.before:
            return usage
        return usage + Usage(completion_tokens=self.before)

    async def started(
        self, clock: Clock, *, starting: Callable[[], bool], wait_s: Callable[[], float]
    ) -> Lease:
        """Wait for a slot; `starting` tells whether all nodes of its model are still starting.

        `wait_s` is how long one more request like it would wait now. Raises QueueTimeout,
        DeadlineUnreachable, or what `ready` was told.
        """
        while not self.ready.done():
            now = clock.now()
            left_s = self.waits_s(now, starting=starting())
            if left_s <= 0:
                raise self.out_of_patience(now, come_back_s(wait_s()))
            await asyncio.wait({self.ready}, timeout=left_s)
        return self.taken()

    def waits_s(self, now: float, *, starting: bool) -> float:
        """Seconds until it is to be asked again whether it waits on; 0.0 or less: no longer."""
        patience_s = self.patience.left_s(now, starting=starting)
        return min(patience_s, self.left_s(now), self.over_at - now)

    def taken(self) -> Lease:
        """The lease that `ready` has. Raises what it was refused for."""
        self.patience.starting = False  # a retry goes on with the time that is left
        return self.ready.result()

    def out_of_patience(self, now: float, retry_after_s: float) -> AnserError:
        """What it fails of when it has waited too long."""
        if (over := self.over(now)) is not None:
            return over
        if self.left_s(now) <= 0:
            message = "No slot became free by the request's deadline."
            return DeadlineUnreachable(message, retry_after_s=retry_after_s)
        message = f"No slot became free in {self.patience.most_s:.0f} s."
        if self.patience.starting:
            message = f"{self.demand.model} is still being fetched or loaded."
        return QueueTimeout(message, retry_after_s=retry_after_s)

    def moment(self, wall_ms: int) -> int:
        """`wall_ms` as this request's time, which never goes back, whatever the clock does."""
        self._latest_ms = max(self._latest_ms, self.queued_ms, wall_ms)
        return self._latest_ms

    def generated(self, outcome: Outcome) -> Usage:
        """What its node has worked for: who leaves, or comes too late, pays for the prompt too."""
        failed = outcome is Outcome.FAILED and not self.began and not self.late
        if not self.opened or failed:
            return Usage()
        return self.settled()

    def received(self, outcome: Outcome) -> Usage:
        """What has reached the client, of all leases."""
        usage = self.settled()
        if outcome is Outcome.FINISHED:
            return self.whole(usage)
        if not self.delivered:
            return Usage()
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=self.delivered,
        )

    def close_lease(self, error: str | None, *, tokens: int, wall_ms: int) -> None:
        """The lease, if there is one, has ended after so many tokens."""
        if self.lease is not None:
            self.leases.append(self.record(error, tokens=tokens, wall_ms=wall_ms))
            self.lease = None

    def record(self, error: str | None, *, tokens: int, wall_ms: int) -> LeaseRecord:
        """The lease as the receipt keeps it, when it ends now after so many tokens."""
        assert self.lease is not None
        return LeaseRecord(
            lease=self.lease.id,
            node=self.lease.node,
            started_ms=self.lease_started_ms,
            ended_ms=self.moment(wall_ms),
            completion_tokens=tokens,
            error=error,
        )

    def receipt(self, outcome: Outcome, error: AnserError | None, *, wall_ms: int) -> Receipt:
        """What is left of it when it has ended."""
        return Receipt(
            request=self.demand.id,
            member=self.demand.member,
            model=self.demand.model,
            outcome=outcome,
            error=None if error is None else error.code,
            usage=self.received(outcome),
            leases=tuple(self.leases),
            queued_ms=self.queued_ms,
            first_token_ms=self.first_token_ms,
            ended_ms=self.moment(wall_ms),
            owner=self.owner,
            factor_milli=self.factor_milli,
        )


def come_back_s(wait_s: float | None) -> float:
    """`retry-after` for a request that would have to wait so long; None and infinity: unknown.

    >>> come_back_s(0.2), come_back_s(42.0), come_back_s(86_400.0), come_back_s(None)
    (1.0, 42.0, 600.0, 5.0)
    """
    if wait_s is None or wait_s == inf:
        return _RETRY_AFTER_S
    return min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)


def call_for(demand: Demand, lease: Lease, offer: Offer) -> Call:
    """The demand in the engine's own names; usage is always asked for, n is always 1."""
    body = {**demand.body, "model": offer.engine_model}
    if demand.cache_salt is not None and offer.engine is EngineKind.VLLM:
        body["cache_salt"] = demand.cache_salt
    if demand.route is not Route.EMBEDDINGS:
        body |= {"stream": True, "stream_options": {"include_usage": True}, "n": 1}
    return Call(lease=lease.id, route=demand.route, body=body)
