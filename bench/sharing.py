"""E1, E2, E3 and E8: who gets which part of a pool that cannot serve all."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from anser.core.members import bucket_of
from anser.core.rules import DESIGN
from bench.curves import Curves, Points
from bench.engine_model import FLEET
from bench.policies import POLICIES, Anser, Fcfs, Policy, Vtc
from bench.rows import Options, Row, at_least, at_most, figure, mean
from bench.trace import CREDIT, Trace, jain, percentile
from bench.workloads import Rate, Source, chats, openly, saturating
from bench.world import run

__all__ = ["idleness", "overload", "tenants", "weighted"]

WINDOW = DESIGN.window / CREDIT
_SMALL = FLEET[1:2]  # serves about 80 requests of 256 + 256 tokens a minute
_HEAVY = ((800, 250), (200, 120), (3_000, 60), (100, 400))
_PEPPER = b"bench"


def _minute(rpm: float, **more: float) -> Rate:
    return Rate(per_s=rpm / 60, prompt=256, output=256, spread=0.0, regular=True, **more)


def _open(member: str, *rates: Rate) -> Source:
    return openly(member, random.Random(member), *rates)


def overload(options: Options) -> list[Row]:
    """E1: two clients ask for more than their share, one twice as often."""
    rows: list[Row] = []
    found: dict[str, float] = {}
    leads: dict[str, Points] = {}
    bound = 0.0
    policies: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "vtc": Vtc, "anser": Anser}
    for name, make in policies.items():
        options.tell(f"E1 {name}")
        sources = [_open("one", _minute(90)), _open("two", _minute(180))]
        trace = run(make(), sources, options.seconds, fleet=_SMALL)
        gap = trace.gap(("one", "two"), window=WINDOW)
        found[name] = gap.measured
        leads[name] = _lead(trace, "two", "one")
        if name == "anser":
            bound = gap.bound
            rows.append(at_most("E1 difference", gap.measured, "credits", gap.bound))
        else:
            rows.append(figure(f"E1 {name} difference", gap.measured, "credits"))
    if not options.quick:
        rows.append(at_most("E1 difference / FCFS", found["anser"] / found["fcfs"], "1", 0.2))
    options.draw(
        Curves(
            name="E1 lead of who asks for twice as much",
            x="seconds",
            y="credits",
            lines=leads,
            limits={"bound": bound},
        )
    )
    return rows


def _lead(trace: Trace, one: str, other: str) -> Points:
    pairs = zip(trace.over_time(one), trace.over_time(other), strict=True)
    return [(at, mine - theirs) for (at, mine), (_, theirs) in pairs]


def _draw_service(name: str, lines: Mapping[str, Points], options: Options) -> None:
    options.draw(Curves(name=name, x="seconds", y="credits received", lines=lines))


def weighted(options: Options) -> list[Row]:
    """E2: shares by weight, of four alike and of four unlike members beside twenty who chat."""
    weights = {"w1": 1.0, "w2": 2.0, "w3": 3.0, "w4": 4.0}
    options.tell("E2 alike")
    sources = [_open(member, _minute(240)) for member in weights]
    trace = run(Anser(), sources, 2 * options.seconds, weights=weights)
    rows = _shares("E2", trace, weights, options, within=0.01)
    lines = {member: trace.over_time(member) for member in weights}
    _draw_service("E2 service by weight", lines, options)
    unlike = {f"heavy{n}": weight for n, weight in enumerate((2.0, 1.0, 1.0, 4.0))}
    for label, given in (("equal", dict.fromkeys(unlike, 1.0)), ("2:1:1:4", unlike)):
        for name in ("least loaded", "vtc", "dlpm", "anser"):
            options.tell(f"E2 unlike {label} {name}")
            rows += _heavy(f"E2 unlike {label}", name, given, options)
    return rows


def heavy(seed: int) -> list[Source]:
    """Four members who always have requests waiting, each of a kind of its own."""
    found: list[Source] = []
    for number, (prompt, output) in enumerate(_HEAVY):
        draw = random.Random(f"{seed} heavy {number}")
        rate = Rate(per_s=1, prompt=prompt, output=output)
        found += saturating(f"heavy{number}", draw, rate, at_once=60)
    return found


def _heavy(label: str, name: str, weights: Mapping[str, float], options: Options) -> list[Row]:
    traces = [
        run(POLICIES[name](), heavy(seed) + chats(seed), options.seconds, weights=weights)
        for seed in options.all_seeds
    ]
    gaps = [
        trace.gap(list(weights), weights=weights, window=WINDOW, since=options.warm)
        for trace in traces
    ]
    worst = max(gaps, key=lambda gap: gap.measured)
    jains = [_jain(trace, weights, options) for trace in traces]
    p99 = [
        percentile(trace.ttfts(lambda member: member.startswith("light"), options.warm), 0.99)
        for trace in traces
    ]
    rows = [
        figure(f"{label} {name} Jain", mean(jains), "1"),
        figure(f"{label} {name} light p99", mean(p99), "s"),
    ]
    if name != "anser":
        return [figure(f"{label} {name} difference", worst.measured, "credits"), *rows]
    ratio = max(gap.ratio for gap in gaps)
    return [
        figure(f"{label} {name} difference", worst.measured, "credits"),
        figure(f"{label} {name} bound", worst.bound, "credits"),
        at_most(f"{label} {name} difference / bound", ratio, "1", 1.0),
        *rows,
    ]


def _jain(trace: Trace, weights: Mapping[str, float], options: Options) -> float:
    service = trace.service(options.warm)
    return jain([service[member] / weight for member, weight in weights.items()])


def _shares(
    label: str, trace: Trace, weights: Mapping[str, float], options: Options, *, within: float
) -> list[Row]:
    service = trace.service(options.warm)
    total = sum(service[member] for member in weights)
    due = sum(weights.values())
    rows: list[Row] = []
    off: list[float] = []
    for member, weight in weights.items():
        share = service[member] / total
        off.append(abs(share / (weight / due) - 1))
        rows.append(figure(f"{label} share of {member}", share, "1"))
    return [*rows, at_most(f"{label} shares off by", max(off), "1", within)]


def idleness(options: Options) -> list[Row]:
    """E3: what one does not use goes to others, and earns nothing later."""
    unit = options.seconds / 7  # a minute
    rows = _returns(options, unit)
    options.tell("E3 on and off")
    ons = [_minute(30, begins=2 * n * unit, ends=(2 * n + 1) * unit) for n in range(3)]
    trace = run(Anser(), [_open("one", *ons), _open("two", _minute(180))], 6 * unit, fleet=_SMALL)
    asked = [record for record in trace.records if record.ask.member == "one"]
    wait = percentile((r.first_at - r.at for r in asked if r.first_at is not None), 0.99)
    rows.append(figure("E3 on_off_less p99 of who asks less", wait, "s"))
    paces = [sum(trace.service(n * unit, (n + 1) * unit).values()) for n in range(1, 6)]
    part = min(paces[0::2]) / max(paces[1::2])
    rows.append(at_least("E3 on_off_less service off / on", part, "1", 0.9))
    options.tell("E3 increase")
    more = [_minute(20 * n + 20, begins=n * unit, ends=(n + 1) * unit) for n in range(7)]
    sources = [_open("one", _minute(30)), _open("two", *more)]
    trace = run(Anser(), sources, 7 * unit, fleet=_SMALL)
    served = trace.service(5 * unit)["one"] / (2 * unit) / (0.5 * 1_280)
    rows.append(at_least("E3 increase served / asked of who asks less", served, "1", 0.9))
    return [*rows, *_shift(options, unit)]


def _returns(options: Options, unit: float) -> list[Row]:
    rows: list[Row] = []
    lines: dict[str, Points] = {}
    rules: dict[str, Callable[[], Policy]] = {
        "least counter first": lambda: Vtc(lift=False),
        "vtc": Vtc,
        "anser": Anser,
    }
    for name, make in rules.items():
        options.tell(f"E3 return {name}")
        rates = (_minute(90, ends=unit / 4), _minute(120, begins=3 * unit))
        sources = [_open("one", *rates), _open("two", _minute(180))]
        trace = run(make(), sources, 5 * unit, fleet=_SMALL)
        service = trace.service(3.2 * unit, 4.9 * unit)
        share = service["one"] / sum(service.values())
        lines[name] = trace.over_time("one")
        label = f"E3 on_off_overload {name} share after return"
        if name == "anser" and not options.quick:
            rows.append(at_most(label, share, "1", 0.55))
        else:
            rows.append(figure(label, share, "1"))
    _draw_service("E3 service of who comes back", lines, options)
    return rows


def _shift(options: Options, unit: float) -> list[Row]:
    options.tell("E3 dist_shift")
    kinds = ((256, 256), (100, 400), (500, 60))
    shifting = [
        Rate(per_s=1, prompt=prompt, output=output, begins=2 * n * unit, ends=2 * (n + 1) * unit)
        for n, (prompt, output) in enumerate(kinds)
    ]
    sources = [_open("one", *shifting), _open("two", _minute(180))]
    trace = run(Anser(), sources, 6 * unit, fleet=_SMALL)
    gap = trace.gap(("one", "two"), window=WINDOW)
    return [at_most("E3 dist_shift difference", gap.measured, "credits", gap.bound)]


def tenants(options: Options) -> list[Row]:
    """E8: an organisation's share does not depend on how many members it has or pretends to."""
    weights = {"anonymous": 1.0, "a": 1.0, "b": 2.0}
    shares: dict[int, dict[str, float]] = {}
    rows: list[Row] = []
    for identities in (30, 300):
        options.tell(f"E8 {identities} anonymous")
        crowds = {
            **{f"anonymous/{n}": 120 // identities or 1 for n in range(identities)},
            "a/p/x": 40,
            "a/p/y": 40,
            "b/p/x": 90,
        }
        trace = run(Anser(), _crowds(crowds), options.seconds, weights=weights)
        shares[identities] = _by_tenant(trace, options)
        for tenant, share in shares[identities].items():
            rows.append(figure(f"E8 {identities} anonymous, share of {tenant}", share, "1"))
    change = max(abs(shares[300][tenant] - shares[30][tenant]) for tenant in weights)
    rows.append(at_most("E8 change by ten times the identities", change, "1", 0.02))
    return [*rows, _cookies(options)]


def _crowds(crowds: Mapping[str, int]) -> list[Source]:
    rate = Rate(per_s=1, prompt=800, output=250)
    each = (
        saturating(member, random.Random(member), rate, at_once=number)
        for member, number in crowds.items()
    )
    return list(chain.from_iterable(each))


def _by_tenant(trace: Trace, options: Options) -> dict[str, float]:
    service = trace.service(options.warm)
    total = sum(service.values())
    found: dict[str, float] = {}
    for member, value in service.items():
        tenant = member.partition("/")[0]
        found[tenant] = found.get(tenant, 0.0) + value / total
    return found


def _cookies(options: Options) -> Row:
    """One network asks under ten cookies, nineteen under one each: what it gets of theirs."""
    options.tell("E8 cookies")
    networks: Sequence[str] = [f"198.51.{n}.7" for n in range(20)]
    members = [bucket_of(address, pepper=_PEPPER) for address in networks]
    crowds = dict.fromkeys(members, 6)
    crowds[members[0]] = 60
    trace = run(Anser(), _crowds(crowds), options.seconds)
    service = trace.service(options.warm)
    others = mean([service[member] for member in set(members[1:])])
    return at_most("E8 ten cookies / one cookie", service[members[0]] / others, "1", 1.1)
