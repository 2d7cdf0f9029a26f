"""The pool at one moment, as people and programs may see it: nodes, models, what runs and waits.

The page, `/v1/pool`, the operators' routes and the metrics all show this one view. No member is in
it. A node is ready while it is up and serves something; only the slots of ready nodes count.
"""

from __future__ import annotations

from dataclasses import dataclass

from anser.core.fleet import Ability, EngineKind, Offer
from anser.core.health import NodeState
from anser.services.entry import NodeStatus
from anser.services.fleet import Fleet
from anser.services.gateway import Gateway

__all__ = ["ModelView", "NodeView", "PoolView", "nodes_ready", "view_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node, and how many answers it is giving."""

    status: NodeStatus
    busy: int = 0

    @property
    def ready(self) -> bool:
        """Whether it serves something now."""
        return self.status.ready


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One model over all nodes that offer it; `nodes_ready` of them serve it now."""

    id: str
    nodes: int
    nodes_ready: int
    context_tokens: int | None = None
    ability: Ability = Ability.BOTH
    engines: frozenset[EngineKind] = frozenset()
    own: bool = False  # the engine of this platform itself serves it

    @property
    def ready(self) -> bool:
        """Whether some node serves it now."""
        return self.nodes_ready > 0

    @property
    def chats(self) -> bool:
        """Whether it can be talked to."""
        return Ability.CHAT in self.ability


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """The pool at one moment; models that are served now come first, then by name."""

    nodes: tuple[NodeView, ...] = ()
    models: tuple[ModelView, ...] = ()
    queued: int = 0
    running: int = 0
    tokens_per_s: float = 0.0
    draining: bool = False

    @property
    def nodes_ready(self) -> int:
        """Nodes that serve something now."""
        return sum(node.ready for node in self.nodes)

    @property
    def slots(self) -> int:
        """Answers that could be given at once now."""
        return sum(node.status.slots or 0 for node in self.nodes if node.ready)

    @property
    def default(self) -> str | None:
        """The model to talk to if nobody names one: ready before not, the platform's own first."""
        able = [model for model in self.models if model.chats]
        best = min(able, key=lambda model: (not model.ready, not model.own, model.id), default=None)
        return None if best is None else best.id


def view_of(fleet: Fleet, gateway: Gateway) -> PoolView:
    """The pool now."""
    snapshot = gateway.snapshot()
    busy = {row.node: row.running for row in snapshot.nodes}
    statuses = {status.node.id: status for status in fleet.statuses()}
    nodes = [NodeView(status=status, busy=busy.get(id_, 0)) for id_, status in statuses.items()]
    models = [_model(name, offers, statuses) for name, offers in fleet.models().items()]
    return PoolView(
        nodes=tuple(nodes),
        models=tuple(sorted(models, key=lambda model: (not model.ready, model.id))),
        queued=snapshot.queued,
        running=snapshot.running,
        tokens_per_s=snapshot.tokens_per_s,
        draining=snapshot.draining,
    )


def nodes_ready(fleet: Fleet) -> int:
    """How many nodes serve something now."""
    return sum(status.ready for status in fleet.statuses())


def _model(name: str, offers: tuple[Offer, ...], statuses: dict[str, NodeStatus]) -> ModelView:
    contexts = [offer.context_tokens for offer in offers if offer.context_tokens is not None]
    ability = Ability(0)
    for offer in offers:
        ability |= offer.ability
    places = [statuses[offer.node] for offer in offers]
    return ModelView(
        id=name,
        nodes=len(offers),
        nodes_ready=sum(place.state is NodeState.UP for place in places),
        context_tokens=max(contexts, default=None),
        ability=ability,
        engines=frozenset(offer.engine for offer in offers),
        own=any(place.node.own for place in places),
    )
