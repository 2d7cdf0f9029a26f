"""What came of a run: a record by request, what each member was served, and figures from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from anser.core.fairness import price
from bench.curves import Points
from bench.workloads import Ask

__all__ = ["CREDIT", "Gap", "Record", "Trace", "credits", "jain", "percentile"]

CREDIT = 1_000_000  # micro-credits
_UNSERVED_S = 10.0  # who has waited so long at the end counts as served then


def credits(*, fresh: int = 0, cached: int = 0, output: int = 0) -> float:
    """What this costs, in credits: as many as fresh prompt tokens."""
    return price(fresh=fresh, cached=cached, output=output, factor_milli=1_000) / CREDIT


def percentile(values: Iterable[float], part: float) -> float:
    """The value below which this part lies; NaN of nothing."""
    order = sorted(values)
    return order[min(len(order) - 1, int(part * len(order)))] if order else float("nan")


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all are equal, 1/n where one has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


@dataclass(slots=True, eq=False, kw_only=True)
class Record:
    """One request, as its client saw it."""

    id: str
    ask: Ask
    at: float
    node: str = ""
    tries: int = 0
    first_at: float | None = None
    ended_at: float | None = None
    output: int = 0
    cached: int = 0
    due: float = 0.0  # credits not delivered yet, of a request that runs
    outcome: str = ""
    left: bool = False

    @property
    def cost(self) -> float:
        """Credits of what was delivered."""
        if not self.output:
            return 0.0
        fresh = self.ask.prompt_tokens - self.cached
        return credits(fresh=fresh, cached=self.cached, output=self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    at: float
    served: Mapping[str, float]
    paid: Mapping[str, float]
    backlogged: frozenset[str]  # all the time since the sample before
    due_most: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest service difference of two members while both waited, and its bound."""

    measured: float
    bound: float
    members: tuple[str, str] = ("", "")

    @property
    def ratio(self) -> float:
        """Measured over bound."""
        return self.measured / self.bound if self.bound else 0.0


