"""What shall happen in a world: drawn from the seed before it begins."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from anser.adapters.memory_engine import Fault, FaultKind, Pace
from anser.config import GatewaySettings, MemberSettings
from anser.core.rules import DESIGN, STRICT, Rules
from anser.ports import Route

__all__ = ["Act", "Behaviour", "ClientPlan", "MachinePlan", "Mishap", "Plan", "draw_plan"]

MODELS = ("small", "large")
PEOPLE = (
    "uni/physics/ada",
    "uni/physics/bo",
    "uni/law/cy",
    "uni/law",
    "lab/default/dee",
    "lab",
    "anonymous/bucket-3",
    "anonymous/bucket-900",
)


class Behaviour(enum.Enum):
    """What a client does with its answer."""

    READ = "reads it all"
    LEAVE = "leaves after some pieces"
    CANCEL = "is gone at some moment"
    DAWDLE = "reads slowly"


class Act(enum.Enum):
    """What befalls the platform."""

    CRASH = "the engine of a node goes down"
    RECOVER = "it comes up again"
    DRAIN = "a node is drained"
    REMOVE = "a node is removed"
    ADD = "a node is listed again"
    JUMP = "the wall clock jumps"
    DISK_FULL = "the store takes no more writes"
    DISK_FREE = "it does again"
    WEIGH = "a member is added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """One request and the client behind it."""

    id: str
    at_s: float
    member: str
    model: str
    route: Route
    words: int
    tokens_max: int
    behaviour: Behaviour
    pieces: int  # after which it leaves
    moment_s: float  # after which it is gone, or between two pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """One node's machine."""

    node: str
    model: str
    slots: int
    pace: Pace
    stop_s: float  # from being told to stop until it has
    faults: float  # share of its answers that go wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """Something befalls the platform."""

    at_s: float
    act: Act
    node: str
    seconds: float  # by which the wall clock jumps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole world."""

    clients: tuple[ClientPlan, ...]
    machines: tuple[MachinePlan, ...]
    mishaps: tuple[Mishap, ...]
    settings: GatewaySettings
    member_settings: MemberSettings
    weights: dict[str, int]
    queued_max: int
    rules: Rules


def draw_plan(seed: int) -> Plan:
    """The plan of this seed."""
    draw = random.Random(seed)
    machines = tuple(_machine(draw, f"n{number}") for number in range(draw.randint(1, 4)))
    span_s = draw.choice((1.0, 5.0, 20.0))
    models = [*[machine.model for machine in machines] * 8, *MODELS, "unknown"]
    count = draw.randint(5, 50)
    clients = tuple(_client(draw, f"r{number}", span_s, models) for number in range(count))
    mishaps = [_mishap(draw, machines, span_s) for _ in range(draw.randint(0, 8))]
    return Plan(
        clients=clients,
        machines=machines,
        mishaps=tuple(sorted(mishaps, key=lambda mishap: mishap.at_s)),
        settings=GatewaySettings(
            queue_timeout_s=draw.choice((1.0, 10.0, 120.0)),
            first_token_timeout_s=draw.choice((0.5, 5.0)),
            token_gap_timeout_s=draw.choice((0.2, 2.0)),
            probe_interval_s=draw.choice((0.5, 10.0)),
        ),
        member_settings=MemberSettings(
            in_flight_max=draw.choice((4, 64)),
            queued_max=draw.choice((3, 256)),
            tokens_per_minute=draw.choice((0, 0, 2_000)),
        ),
        weights={member: draw.choice((1_000, 2_000, 4_000)) for member in _named()},
        queued_max=draw.choice((5, 1_000)),
        rules=draw.choice((STRICT, DESIGN)),
    )


def _named() -> list[str]:
    """All members with a name, parents before children."""
    paths = {path for member in PEOPLE for path in _above(member) if "anonymous" not in path}
    return sorted(paths)


def _above(member: str) -> list[str]:
    parts = member.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def _machine(draw: random.Random, node: str) -> MachinePlan:
    slow = draw.choice((1.0, 1.0, 3.0, 30.0))
    return MachinePlan(
        node=node,
        model=draw.choice(MODELS),
        slots=draw.randint(1, 4),
        pace=Pace(
            step_s=0.02 * slow,
            step_each_s=0.001 * slow,
            prefill_tokens_s=2_000.0 / slow,
            cache_tokens=draw.choice((64, 4_096)),
        ),
        stop_s=draw.choice((0.0, 0.01)),
        faults=draw.choice((0.0, 0.0, 0.1, 0.5, 1.0)),
    )


def _client(draw: random.Random, id: str, span_s: float, models: list[str]) -> ClientPlan:
    return ClientPlan(
        id=id,
        at_s=draw.random() * span_s,
        member=draw.choice(PEOPLE),
        model=draw.choice(models),
        route=draw.choice((Route.CHAT, Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS)),
        words=draw.choice((3, 30, 300)),
        tokens_max=draw.randint(1, 30),
        behaviour=draw.choice((Behaviour.READ, Behaviour.READ, *Behaviour)),
        pieces=draw.randint(0, 10),
        moment_s=draw.random() ** 3 * draw.choice((0.1, 1.0, 5.0)),
    )


def _mishap(draw: random.Random, machines: tuple[MachinePlan, ...], span_s: float) -> Mishap:
    return Mishap(
        at_s=draw.random() * span_s,
        act=draw.choice(tuple(Act)),
        node=draw.choice(machines).node,
        seconds=draw.choice((-3_600.0, -1.0, 0.5, 3_600.0, 86_400.0 * 365)),
    )


def draw_fault(draw: random.Random, share: float) -> Fault | None:
    """What goes wrong with an answer, if anything."""
    if draw.random() >= share:
        return None
    kind = draw.choice(tuple(FaultKind))
    return Fault(kind=kind, after_tokens=draw.choice((0, 0, 1, 5, 20)))
