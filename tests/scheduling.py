"""A scheduler and short words for what happens to it."""

from __future__ import annotations

from anser.core.events import (
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    Request,
    Start,
    Submitted,
)
from anser.core.ledger import Usage
from anser.core.rules import STRICT
from anser.core.scheduler import Scheduler

__all__ = ["CREDIT", "Pool", "leases", "request"]

CREDIT = 1_000_000  # micro-credits


class Pool:
    """A scheduler whose invariants are checked after each event, and short words for events."""

    def __init__(self, *, queued_max: int = 100, retries_max: int = 3) -> None:
        self.scheduler = Scheduler(queued_max, retries_max, STRICT)

    def tell(self, *events: Event) -> list[Decision]:
        """What these events give, in turn."""
        decisions: list[Decision] = []
        for event in events:
            decisions += self.scheduler.handle(event, 1.0)
            self.scheduler.validate()
        return decisions

    def node(self, name: str, slots: int, *models: str) -> list[str]:
        """A node changes; the leases that start."""
        served = frozenset(models or ("m",))
        return leases(self.tell(NodeChanged(node=name, slots=slots, models=served)))

    def submit(self, id: str, member: str = "alice", *, prompt: int = 100) -> list[str]:
        """A request arrives; the leases that start."""
        return leases(self.tell(Submitted(request=request(id, member, prompt=prompt))))

    def finish(self, lease: str, *, output: int = 0) -> list[str]:
        """A lease ends after a fresh prompt of 100 tokens; the leases that start."""
        usage = Usage(prompt_tokens=100, completion_tokens=output)
        return leases(self.tell(Finished(lease=lease, usage=usage)))

    def retry(self, lease: str) -> list[str]:
        """A lease fails before its first token; the leases that start."""
        return leases(self.tell(Failed(lease=lease, delivered=Usage(), retry=True)))

    def credits(self, member: str) -> float:
        """The price of the member's service so far."""
        rows = {row.member: row.service for row in self.scheduler.standings()}
        return rows[member] / CREDIT

    @property
    def state(self) -> tuple[int, int, int]:
        """How many wait, run, and were dropped."""
        return self.scheduler.queued, self.scheduler.running, self.scheduler.dropped


def request(id: str, member: str = "alice", *, prompt: int = 100, factor: int = 1_000) -> Request:
    """A request for model m."""
    return Request(
        id=id,
        member=member,
        model="m",
        prompt_tokens=prompt,
        output_tokens_max=100,
        factor_milli=factor,
    )


def leases(decisions: list[Decision]) -> list[str]:
    """The leases that start, each with its node; anything else is not expected."""
    starts = [decision for decision in decisions if isinstance(decision, Start)]
    assert starts == decisions
    return [f"{start.lease.id} {start.lease.node}" for start in starts]
