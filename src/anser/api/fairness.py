"""Shares and entitlements as objects: a member's own, one figure for all, and all for operators."""

from __future__ import annotations

from typing import Any

from anser.api.context import Services
from anser.core.members import ANONYMOUS, Scope, ancestry
from anser.services.fairness import WINDOW_S, Share
from anser.services.members import Principal

__all__ = ["fairness_of"]


def fairness_of(services: Services, principal: Principal) -> dict[str, Any]:
    """What this member may know: its own path, all in one, and to operators every row."""
    scheduler, member = services.gateway.scheduler, principal.member
    fairness, now = services.gateway.fairness, services.clock.now()
    look = fairness.look(now)
    found: dict[str, Any] = {
        "object": "fairness",
        "window_s": WINDOW_S,
        "member": _public(member),
        "queued": scheduler.queued_of(member),
        "running": scheduler.running_of(member),
        "levels": [_level(services, share) for share in fairness.path(member, now)],
        "all": {
            "members": look.evenness.members,
            "jain": look.evenness.jain,
            "gap_micro_credits": look.evenness.gap,
            "bound_micro_credits": look.evenness.bound,
        },
    }
    if principal.scope is Scope.OPERATE:
        found["members"] = [_row(services, share) for share in look.shares.values()]
    return found


def _public(member: str) -> str:
    """An anonymous bucket's number is nobody's business."""
    return ANONYMOUS if ancestry(member)[0] == ANONYMOUS else member


def _level(services: Services, share: Share) -> dict[str, Any]:
    """Its own or its organisation's part; how much that was is told by /v1/usage, to its own."""
    return {
        "member": _public(share.member),
        "weight": share.weight,
        "contribution": _contribution(services, share.member),
        "share": share.share,
        "entitlement": share.entitlement,
    }


def _contribution(services: Services, member: str) -> dict[str, Any] | None:
    """How much of its weight is for which part of all contribution."""
    part = services.contribution.parts.get(member)
    if part is None:
        return None
    return {"part": part, "weight": services.members.added_weight(member)}


def _row(services: Services, share: Share) -> dict[str, Any]:
    return {
        **_level(services, share),
        "member": share.member,
        "service_micro_credits": share.service,
        "queued": share.queued,
        "running": share.running,
    }
