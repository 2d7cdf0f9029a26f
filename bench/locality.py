"""E6 and E7: how much is found in the caches, and what that is worth."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from anser.core.rules import DESIGN
from bench.curves import Curves
from bench.engine_model import BLOCK_TOKENS, FLEET
from bench.policies import POLICIES, Anser
from bench.rows import Options, Row, at_least, at_most, figure, mean
from bench.trace import CREDIT, Trace, jain
from bench.workloads import Ask, Source, agent
from bench.world import run

__all__ = ["agents", "mooncake"]

_MEMBERS = 12
_SESSIONS = 12
_PEOPLE = 20
_SPEED = 0.6
_SHORTER = 8  # lengths of the trace over ours, so that a block of 512 tokens is one of 64
_NAMES = [f"u{number}" for number in range(_MEMBERS)]


def sessions(seed: int) -> list[Source]:
    """Twelve members with twelve agents each: far more than the pool can serve."""
    found: list[Source] = []
    for member in _NAMES:
        for number in range(_SESSIONS):
            draw = random.Random(f"{seed} {member} {number}")
            found.append(agent(member, draw, begins_at=5 * draw.random()))
    return found


def agents(options: Options) -> list[Row]:
    """E6: against VTC, which looks at no cache; and the window, which buys locality."""
    rows: list[Row] = []
    pace: dict[str, float] = {}
    for name in ("round robin", "least loaded", "cache aware", "vtc", "dlpm", "anser"):
        options.tell(f"E6 {name}")
        traces = [run(POLICIES[name](), sessions(s), options.seconds) for s in options.all_seeds]
        window = DESIGN.window if name == "anser" else 0
        pace[name], found = _rows(f"E6 {name}", traces, options, window=window)
        rows += found
    if not options.quick:
        rows.append(at_least("E6 tokens / VTC", pace["anser"] / pace["vtc"], "1", 2.5))
    return rows + _windows(options)


def _windows(options: Options) -> list[Row]:
    """What a window of so many credits buys in tokens, and costs in fairness."""
    rows: list[Row] = []
    found: dict[str, list[tuple[float, float]]] = {"tokens": [], "difference": [], "bound": []}
    for window in (0, 1_000, 4_000, 16_000, 64_000):
        options.tell(f"E6 window {window}")
        rules = replace(DESIGN, window=window * CREDIT)
        traces = [run(Anser(rules), sessions(s), options.seconds) for s in options.all_seeds]
        each = _rows(f"E6 window {window}", traces, options, window=rules.window)[1]
        rows += each
        for row in each:
            kind = row.name.removeprefix(f"E6 window {window} ")
            if kind in found:
                found[kind].append((window / 1_000, row.value))
    x = "window, thousands of credits"
    tokens = {"tokens": found.pop("tokens")}
    options.draw(Curves(name="E6 tokens by window", x=x, y="tokens/s", lines=tokens))
    options.draw(Curves(name="E6 difference by window", x=x, y="credits", lines=found))
    return rows


def _rows(
    label: str, traces: list[Trace], options: Options, *, window: int
) -> tuple[float, list[Row]]:
    pace = mean([trace.tokens_s(options.warm) for trace in traces])
    gaps = [trace.gap(_NAMES, window=window / CREDIT, since=options.warm) for trace in traces]
    worst = max(gaps, key=lambda gap: gap.measured)
    service = [trace.service(options.warm) for trace in traces]
    even = mean([jain([each.get(name, 0.0) for name in _NAMES]) for each in service])
    rows = [
        figure(f"{label} tokens", pace, "tokens/s"),
        figure(f"{label} hit", mean([trace.hit(options.warm) for trace in traces]), "1"),
        figure(f"{label} Jain", even, "1"),
        figure(f"{label} difference", worst.measured, "credits"),
    ]
    if window or label == "E6 anser":
        ratio = max(gap.ratio for gap in gaps)
        rows.append(figure(f"{label} bound", worst.bound, "credits"))
        rows.append(at_most(f"{label} difference / bound", ratio, "1", 1.0))
    return pace, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[bytes, ...]


def _read(path: Path, most: int | None) -> list[_Line]:
    lines: list[_Line] = []
    for text in path.read_text(encoding="utf-8").splitlines()[:most]:
        row = json.loads(text)
        tokens = max(1, row["input_length"] // _SHORTER)
        names = row["hash_ids"][: tokens // BLOCK_TOKENS]
        line = _Line(
            at=row["timestamp"] / 1_000 / _SPEED,
            prompt_tokens=tokens,
            output_tokens=max(1, row["output_length"] // _SHORTER),
            blocks=tuple(name.to_bytes(8, "big") for name in names),
        )
        lines.append(line)
    return lines


def _ideal(lines: list[_Line]) -> float:
    """The hit of one cache that forgets nothing."""
    seen: set[bytes] = set()
    cached = 0
    for line in lines:
        for name in line.blocks:
            if name not in seen:
                break
            cached += BLOCK_TOKENS
        seen.update(line.blocks)
    return cached / sum(line.prompt_tokens for line in lines)


def _people(lines: list[_Line]) -> Iterator[Source]:
    """Each conversation, by its root, is one of twenty people's."""
    by_person: dict[str, list[_Line]] = {}
    for line in lines:
        root = line.blocks[1] if len(line.blocks) > 1 else b"0"
        by_person.setdefault(f"p{int.from_bytes(root, 'big') % _PEOPLE}", []).append(line)
    for person, theirs in by_person.items():
        yield _replay(person, theirs)


def _replay(person: str, lines: list[_Line]) -> Source:
    for line in lines:
        yield Ask(
            at=line.at,
            member=person,
            prompt=line.blocks,
            prompt_tokens=line.prompt_tokens,
            output_tokens=line.output_tokens,
            waits=False,
        )


def mooncake(options: Options) -> list[Row]:
    """E7: two traces of real conversations, an eighth as long, at 0.6 of their speed."""
    assert options.traces is not None
    rows: list[Row] = []
    roomy = [replace(spec, cache_tokens=100 * spec.cache_tokens) for spec in FLEET]
    for kind in ("conversation", "synthetic"):
        path = options.traces / f"mooncake_{kind}_sample.jsonl"
        lines = _read(path, 100 if options.quick else None)
        ideal = _ideal(lines)
        rows.append(figure(f"E7 {kind} ideal hit", ideal, "1"))
        for label, fleet in (("", FLEET), (" roomy", roomy)):
            for name in ("least loaded", "cache aware", "anser"):
                options.tell(f"E7 {kind}{label} {name}")
                trace = run(POLICIES[name](), _people(lines), lines[-1].at + 120, fleet=fleet)
                part = trace.hit() / ideal
                if label and name == "anser" and not options.quick:
                    rows.append(at_least(f"E7 {kind}{label} hit / ideal", part, "1", 0.8))
                else:
                    rows.append(figure(f"E7 {kind}{label} {name} hit / ideal", part, "1"))
    return rows
