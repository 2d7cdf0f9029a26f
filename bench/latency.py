"""E4 and E5: what those who ask little wait while others ask for more than there is."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from math import inf

from anser.core.rules import DESIGN
from bench.curves import Curves, Points, distribution
from bench.engine_model import FLEET
from bench.policies import POLICIES, Anser, Fcfs, Policy, RequestsPerMinute, Vtc
from bench.rows import Options, Row, at_least, at_most, figure, mean
from bench.trace import Trace, percentile
from bench.workloads import Ask, Rate, Source, Text, chats, openly
from bench.world import run

__all__ = ["arena", "flood"]

_FLOOD = Rate(per_s=12, prompt=800, output=250)
_LONG = Rate(per_s=4, prompt=6_000, output=60)
_ABLATIONS: dict[str, Callable[[], Policy]] = {
    "no express slots": lambda: Anser(replace(DESIGN, express=0.0)),
    "no gate": lambda: Anser(replace(DESIGN, gate_s=inf)),
    "no hold": lambda: Anser(replace(DESIGN, hold=False)),
    "no throttle": lambda: Anser(replace(DESIGN, throttle=False)),
}


def _light(member: str) -> bool:
    return member.startswith("light")


def _flooded(make: Callable[[], Policy], options: Options, seed: int, rate: Rate | None) -> Trace:
    sources = chats(seed)
    if rate is not None:
        sources.append(openly("flood", random.Random(f"{seed} flood"), rate))
    return run(make(), sources, options.seconds)


def flood(options: Options) -> list[Row]:
    """E5: one floods the pool, twenty chat."""
    rows: list[Row] = []
    pace: dict[str, float] = {}
    waits: dict[str, Points] = {}
    for name, make in {**POLICIES, **_ABLATIONS}.items():
        options.tell(f"E5 {name}")
        traces = [_flooded(make, options, seed, _FLOOD) for seed in options.all_seeds]
        solos = [_flooded(make, options, seed, None) for seed in options.all_seeds]
        pace[name] = mean([trace.tokens_s(options.warm) for trace in traces])
        if name in POLICIES:
            waits[name] = distribution(_ttfts(traces, options))
        if name == "anser":
            waits["anser, no flood"] = distribution(_ttfts(solos, options))
        rows += _waits(f"E5 {name}", traces, solos, options)
        rows.append(figure(f"E5 {name} tokens", pace[name], "tokens/s"))
        rows.append(figure(f"E5 {name} hit", mean([t.hit(options.warm) for t in traces]), "1"))
    rows.append(at_least("E5 tokens / FCFS", pace["anser"] / pace["fcfs"], "1", 0.97))
    options.draw(
        Curves(
            name="E5 time to first token of those who chat",
            x="seconds",
            y="part of their requests",
            lines=waits,
            log_x=True,
        )
    )
    for name in ("vtc", "dlpm", "no gate", "anser"):
        options.tell(f"E5 long prompts {name}")
        make = {**POLICIES, **_ABLATIONS}[name]
        traces = [_flooded(make, options, seed, _LONG) for seed in options.all_seeds]
        wait = mean([_p99(trace, options) for trace in traces])
        rows.append(figure(f"E5 long prompts {name} light p99", wait, "s"))
        tokens = mean([trace.tokens_s(options.warm) for trace in traces])
        rows.append(figure(f"E5 long prompts {name} tokens", tokens, "tokens/s"))
    return rows


def _ttfts(traces: list[Trace], options: Options) -> Iterator[float]:
    return chain.from_iterable(trace.ttfts(_light, options.warm) for trace in traces)


def _p99(trace: Trace, options: Options) -> float:
    return percentile(trace.ttfts(_light, options.warm), 0.99)


def _waits(name: str, traces: list[Trace], solos: list[Trace], options: Options) -> list[Row]:
    waits = [trace.ttfts(_light, options.warm) for trace in traces]
    p50 = mean([percentile(each, 0.5) for each in waits])
    p99 = mean([percentile(each, 0.99) for each in waits])
    solo = mean([_p99(trace, options) for trace in solos])
    good = mean([sum(one < 2 for one in each) / len(each) for each in waits if each])
    rows = [figure(f"{name} light p50", p50, "s"), figure(f"{name} solo p99", solo, "s")]
    rows.append(figure(f"{name} light within 2 s", good, "1"))
    if name == "E5 anser":
        rows.append(at_most("E5 light p99", p99, "s", 1.0))
        rows.append(at_most("E5 light p99 / solo", p99 / solo, "1", 6.0))
    else:
        rows.append(figure(f"{name} light p99", p99, "s"))
        rows.append(figure(f"{name} light p99 / solo", p99 / solo, "1"))
    return rows


def _read_arena(options: Options) -> list[Ask]:
    assert options.traces is not None
    asks: list[Ask] = []
    with (options.traces / "vtc_arena_real.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            tokens = max(1, int(row["prompt_tokens"]))
            ask = Ask(
                at=float(row["req_time_s"]),
                member=f"client{row['client']}",
                prompt=Text().grow(tokens),
                prompt_tokens=tokens,
                output_tokens=max(1, int(row["output_tokens"])),
                waits=False,
            )
            asks.append(ask)
    return asks[:150] if options.quick else asks


def _each(asks: list[Ask]) -> Iterator[Source]:
    for member in {ask.member: None for ask in asks}:
        yield _replay(asks, member)


def _replay(asks: list[Ask], member: str) -> Source:
    for ask in asks:
        if ask.member == member:
            yield ask


def arena(options: Options) -> list[Row]:
    """E4: ten minutes of 27 clients of Chatbot Arena, on a node that cannot keep up."""
    asks = _read_arena(options)
    total = Counter(ask.member for ask in asks)
    lighter = {
        member for member, _ in sorted(total.items(), key=lambda one: one[1])[: len(total) // 2]
    }
    policies: dict[str, Callable[[], Policy]] = {
        "fcfs": Fcfs,
        "vtc": Vtc,
        "anser": Anser,
        **{f"{n} a minute": partial(RequestsPerMinute, n) for n in (5, 10, 20, 30)},
    }
    rows: list[Row] = []
    pace: dict[str, float] = {}
    waits: dict[str, float] = {}
    for name, make in policies.items():
        options.tell(f"E4 {name}")
        trace = run(make(), _each(asks), asks[-1].at, fleet=FLEET[1:2])
        pace[name] = trace.tokens_s(0)
        waits[name] = percentile(trace.ttfts(lighter.__contains__), 0.5)
        rows.append(figure(f"E4 {name} tokens", pace[name], "tokens/s"))
        rows.append(figure(f"E4 {name} lighter half p50", waits[name], "s"))
    rows.append(at_least("E4 tokens / FCFS", pace["anser"] / pace["fcfs"], "1", 0.99))
    rows.append(at_most("E4 lighter half p50 / FCFS", waits["anser"] / waits["fcfs"], "1", 0.1))
    rows.append(figure("E4 5 a minute tokens / FCFS", pace["5 a minute"] / pace["fcfs"], "1"))
    return rows
