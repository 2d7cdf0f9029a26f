"""E9: several schedulers that share the pool, and know of each other what was so a moment ago."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from zlib import crc32

from anser.core.events import (
    Cancelled,
    Decision,
    Event,
    NodeChanged,
    NodeGone,
    Submitted,
    Weighed,
)
from anser.core.gossip import Message
from anser.core.rules import DESIGN
from anser.core.shards import Gossip, Shard
from bench.rows import Options, Row, at_least, at_most, figure, mean
from bench.sharing import heavy
from bench.trace import CREDIT, Gap, Trace, percentile
from bench.workloads import Source, chats
from bench.world import World

__all__ = ["Shards", "shards"]

_QUEUED_MAX = 1_000_000
_TRIES_MAX = 3
_ON_ITS_WAY_S = 0.01  # a message from shard to shard
_INPUT_MOST = 3_900.0  # credits: the longest prompt of the four, fresh
_CASES = (
    (2, 0.25),
    (4, 0.25),
    (8, 0.25),
    (2, 1.0),
    (4, 1.0),
    (8, 1.0),
    (2, 5.0),
    (4, 5.0),
    (8, 5.0),
)
_QUICK = ((2, 0.25), (4, 1.0))
_HEAVY = [f"heavy{number}" for number in range(4)]


@dataclass(slots=True)
class Shards:
    """So many shards as one policy. Nodes go round; each request comes to any of them."""

    number: int
    every_s: float
    _shards: list[Shard] = field(default_factory=list[Shard])
    _owners: dict[str, Shard] = field(default_factory=dict[str, Shard])
    _homes: dict[str, Shard] = field(default_factory=dict[str, Shard])  # by request
    _wire: list[tuple[float, int, Message]] = field(
        default_factory=list[tuple[float, int, Message]]
    )
    _sent: count[int] = field(default_factory=count)
    _by_name: dict[str, Shard] = field(default_factory=dict[str, Shard])

    def __post_init__(self) -> None:
        names = [f"s{number}" for number in range(self.number)]
        gossip = Gossip(every_s=self.every_s, lost_s=max(2.0, 4 * self.every_s))
        for name in names:
            shard = Shard(
                name,
                [other for other in names if other != name],
                queued_max=_QUEUED_MAX,
                retries_max=_TRIES_MAX,
                gossip=gossip,
            )
            self._shards.append(shard)
            self._by_name[name] = shard

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Let messages arrive that are due, then tell the event to whom it concerns."""
        decisions = self.talk(now)
        for shard in self._told(event):
            decisions += shard.handle(event, now)
        return decisions + self.talk(now)

    def paid(self) -> Mapping[str, int]:
        """What each member has been charged so far by all of them, in micro-credits."""
        found: dict[str, int] = {}
        for shard in self._shards:
            for account in shard.sums.totals():
                found[account] = found.get(account, 0) + shard.sums.own(account)
        return found

    def _told(self, event: Event) -> list[Shard]:
        match event:
            case Submitted():
                shard = self._shards[crc32(event.request.id.encode()) % self.number]
                self._homes[event.request.id] = shard
                return [shard]
            case NodeChanged() | NodeGone():
                owner = self._shards[len(self._owners) % self.number]
                return [self._owners.setdefault(event.node, owner)]
            case Weighed():
                return self._shards
            case Cancelled():
                return [self._homes[event.request]]
            case _:
                return [self._homes[event.lease.partition(".")[0]]]

    def talk(self, now: float) -> list[Decision]:
        """Let messages arrive that are due, and send those that are."""
        decisions: list[Decision] = []
        while self._wire and self._wire[0][0] <= now:
            message = heapq.heappop(self._wire)[2]
            decisions += self._by_name[message.receiver].hear(message, now)
        for shard in self._shards:
            for message in shard.speak(now):
                at = now + _ON_ITS_WAY_S
                heapq.heappush(self._wire, (at, next(self._sent), message))
        return decisions


@dataclass(slots=True)
class _World(World):
    """A world in which messages arrive when they do, whatever else happens."""

    def run(self, sources: Iterable[Source], seconds: float) -> Trace:
        """Let `sources` ask for so long."""
        self._talk()
        return World.run(self, sources, seconds)

    def _talk(self) -> None:
        assert isinstance(self.policy, Shards)
        self._act(self.policy.talk(self.now))
        self._at(self.now + _ON_ITS_WAY_S, self._talk)


def shards(options: Options) -> list[Row]:
    """E9: how much further members get ahead of each other than with one scheduler."""
    one = _measure(1, 0.25, options)
    rows = [
        figure("E9 1 shard difference", one.worst, "credits"),
        figure("E9 1 shard service", one.rate, "credits/s"),
        figure("E9 1 shard light p99", one.light_s, "s"),
    ]
    for number, every_s in _QUICK if options.quick else _CASES:
        label = f"E9 {number} shards, {every_s:g} s"
        found = _measure(number, every_s, options)
        part, unheard = found.rate / one.rate, every_s * found.rate
        slack = unheard + (number - 1) * every_s * found.freed_s * _INPUT_MOST
        ratio = max(gap.measured / (gap.bound + 2 * slack) for gap in found.gaps)
        rows += [
            figure(f"{label} difference", found.worst, "credits"),
            at_most(f"{label} difference / bound", ratio, "1", 1.0),
            _target(
                options,
                at_most(f"{label} more than one", found.worst - one.worst, "credits", unheard),
            ),
            figure(f"{label} more than one, mean", found.gap - one.gap, "credits"),
            _target(options, at_least(f"{label} service / one", part, "1", 0.95)),
            figure(f"{label} light p99", found.light_s, "s"),
        ]
    return rows


def _target(options: Options, row: Row) -> Row:
    """In a short run, the moment before anybody has heard of anybody is all that is measured."""
    return figure(row.name, row.value, row.unit) if options.quick else row


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """All seeds of one case."""

    gaps: list[Gap]
    rate: float  # credits a second
    freed_s: float  # slots that become free a second
    light_s: float

    @property
    def gap(self) -> float:
        """The largest difference of a run, the mean over the seeds, in credits."""
        return mean([gap.measured for gap in self.gaps])

    @property
    def worst(self) -> float:
        """The largest difference of all runs, in credits."""
        return max(gap.measured for gap in self.gaps)


def _measure(number: int, every_s: float, options: Options) -> _Found:
    options.tell(f"E9 {number} shards, {every_s:g} s")
    traces = [
        _World(Shards(number, every_s)).run(heavy(seed) + chats(seed), options.seconds)
        for seed in options.all_seeds
    ]
    since, span_s = options.warm, options.seconds - options.warm
    gaps = [trace.gap(_HEAVY, window=DESIGN.window / CREDIT, since=since) for trace in traces]
    waits = [trace.ttfts(lambda one: one.startswith("light"), since) for trace in traces]
    return _Found(
        gaps=gaps,
        rate=mean([sum(trace.service(since).values()) for trace in traces]) / span_s,
        freed_s=mean([_ended(trace, since) for trace in traces]) / span_s,
        light_s=mean([percentile(each, 0.99) for each in waits]),
    )


def _ended(trace: Trace, since: float) -> int:
    return sum(record.ended_at is not None and record.ended_at >= since for record in trace.records)
