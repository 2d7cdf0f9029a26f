"""What shall happen in a world: drawn from the seed before it begins."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from anser.adapters.memory_engine import Fault, FaultKind, Pace
from anser.config import GatewaySettings, MemberSettings
from anser.core.rules import DESIGN, STRICT, Rules
from anser.ports import Route

__all__ = ["Act", "Behaviour", "ClientPlan", "Lie", "MachinePlan", "Mishap", "Plan", "draw_plan"]

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
NAMED = ("lab", "lab/default", "lab/default/dee", "uni", "uni/law", "uni/law/cy", "uni/physics")
NAMED += ("uni/physics/ada", "uni/physics/bo")  # parents before children
_WEIGHTS = (1_000, 2_000, 4_000)
_WINDOW = 300 * 1_000_000  # so that little worlds get beyond it
_CROWDS = 0.3  # of all worlds
_HEDGING = 0.5  # worlds where a first token that is late is asked of a second node
_CONTINUING = 0.7  # worlds where another node goes on with an answer whose node has died


class Behaviour(enum.Enum):
    """What a client does with its answer."""

    READ = "reads it all"
    LEAVE = "leaves after some pieces"
    CANCEL = "is gone at some moment"
    DAWDLE = "reads slowly"


class Lie(enum.Enum):
    """What a machine says of its answers that is not so."""

    CACHED = "more cached tokens than the prompt has"
    PROMPT = "a longer prompt than it was sent"
    MORE = "more tokens than it streamed"
    LESS = "fewer tokens than it streamed"
    WILD = "numbers that cannot be"


class Act(enum.Enum):
    """What befalls the platform."""

    SLOW = "a node is slow for a while"
    SUSPEND = "the machine stands still for some seconds, as a laptop that was closed"
    REWEIGH = "a member's weight changes"
    CRASH = "the engine of a node goes down"
    RECOVER = "it comes up again"
    DRAIN = "a node is drained"
    REMOVE = "a node is removed"
    ADD = "a node is listed again"
    JUMP = "the wall clock jumps"
    DISK_FULL = "the store takes no more writes"
    DISK_FREE = "it does again"
    JOIN = "a member is added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """One request and the client behind it."""

    id: str
    at_s: float
    member: str
    model: str
    route: Route
    words: int
    estimate: float  # of its prompt's tokens before they are counted, over what they are
    tokens_max: int
    cached: bool  # engines may keep its prompt
    batch: bool
    deadline_s: float | None  # from when it asks
    behaviour: Behaviour
    pieces: int  # after which it leaves
    moment_s: float  # after which it is gone, or between two pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """One node's machine."""

    node: str
    models: tuple[str, ...]
    slots: int
    claims: int  # slots that it says it has
    declines: bool  # what it has no slot for; otherwise that waits inside
    pace: Pace
    stop_s: float  # from being told to stop until it has
    faults: float  # share of its answers that go wrong
    lie: Lie | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """Something befalls the platform."""

    at_s: float
    act: Act
    node: str
    jump_s: float  # by which the wall clock jumps
    for_s: float  # how long it is slow, or stands still
    slower: float  # times
    member: str
    weight: int


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
    """The plan of this seed: many things going wrong, or many requests waiting for long."""
    draw = random.Random(seed)
    rules = draw.choice((STRICT, DESIGN, replace(DESIGN, window=_WINDOW)))
    plan = _crowd(draw, rules) if draw.random() < _CROWDS else _mixture(draw, rules)
    clients = [replace(client, id=f"r{number}") for number, client in enumerate(plan.clients)]
    if rules is STRICT:  # the oracle knows no more
        clients = [replace(one, cached=False, batch=False, deadline_s=None) for one in clients]
    continues = random.Random(f"{seed} seam").random() < _CONTINUING
    lasts_s = random.Random(f"{seed} duration").choice((0.7, 4.0, *[3_600.0] * 6))
    hedges = random.Random(f"{seed} hedge").random() < _HEDGING
    settings = replace(
        plan.settings, continue_answers=continues, answer_timeout_s=lasts_s, hedge=hedges
    )
    return replace(plan, clients=tuple(clients), settings=settings)


def _mixture(draw: random.Random, rules: Rules) -> Plan:
    models = draw.choice((MODELS[:1], MODELS))
    machines = tuple(_machine(draw, f"n{number}", models) for number in range(draw.randint(1, 4)))
    span_s = draw.choice((1.0, 5.0, 20.0))
    wanted = [*[model for machine in machines for model in machine.models] * 8, *models, "unknown"]
    people = draw.choice((PEOPLE, PEOPLE, draw.sample(PEOPLE, 3)))
    clients = [_client(draw, span_s, wanted, people) for _ in range(draw.randint(5, 60))]
    mishaps = [_mishap(draw, machines, span_s) for _ in range(draw.randint(0, 10))]
    return Plan(
        clients=tuple(clients),
        machines=machines,
        mishaps=tuple(sorted(mishaps, key=lambda mishap: mishap.at_s)),
        settings=GatewaySettings(
            queue_timeout_s=draw.choice((1.0, 10.0, 120.0)),
            first_token_timeout_s=draw.choice((0.5, 5.0, 60.0)),
            token_gap_timeout_s=draw.choice((0.2, 2.0)),
            probe_interval_s=draw.choice((0.5, 10.0)),
        ),
        member_settings=MemberSettings(
            in_flight_max=draw.choice((4, 64)),
            queued_max=draw.choice((3, 256)),
            tokens_per_minute=draw.choice((0, 0, 0, 2_000)),
        ),
        weights={member: draw.choice(_WEIGHTS) for member in NAMED},
        queued_max=draw.choice((5, 1_000)),
        rules=rules,
    )


