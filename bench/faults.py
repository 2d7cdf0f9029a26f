"""E10: nodes die or become slow, clients leave; nothing is lost, all pay for what they got."""

from __future__ import annotations

import random
from dataclasses import replace

from anser.core.rules import DESIGN
from bench.policies import Anser
from bench.rows import Options, Row, at_most, figure
from bench.sharing import heavy
from bench.trace import CREDIT, Trace, percentile
from bench.workloads import Source, chats, leaving
from bench.world import Fault, run

__all__ = ["faults", "paid_is_delivered"]

_HEAVY = [f"heavy{number}" for number in range(4)]
_CANCELLED = 0.2


def _until(source: Source, end: float) -> Source:
    """The same, but nobody asks after `end`."""
    answered: float | None = None
    while True:
        ask = next(source) if answered is None else source.send(answered)
        if ask.at > end:
            return
        answered = yield ask


def _run(seed: int, options: Options, *, asked_s: float, done_s: float) -> tuple[Anser, Trace]:
    draw = random.Random(f"{seed} leaves")
    sources = [
        leaving(_until(source, asked_s), draw, _CANCELLED) for source in heavy(seed) + chats(seed)
    ]
    unit = options.seconds / 7
    plan = (
        Fault(at=2 * unit, node="a", speed=0.0),
        Fault(at=3 * unit, node="a", speed=1.0),
        Fault(at=4 * unit, node="b", speed=0.3),
        Fault(at=5 * unit, node="c", speed=0.0),
        Fault(at=5 * unit, node="d", speed=0.0),
        Fault(at=5.5 * unit, node="c", speed=1.0),
    )
    policy = Anser()
    return policy, run(policy, sources, done_s, faults=plan)


def paid_is_delivered(policy: Anser, trace: Trace) -> float:
    """How much more or less than was delivered has been charged, in credits, once all has ended."""
    return abs(policy.service / CREDIT - sum(trace.served.values()))


def faults(options: Options) -> list[Row]:
    """E10: the largest node is lost and comes back, another slows down, two more are lost."""
    rows: list[Row] = []
    ratios: list[float] = []
    lost = off = 0.0
    broken: list[int] = []
    waits: list[float] = []
    for seed in options.all_seeds:
        options.tell(f"E10 seed {seed}")
        asked_s = options.seconds
        policy, trace = _run(seed, options, asked_s=asked_s, done_s=asked_s + 600)
        # When nobody asks any more there is nothing to share.
        busy = _before(trace, asked_s)
        ratios.append(busy.gap(_HEAVY, window=DESIGN.window / CREDIT, since=options.warm).ratio)
        lost += sum(not record.outcome for record in trace.records)
        off = max(off, paid_is_delivered(policy, trace))
        broken.append(sum(record.outcome == "broken" for record in trace.records))
        light = trace.ttfts(lambda member: member.startswith("light"), options.warm)
        waits.append(percentile(light, 0.99))
    rows.append(at_most("E10 difference / bound", max(ratios), "1", 1.0))
    rows.append(at_most("E10 lost requests", lost, "requests", 0.0))
    rows.append(at_most("E10 charged less delivered", off, "credits", 0.001))
    rows.append(figure("E10 answers broken off", max(broken), "requests"))
    rows.append(figure("E10 light p99", max(waits), "s"))
    return rows


def _before(trace: Trace, until: float) -> Trace:
    """The same run as if it had ended then."""
    return replace(trace, samples=[sample for sample in trace.samples if sample.at <= until])
