"""One request in flight: what was asked, where it stands, and what its receipt will say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from anser.core.errors import EngineError
from anser.core.events import Lease
from anser.core.fleet import Offer
from anser.core.ledger import LeaseRecord, Outcome, Usage
from anser.ports import Call, Route
from anser.services.chunks import Tally
from anser.services.members import Reservation

__all__ = ["Demand", "Run", "call_for"]


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


@dataclass(slots=True)
class Run:
    """One admitted request: where it stands, and what its receipt will say."""

    demand: Demand
    reservation: Reservation
    queued_at: float
    queued_ms: int
    ready: asyncio.Future[Lease]
    tally: Tally
    lease: Lease | None = None
    lease_started_ms: int = 0
    leases: list[LeaseRecord] = field(default_factory=list[LeaseRecord])
    delivered: int = 0
    told: int = 0
    told_at: float = 0.0
    opened: bool = False  # its engine has been asked
    began: bool = False  # its engine has answered
    blame: EngineError | None = None  # what its node did wrong, though the answer ended well
    first_token_ms: int | None = None
    closed: bool = False
    _latest_ms: int = 0

    def moment(self, wall_ms: int) -> int:
        """`wall_ms` as this request's time, which never goes back, whatever the clock does."""
        self._latest_ms = max(self._latest_ms, self.queued_ms, wall_ms)
        return self._latest_ms

    def generated(self, outcome: Outcome) -> Usage:
        """What the node has worked for: a client that leaves pays for the prompt as well."""
        if not self.opened or (outcome is Outcome.FAILED and not self.began):
            return Usage()
        return self.tally.settled()

    def received(self, outcome: Outcome) -> Usage:
        """What has reached the client."""
        usage = self.tally.settled()
        if outcome is Outcome.FINISHED:
            return usage
        if not self.delivered:
            return Usage()
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=self.delivered,
        )


def call_for(demand: Demand, lease: Lease, offer: Offer) -> Call:
    """The demand in the engine's own names; usage is always asked for, n is always 1."""
    body = {**demand.body, "model": offer.engine_model}
    if demand.route is not Route.EMBEDDINGS:
        body |= {"stream": True, "stream_options": {"include_usage": True}, "n": 1}
    return Call(lease=lease.id, route=demand.route, body=body)
