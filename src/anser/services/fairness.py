"""How evenly service goes round, in numbers for people: one's own share, and one figure for all.

Theory of operation. What each lease costs is counted as the scheduler charges it, for its member
and all above: the prompt when it begins, each token of the answer, and at its end what it really
was. Every half minute a new note is begun, so that shares are of the last five minutes, whether or
not the scheduler still knows the member. What waits and runs, and the keys, are the scheduler's.

*Entitlement*: a member's weight among its siblings that have something to do or had it in that
time, level by level. *Jain's index* (Jain, Chiu, Hawe, 1984) over service per weight of the
organisations of that time: (sum x)^2 / (n sum x^2), 1 when all had the same; also lower where
somebody asked for less than its share. *Gap*: how far, of the organisations that wait for the same
slots now, the one most ahead is before the one least: what the scheduler compares, in micro-credits
per share. *Bound* of the gap: 2Q + U_a/w_a + U_b/w_b, where Q is the window, w a weight in shares,
and U the most that what an organisation had running at once could cost, since it last had nothing
to do. An estimate of a prompt that was too low may exceed it by its error. Who waits for models of
several pools is left out: its keys also say what other pools served it, and no such bound holds.

A look costs as much as there are members, so it is taken at most once a second, whoever asks.

Invariants: each lease that runs is counted once; there are at most as many notes as fill the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from anser.core.events import Request, Start
from anser.core.fairness import Standing, price
from anser.core.ledger import Usage
from anser.core.members import ancestry
from anser.core.scheduler import Scheduler
from anser.core.virtual import Pool

__all__ = ["WINDOW_S", "Evenness", "Fairness", "Look", "Share", "jain"]

WINDOW_S = 300.0
_NOTE_S = 30.0
_NOTES_MAX = int(WINDOW_S / _NOTE_S)
_LOOK_S = 1.0
_SHARE = 1_000  # one share of weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member had of all that its siblings and it had lately, and what was due to it."""

    member: str
    weight: int  # thousandths
    service: int = 0  # micro-credits, lately
    share: float | None = None  # of what was served at its level; None: nothing was
    entitlement: float
    queued: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """All organisations in one: nobody can be told apart."""

    members: int = 0  # that have something to do, or had it lately
    jain: float | None = None
    gap: int | None = None  # micro-credits per share; None: no two wait for the same slots
    bound: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All figures at one moment; `shares` are by member, parents before children."""

    at: float
    shares: dict[str, Share]
    evenness: Evenness
    levels: dict[str, tuple[int, int]]  # by parent: service, and the weights of the active


@dataclass(slots=True)
class _Load:
    """What an organisation has running could cost so much, and most at once so much."""

    now: int = 0
    most: int = 0


@dataclass(slots=True)
class _Lease:
    """A lease that runs: what it has cost, and what it can cost at most."""

    request: Request
    most: int
    charged: int = 0


@dataclass(slots=True)
class _Note:
    """What each member had from one moment to another, in micro-credits."""

    since: float
    until: float
    spent: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class Fairness:
    """How service goes round: told of each lease, it knows the last five minutes."""

    scheduler: Scheduler
    weight_of: Callable[[str], int]  # also of members that the scheduler has forgotten
    _notes: deque[_Note] = field(default_factory=lambda: deque[_Note](maxlen=_NOTES_MAX))
    _loads: dict[str, _Load] = field(default_factory=dict[str, _Load])  # by organisation
    _leases: dict[str, _Lease] = field(default_factory=dict[str, _Lease])
    _look: Look | None = None

    def __repr__(self) -> str:
        return f"<Fairness {len(self._notes)} notes, {len(self._leases)} running>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert len(self._notes) <= _NOTES_MAX
        assert len(self._leases) == self.scheduler.running
        worth: dict[str, int] = {}
        for lease in self._leases.values():
            name = ancestry(lease.request.member)[0]
            worth[name] = worth.get(name, 0) + lease.most
        assert worth == {name: load.now for name, load in self._loads.items() if load.now}
        assert all(load.now <= load.most for load in self._loads.values())

    def began(self, start: Start, now: float) -> None:
        """A request runs: it is charged its prompt, and may cost as much as its longest answer."""
        request, cached = start.request, start.why.cached_tokens
        most = _price(request, fresh=request.prompt_tokens, output=request.output_tokens_max)
        lease = self._leases[start.lease.id] = _Lease(request, most)
        self._charge(
            lease, _price(request, fresh=request.prompt_tokens - cached, cached=cached), now
        )
        load = self._loads.setdefault(ancestry(request.member)[0], _Load())
        load.now += most
        load.most = max(load.most, load.now)

    def progressed(self, lease: str, tokens: int, now: float) -> None:
        """It has produced so many more tokens."""
        found = self._leases.get(lease)
        if found is not None:
            self._charge(found, _price(found.request, output=tokens), now)

    def ended(self, lease: str, usage: Usage, now: float) -> None:
        """It runs no longer, and was this much."""
        found = self._leases.pop(lease, None)
        if found is not None:
            cached, fresh = usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens
            output = usage.completion_tokens
            cost = _price(found.request, fresh=fresh, cached=cached, output=output)
            self._charge(found, cost - found.charged, now)
            self._loads[ancestry(found.request.member)[0]].now -= found.most

    def look(self, now: float) -> Look:
        """The figures as they are, or were within the last second."""
        if self._look is None or not 0.0 <= now - self._look.at < _LOOK_S:
            rows, spent = self.scheduler.standings(), self._spent(now)
            known = {row.member for row in rows}
            rows += map(self._idle, sorted(spent.keys() - known))
            levels = _levels(rows, spent)
            shares = {row.member: _share(row, spent, levels) for row in rows}
            evenness = self._evenness(rows, spent)
            self._look = Look(at=now, shares=shares, evenness=evenness, levels=levels)
        return self._look

    def path(self, member: str, now: float) -> list[Share]:
        """The rows of one member and of all above it, also of those who have not come yet."""
        look = self.look(now)
        return [
            look.shares.get(name) or _share(self._idle(name), {}, look.levels)
            for name in ancestry(member)
        ]

    def _idle(self, member: str) -> Standing:
        weight = self.weight_of(member)
        return Standing(member=member, weight=weight, key=0, service=0, queued=0, running=0)

    def _evenness(self, rows: Iterable[Standing], spent: Mapping[str, int]) -> Evenness:
        top = [row for row in rows if "/" not in row.member and _active(row, spent)]
        gap, bound = self._widest(top)
        return Evenness(
            members=len(top),
            jain=jain([spent.get(row.member, 0) * _SHARE / row.weight for row in top]),
            gap=gap,
            bound=bound,
        )

    def _widest(self, rows: Iterable[Standing]) -> tuple[int, int] | tuple[None, None]:
        """The largest gap between two that wait in one pool, and the bound of these two."""
        pools: dict[Pool, list[tuple[int, int]]] = {}  # key, and what runs, per share
        for row in rows:
            found = self.scheduler.key_of(row.member)
            if found is not None:
                (pool, key), load = found, self._loads.get(row.member) or _Load()
                pools.setdefault(pool, []).append((key, load.most * _SHARE // row.weight))
        pairs = [(min(keys), max(keys)) for keys in pools.values() if len(keys) > 1]
        if not pairs:
            return None, None
        low, high = max(pairs, key=lambda pair: pair[1][0] - pair[0][0])
        return high[0] - low[0], 2 * self.scheduler.rules.window + high[1] + low[1]

    def _charge(self, lease: _Lease, cost: int, now: float) -> None:
        lease.charged += cost
        if not self._notes or now - self._notes[-1].since >= _NOTE_S:
            self._notes.append(_Note(now, now))
            self._forget_idle()
        note = self._notes[-1]
        note.until = now
        for name in ancestry(lease.request.member):
            note.spent[name] = note.spent.get(name, 0) + cost

    def _forget_idle(self) -> None:
        """What an organisation had running bounds nothing once it has nothing to do."""
        idle = [name for name, load in self._loads.items() if not load.now]
        for name in idle:
            if not self.scheduler.queued_of(name):
                del self._loads[name]

    def _spent(self, now: float) -> dict[str, int]:
        """What each member had lately; who got more back than it had has had nothing."""
        spent: dict[str, int] = {}
        for note in self._notes:
            if note.until >= now - WINDOW_S:
                for member, cost in note.spent.items():
                    spent[member] = spent.get(member, 0) + cost
        return {member: cost for member, cost in spent.items() if cost > 0}


def _price(request: Request, *, fresh: int = 0, cached: int = 0, output: int = 0) -> int:
    return price(fresh=fresh, cached=cached, output=output, factor_milli=request.factor_milli)


def jain(values: list[float]) -> float | None:
    """Jain's index of fairness; None where there is nothing to compare.

    >>> jain([1.0, 1.0]), jain([1.0, 0.0]), jain([0.0])
    (1.0, 0.5, None)
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _active(row: Standing, spent: Mapping[str, int]) -> bool:
    return bool(row.queued or row.running or spent.get(row.member))


def _levels(rows: Iterable[Standing], spent: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By parent: all that its children had lately, and the weights of those that were active."""
    levels: dict[str, tuple[int, int]] = {}
    for row in rows:
        parent = row.member.rpartition("/")[0]
        service, weight = levels.get(parent, (0, 0))
        weight += row.weight if _active(row, spent) else 0
        levels[parent] = service + spent.get(row.member, 0), weight
    return levels


def _share(row: Standing, spent: Mapping[str, int], levels: Mapping[str, tuple[int, int]]) -> Share:
    service, weight = levels.get(row.member.rpartition("/")[0], (0, 0))
    others = 0 if _active(row, spent) else row.weight  # or it counts already
    had = spent.get(row.member, 0)
    return Share(
        member=row.member,
        weight=row.weight,
        service=had,
        share=had / service if service else None,
        entitlement=row.weight / (weight + others),
        queued=row.queued,
        running=row.running,
    )
