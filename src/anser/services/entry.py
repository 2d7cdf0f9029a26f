"""One node of the fleet: what its operator says, what its engine tells, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from anser.core.events import NodeChanged
from anser.core.fleet import SLOTS_DEFAULT, EngineKind, EngineReport, Node, Offer
from anser.core.health import Health, NodeState
from anser.ports import Engine

__all__ = ["Entry", "NodeStatus", "lacking", "promised"]

_NAMED_MAX = 5  # models in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A node as it stands. `slots` are all that it has, `usable` those that it lends now."""

    node: Node
    state: NodeState
    kind: EngineKind | None = None
    version: str | None = None
    slots: int | None = None
    usable: int = 0
    offers: tuple[Offer, ...] = ()
    error: str | None = None
    latency_s: float | None = None  # of its last answer to what it serves

    @property
    def ready(self) -> bool:
        """Whether it is up and serves something."""
        return self.state is NodeState.UP and bool(self.offers)


@dataclass(slots=True, kw_only=True)
class Entry:
    """A node with all that is known of it."""

    node: Node
    engine: Engine
    attached: bool = False  # it runs in this process and is not stored
    health: Health = field(default_factory=Health)
    report: EngineReport | None = None
    offers: dict[str, Offer] = field(default_factory=dict[str, Offer])
    silence: str | None = None  # why it does not say what it serves
    failure: str | None = None  # why its last failed stream failed
    latency_s: float | None = None
    asked_at: float = 0.0
    ask_at: float = 0.0
    asking: bool = False
    told: NodeChanged | None = None

    @property
    def slots(self) -> int | None:
        """All that it has: as its operator says, else as it tells, else as its kind has."""
        if self.node.slots is not None or self.report is None:
            return self.node.slots
        return self.report.slots or SLOTS_DEFAULT[self.report.kind]

    def status(self) -> NodeStatus:
        """As it stands."""
        state, report = self.health.state, self.report
        return NodeStatus(
            node=self.node,
            state=state,
            kind=None if report is None else report.kind,
            version=None if report is None else report.version,
            slots=self.slots,
            usable=self.health.slots(self.slots or 0),
            offers=tuple(self.offers.values()),
            error=self.silence or (self.failure if state is NodeState.SUSPECT else None),
            latency_s=self.latency_s,
        )


def promised(node: Node, model: str, kind: EngineKind) -> Offer:
    """What a node will offer by its operator's word, before its engine has been heard."""
    return Offer(
        node=node.id,
        model=model,
        engine_model=model,
        engine=kind,
        jurisdiction=node.jurisdiction,
    )


def lacking(node: Node, report: EngineReport, offered: int) -> str | None:
    """What is missing from its offers, if anything."""
    if not offered:
        return _offers_nothing(node, report)
    if node.model is None and report.listed > len(report.models):
        return f"It has {report.listed} models, of which {offered} are offered; name one of them."
    return None


def _offers_nothing(node: Node, report: EngineReport) -> str:
    names = ", ".join(model.name for model in report.models[:_NAMED_MAX])
    if node.model is None or not names:
        return "It serves no model."
    more = f" and {len(report.models) - _NAMED_MAX} more" if len(report.models) > _NAMED_MAX else ""
    return f"It serves no model {node.model}; it has {names}{more}."
