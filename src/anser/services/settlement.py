"""The end of a request: its slot is free, its limits are settled, and its receipt is made.

Theory of operation. Whatever ended it, `close` is called once, when its engine works on it no more:
the scheduler is told what was generated, or what was delivered before its node failed; its member's
limits are corrected; the node is told of by how its stream ended; and what is returned is the
receipt, for the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass

from anser.core.errors import AnserError, EngineError, EngineRefused
from anser.core.events import Failed, Finished
from anser.core.ledger import Outcome, Receipt, Usage
from anser.ports import Route
from anser.services.dispatch import Dispatch
from anser.services.fleet import Fleet
from anser.services.lengths import Lengths
from anser.services.run import Run
from anser.services.stats import Stats

__all__ = ["Settlement"]

_KINDS = {route: route.name.lower() for route in Route}


@dataclass(slots=True, kw_only=True)
class Settlement:
    """Closes requests."""

    dispatch: Dispatch
    fleet: Fleet
    stats: Stats
    lengths: Lengths

    def __repr__(self) -> str:
        return f"<Settlement {sum(self.stats.outcomes.values())} closed>"

    def close(self, run: Run, outcome: Outcome, error: AnserError | None) -> Receipt:
        """It has ended so; `error` is what it failed of."""
        run.closed = True
        generated, delivered = run.generated(outcome), run.received(outcome)
        lease = run.lease
        self._report_node(run, outcome, error)
        code, wall_ms = None if error is None else error.code, self.dispatch.wall_ms()
        run.close_lease(code, tokens=generated.completion_tokens, wall_ms=wall_ms)
        self.dispatch.remove(run)
        if lease is None:
            self.dispatch.left(run, code)
        elif outcome is Outcome.FAILED and isinstance(error, EngineError):
            usage = run.part(delivered)
            self.dispatch.tell(Failed(lease=lease.id, delivered=usage, retry=False))
        else:
            self.dispatch.tell(Finished(lease=lease.id, usage=generated))
        spent = run.spent(generated, delivered)
        run.reservation.settle(
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            typical=outcome is Outcome.FINISHED and run.demand.route is not Route.EMBEDDINGS,
        )
        self._count(run, outcome, delivered)
        return run.receipt(outcome, error, wall_ms=wall_ms)

    def _report_node(self, run: Run, outcome: Outcome, error: AnserError | None) -> None:
        """A whole stream tells about its node; the client's own fault or leaving does not."""
        if run.lease is None:
            return
        blame = run.blame or error
        if isinstance(blame, EngineError) and not isinstance(blame, EngineRefused):
            self.fleet.failed(run.lease.node, blame)
        elif outcome is Outcome.FINISHED:
            self.fleet.succeeded(run.lease.node)

    def _count(self, run: Run, outcome: Outcome, delivered: Usage) -> None:
        stats = self.stats
        stats.outcomes[_KINDS[run.demand.route], outcome.value] += 1
        stats.tokens["prompt"] += delivered.prompt_tokens
        stats.tokens["cached"] += delivered.cached_tokens
        stats.tokens["completion"] += delivered.completion_tokens
        stats.duration_s.observe(self.dispatch.clock.now() - run.admitted_at)
        if run.tally.usage is not None and not run.before:
            prompt, size_bytes = run.tally.usage.prompt_tokens, run.demand.prompt_bytes
            self.lengths.observe(run.demand.model, tokens=prompt, size_bytes=size_bytes)
