"""Why a request waited and why it went where it went: for whoever asked, and for operators."""

from __future__ import annotations

from typing import Any

from anser.api.auth import Header
from anser.api.context import Services
from anser.api.errors import Headers
from anser.core.errors import NotFound
from anser.services.why import Step, Trail

__all__ = ["told", "why_headers", "why_of", "why_unknown"]

_WISH = b"x-anser-explain"
_MICRO = 1_000_000


def why_of(services: Services, request: str) -> dict[str, Any]:
    """What is known of one request, as an object. Raises NotFound."""
    trail = services.gateway.whys.find(request)
    if trail is None:
        raise why_unknown()
    waited_s = trail.waited_s(services.clock.now())
    return {
        "object": "why",
        "request": trail.request.id,
        "member": trail.request.member,
        "model": trail.request.model,
        "came_ms": trail.came_ms,
        "prompt_tokens": trail.request.prompt_tokens,
        "queued": trail.queued,
        "queued_own": trail.queued_own,
        "waited_s": round(waited_s, 6),
        "waiting": trail.waits_since is not None,
        "leases": [_lease(step) for step in trail.steps],
        "ended": trail.ended,
        "retry_after_s": trail.retry_after_s,
    }


def why_unknown() -> NotFound:
    """The answer about what is not remembered, and about what is not yours to see: the same."""
    return NotFound("There is no such request among the latest ones that you may see.")


def why_headers(services: Services, request: str, header: Header) -> Headers:
    """The header that tells it shortly, if the request asked for that and it is known."""
    if header(_WISH) != "1":
        return []
    trail = services.gateway.whys.find(request)
    if trail is None:
        return []
    text = told(trail, services.clock.now())
    return [(b"x-anser-why", text.encode("ascii", "replace"))]


def told(trail: Trail, now: float) -> str:
    """The trail in one short line: `waited=0.042s queued=3 node=a rule=light ...`."""
    words = [f"waited={trail.waited_s(now):.3f}s", f"queued={trail.queued}"]
    if trail.steps:
        step = next((each for each in reversed(trail.steps) if not each.error), trail.steps[-1])
        why = step.why
        words += [f"node={step.lease.node}", f"rule={why.rule.name.lower()}"]
        if why.key or why.least_key:
            words += [f"key={why.key // _MICRO}", f"least={why.least_key // _MICRO}"]
        words.append(f"rivals={why.rivals}")
        words.append(f"cached={why.cached_tokens}/{trail.request.prompt_tokens}")
        if len(trail.steps) > 1:
            words.append(f"attempt={len(trail.steps)}")
    if trail.ended is not None:
        words.append(f"ended={trail.ended}")
    return " ".join(words)


def _lease(step: Step) -> dict[str, Any]:
    why = step.why
    return {
        "lease": step.lease.id,
        "node": step.lease.node,
        "waited_s": round(step.waited_s, 6),
        "rule": why.rule.name.lower(),
        "reason": why.rule.value,
        "key_micro_credits": why.key,
        "least_key_micro_credits": why.least_key,
        "rivals": why.rivals,
        "cached_tokens": why.cached_tokens,
        "error": step.error,
        "delivered_tokens": step.delivered_tokens,
        "hedge": step.hedge,
    }
