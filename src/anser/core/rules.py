"""What the scheduler is to do, as numbers: the defaults are the design, a bench switches parts off.

Each rule names what it buys. None of them can break the fairness bound, which follows from the
window alone: they only choose among those whom the window lets through, or leave a slot empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

__all__ = ["DESIGN", "STRICT", "Rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Shares are of a weight of 1,000; prices are micro-credits."""

    # Who is as good as first: at each level, keys up to this far above the least. What it costs in
    # fairness, locality gains in speed: the bound grows by twice the window.
    window: int = 4_000 * 1_000_000  # 4,000 fresh prompt tokens of a model of factor 1
    candidates: int = 16  # looked at for one slot, at most

    # A free slot is chosen by the least estimated finish, and by where the prompt's beginning is.
    nearest: bool = True

    # Members below their fair number of leases go first, and find a slot and an idle engine:
    light_first: bool = True
    express: float = 0.1  # of a node's slots are closed to all others while anybody else is awake,
    gate_s: float = 0.25  # and so is a node that would take longer to read what these have sent it.

    # A light member's request may wait for the node with its beginning, as long as that saves.
    hold: bool = True

    # A node may have as many leases at once as it has shown to keep, whatever it claims.
    throttle: bool = True

    awake_s: float = 30.0  # how long a member counts after its last request
    # A request that waited so long goes before its member's others once so many have passed it.
    patience_s: float = 30.0
    passed_max: int = 16

    batch_share: float = 0.05  # of the service of the last minutes that batch may have in any case


DESIGN = Rules()
"""All rules, as designed."""

STRICT = Rules(
    window=0,
    candidates=1,
    nearest=False,
    light_first=False,
    express=0.0,
    gate_s=inf,
    hold=False,
    throttle=False,
    awake_s=0.0,
    patience_s=inf,
)
"""Weighted fair queueing and nothing else: the least key, the node with most to spare."""