def _crowd(draw: random.Random, rules: Rules) -> Plan:
    """A few members, each with requests of its own kind, all of them waiting at once for long."""
    models = MODELS[:1]
    machines = tuple(_machine(draw, f"n{number}", models) for number in range(draw.randint(1, 2)))
    people = draw.sample(PEOPLE, draw.randint(2, 4))
    kinds = {person: (draw.choice((30, 300)), draw.choice((3, 30))) for person in people}
    late = {person: draw.choice((0.0, 0.0, 2.0, 8.0)) for person in people}
    clients: list[ClientPlan] = []
    for _ in range(draw.randint(60, 160)):
        client = _client(draw, 1.0, list(models), people)
        words, tokens = kinds[client.member]
        client = replace(client, at_s=client.at_s + late[client.member])
        behaviour = draw.choice((*[Behaviour.READ] * 8, *Behaviour))
        deadline_s = draw.choice((*[None] * 8, client.deadline_s))
        client = replace(client, words=words, tokens_max=tokens, behaviour=behaviour)
        clients.append(replace(client, deadline_s=deadline_s))
    return Plan(
        clients=tuple(clients),
        machines=tuple(
            replace(machine, faults=draw.choice((0.0, 0.0, 0.05)), claims=machine.slots)
            for machine in machines
        ),
        mishaps=tuple(_mishap(draw, machines, 5.0) for _ in range(draw.choice((0, 0, 1, 3)))),
        settings=GatewaySettings(queue_timeout_s=600.0, probe_interval_s=10.0),
        member_settings=MemberSettings(in_flight_max=256, queued_max=256, tokens_per_minute=0),
        weights={member: draw.choice(_WEIGHTS) for member in NAMED},
        queued_max=1_000,
        rules=rules,
    )


def _machine(draw: random.Random, node: str, models: tuple[str, ...]) -> MachinePlan:
    slow = draw.choice((1.0, 1.0, 3.0, 30.0))
    slots = draw.randint(1, 4)
    return MachinePlan(
        node=node,
        models=tuple(draw.sample(models, draw.choice((1, 1, len(models))))),
        slots=slots,
        claims=slots * draw.choice((1, 1, 1, 3)),
        declines=draw.random() < 0.5,
        pace=Pace(
            step_s=0.02 * slow,
            step_each_s=0.001 * slow,
            prefill_tokens_s=2_000.0 / slow,
            cache_tokens=draw.choice((64, 4_096)),
        ),
        stop_s=draw.choice((0.0, 0.01)),
        faults=draw.choice((0.0, 0.0, 0.0, 0.1, 0.5, 1.0)),
        lie=draw.choice((None, None, None, *Lie)),
    )


def _client(
    draw: random.Random, span_s: float, models: list[str], crowd: Sequence[str]
) -> ClientPlan:
    return ClientPlan(
        id="",
        at_s=draw.random() ** draw.choice((1, 3)) * span_s,
        member=draw.choice(crowd),
        model=draw.choice(models),
        route=draw.choice((Route.CHAT, Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS)),
        words=draw.choice((3, 30, 300)),
        estimate=draw.choice((1.0, 1.0, 0.5, 2.0)),
        tokens_max=draw.randint(1, 30),
        cached=draw.random() < 0.8,
        batch=draw.random() < 0.05,
        deadline_s=draw.choice((None, None, None, None, 0.1, 3.0)),
        behaviour=draw.choice((Behaviour.READ, Behaviour.READ, *Behaviour)),
        pieces=draw.randint(0, 10),
        moment_s=draw.random() ** 3 * draw.choice((0.1, 1.0, 5.0)),
    )


def _mishap(draw: random.Random, machines: tuple[MachinePlan, ...], span_s: float) -> Mishap:
    return Mishap(
        at_s=draw.random() * span_s,
        act=draw.choice(tuple(Act)),
        node=draw.choice(machines).node,
        jump_s=draw.choice((-86_400.0, -3_600.0, -1.0, 0.5, 3_600.0, 86_400.0 * 365)),
        for_s=draw.random() * draw.choice((1.0, 10.0)),
        slower=draw.choice((1 / 0.3, 10.0, 100.0)),
        member=draw.choice(NAMED),
        weight=draw.choice(_WEIGHTS),
    )


def draw_fault(draw: random.Random, share: float) -> Fault | None:
    """What goes wrong with an answer, if anything."""
    if draw.random() >= share:
        return None
    kind = draw.choice(tuple(FaultKind))
    return Fault(kind=kind, after_tokens=draw.choice((0, 0, 1, 5, 20)))