@dataclass(slots=True)
class Trace:
    """A run as it is written down."""

    records: list[Record] = field(default_factory=list[Record])
    samples: list[_Sample] = field(default_factory=list[_Sample])
    end: float = 0.0
    served: dict[str, float] = field(default_factory=dict[str, float])
    _waiting: dict[str, int] = field(default_factory=dict[str, int])
    _due: dict[str, float] = field(default_factory=dict[str, float])
    _due_most: dict[str, float] = field(default_factory=dict[str, float])
    _broken: set[str] = field(default_factory=set[str])

    # Written by the world

    def submitted(self, id: str, ask: Ask, now: float) -> Record:
        """A request has come."""
        record = Record(id=id, ask=ask, at=now)
        self.records.append(record)
        self._waiting[ask.member] = self._waiting.get(ask.member, 0) + 1
        self.served.setdefault(ask.member, 0.0)
        return record

    def _waits_no_more(self, member: str) -> None:
        self._waiting[member] -= 1
        if not self._waiting[member]:
            self._broken.add(member)

    def _owe(self, record: Record, due: float) -> None:
        member = record.ask.member
        self._due[member] = self._due.get(member, 0.0) + due - record.due
        record.due = due
        self._due_most[member] = max(self._due_most.get(member, 0.0), self._due[member])

    def started(self, record: Record, node: str, cached: int) -> None:
        """It has a slot; so much of its prompt is cached there at this moment."""
        self._waits_no_more(record.ask.member)
        record.node, record.cached = node, cached
        record.tries += 1
        ask = record.ask
        fresh = ask.prompt_tokens - cached
        self._owe(record, credits(fresh=fresh, cached=cached, output=ask.output_tokens))

    def delivered(self, record: Record, now: float, tokens: int, cached: int) -> None:
        """The client gets so many tokens more."""
        before = record.cost
        if record.first_at is None:
            record.first_at, record.cached = now, cached
        record.output += tokens
        self.served[record.ask.member] += record.cost - before
        self._owe(record, credits(output=record.ask.output_tokens - record.output))

    def finished(self, record: Record, now: float) -> None:
        """Its answer has ended."""
        record.ended_at, record.outcome = now, "left" if record.left else "finished"
        self._owe(record, 0.0)

    def failed(self, record: Record, now: float, *, retry: bool) -> None:
        """Its node has failed."""
        self._owe(record, 0.0)
        if retry:
            self._waiting[record.ask.member] += 1
        else:
            record.ended_at, record.outcome = now, "broken"

    def refused(self, record: Record, now: float) -> None:
        """It will not be served."""
        self._waits_no_more(record.ask.member)
        record.ended_at, record.outcome = now, "refused"

    def sample(self, now: float, paid: Mapping[str, int]) -> None:
        """A moment's state; `paid` is what the policy has charged, in micro-credits."""
        waiting = {member for member, count in self._waiting.items() if count}
        self.samples.append(
            _Sample(
                at=now,
                served=dict(self.served),
                paid={member: value / CREDIT for member, value in paid.items()},
                backlogged=frozenset(waiting - self._broken),
                due_most=self._due_most,
            )
        )
        self._due_most = dict(self._due)
        self._broken = set()

    def close(self, now: float) -> None:
        """The run is over."""
        self.end = now

    # Figures

    def ttfts(self, of: Callable[[str], bool], since: float = 0.0) -> list[float]:
        """Seconds to first token; who still waits at the end, or was broken, has waited so long."""
        found: list[float] = []
        for record in self.records:
            if record.at < since or not of(record.ask.member) or record.outcome == "refused":
                continue
            if record.first_at is not None:
                found.append(record.first_at - record.at)
            elif self.end - record.at >= _UNSERVED_S:
                found.append(self.end - record.at)
        return found

    def tokens_s(self, since: float, of: Callable[[str], bool] = bool) -> float:
        """Prompt and output tokens a second of those that began since then, by their last token."""
        total = 0.0
        for record in self.records:
            if record.first_at is None or record.first_at < since or not of(record.ask.member):
                continue
            total += record.ask.prompt_tokens + record.output
        return total / (self.end - since)

    def output_s(self, since: float) -> float:
        """Output tokens a second of those that began since then."""
        begun = [r for r in self.records if r.first_at is not None and r.first_at >= since]
        return sum(record.output for record in begun) / (self.end - since)

    def hit(self, since: float = 0.0) -> float:
        """Which part of the prompt tokens was cached."""
        read = [r for r in self.records if r.first_at is not None and r.first_at >= since]
        total = sum(record.ask.prompt_tokens for record in read)
        return sum(record.cached for record in read) / total if total else 0.0

    def service(self, since: float, until: float | None = None) -> dict[str, float]:
        """Credits delivered to each member between two moments."""
        before = [sample.served for sample in self.samples if sample.at < since]
        first = before[-1] if before else dict[str, float]()
        last: Mapping[str, float] = self.served
        if until is not None:
            last = [sample.served for sample in self.samples if sample.at <= until][-1]
        return {member: value - first.get(member, 0.0) for member, value in last.items()}

    def over_time(self, member: str) -> Points:
        """Credits delivered to a member so far, by time."""
        return [(sample.at, sample.served.get(member, 0.0)) for sample in self.samples]

    def gap(
        self,
        members: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        window: float = 0.0,
        since: float = 0.0,
    ) -> Gap:
        """The pair of members whose service differs most, against its bound.

        Over all intervals in which both waited all the time: the range of W_f/phi_f - W_g/phi_g.
        The bound is (U + R)/phi of both + 2Q: U the price of what runs and is not delivered, R what
        is charged and not delivered, each the largest of the interval, Q the window.
        """
        worst = Gap(0.0, 1.0)
        for one, other in combinations(members, 2):
            for span in self._spans(one, other, since):
                found = _gap(span, (one, other), weights or {}, window)
                if found.measured > worst.measured:
                    worst = found
        return worst

    def ratio(
        self,
        members: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        window: float = 0.0,
    ) -> float:
        """The largest part of its bound that any pair has come to."""
        return max(
            (
                _gap(span, pair, weights or {}, window).ratio
                for pair in combinations(members, 2)
                for span in self._spans(*pair, 0.0)
            ),
            default=0.0,
        )

    def _spans(self, one: str, other: str, since: float) -> Iterable[list[_Sample]]:
        span: list[_Sample] = []
        for sample in self.samples:
            if sample.at < since:
                continue
            if one in sample.backlogged and other in sample.backlogged:
                span.append(sample)
                continue
            if len(span) > 1:
                yield span
            span = []
        if len(span) > 1:
            yield span


def _gap(
    span: list[_Sample], pair: tuple[str, str], weights: Mapping[str, float], window: float
) -> Gap:
    phi = [weights.get(member, 1.0) for member in pair]
    one, other = pair
    ahead = [s.served[one] / phi[0] - s.served[other] / phi[1] for s in span]
    bound = 2 * window
    for member, weight in zip(pair, phi, strict=True):
        due = max(sample.due_most.get(member, 0.0) for sample in span)
        reserved = [s.paid.get(member, 0.0) - s.served[member] for s in span]
        bound += (due + max(0.0, *reserved) - min(0.0, *reserved)) / weight
    return Gap(max(ahead) - min(ahead), bound, pair)
