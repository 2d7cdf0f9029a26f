"""What all shards together have served each account, as far as this one has heard.

Theory of operation
-------------------
Each shard counts for each account (of a person, a project, an organisation) what it has charged and
refunded itself, and the requests that came, started and left, as sums that only grow, and keeps the
last such `Row` that it has had from each other shard. Rows are merged by the maximum, so a row that
is lost, late or comes twice does no harm and shards that have heard the same rows know the same, in
whatever order they came: a grow-only counter for each shard and sign (PN-counter; Shapiro et al.,
Conflict-free replicated data types, 2011).

An account's key is its *lift* and what all shards have raised it by. The lift says where it stood
when it last came from idleness; it only grows, and is the maximum of all lifts known. So is a
parent's virtual time. What a charge does to a key is counted beside its price, by the weight that
the charging shard knew: then keys agree whatever becomes of weights meanwhile.

*Deltas*: a row that changes gets the next stamp. `changed` lists rows after a stamp, the oldest
first and at most so many; a peer that has taken all up to a stamp says so, and is sent what came
after it (delta-state anti-entropy; Almeida et al., 2018). A row keeps its stamp until it has been
sent, so what changes all the time has its turn nevertheless.

Rows are kept while the shard lives; there are at most `accounts_max`.

Invariants: all numbers of a row only grow; an account's `raised` is the sum over its rows; stamps
ascend in the order of `changed`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

__all__ = ["Row", "Sums"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one shard says of one account. Nothing in it ever becomes less."""

    account: str
    charged: int = 0  # micro-credits
    refunded: int = 0
    raised: int = 0  # what that did to the key: micro-credits per share
    lowered: int = 0
    turns: int = 0  # how often it has begun or ceased to wait there: odd while it waits
    came: int = 0  # requests that began to wait there, and that began to run
    left: int = 0  # that ceased to
    started: int = 0  # requests of it and all below it that were given a slot
    lift: int = 0  # its key less what all shards have raised it by
    virtual: int = 0  # the largest key among its children that has ever been given a slot

    def __post_init__(self) -> None:
        assert min(self.charged, self.refunded, self.raised, self.lowered, self.turns) >= 0
        assert self.came >= self.left >= 0

    def merged(self, other: Row) -> Row:
        """The row of which both are earlier states."""
        return Row(
            account=self.account,
            charged=max(self.charged, other.charged),
            refunded=max(self.refunded, other.refunded),
            raised=max(self.raised, other.raised),
            lowered=max(self.lowered, other.lowered),
            turns=max(self.turns, other.turns),
            came=max(self.came, other.came),
            left=max(self.left, other.left),
            started=max(self.started, other.started),
            lift=max(self.lift, other.lift),
            virtual=max(self.virtual, other.virtual),
        )


@dataclass(slots=True, eq=False)
class _Entry:
    """One account as this shard knows it: `own` is its row here, `rows` are the others'."""

    account: str
    raised: int = 0  # by all shards, less what they have lowered
    lift: int = 0
    virtual: int = 0
    charged: int = 0  # here
    refunded: int = 0
    own_raised: int = 0
    own_lowered: int = 0
    turns: int = 0
    came: int = 0
    left: int = 0
    started: int = 0
    rows: dict[str, Row] = field(default_factory=dict[str, Row])

    def own(self) -> Row:
        return Row(
            account=self.account,
            charged=self.charged,
            refunded=self.refunded,
            raised=self.own_raised,
            lowered=self.own_lowered,
            turns=self.turns,
            came=self.came,
            left=self.left,
            started=self.started,
            lift=self.lift,
            virtual=self.virtual,
        )


class Sums:
    """The accounts of all shards, and what of this one's has changed since a stamp."""

    def __init__(self, accounts_max: int) -> None:
        self.accounts_max = accounts_max
        self._entries: dict[str, _Entry] = {}
        self._stamps: OrderedDict[str, int] = OrderedDict()
        self._stamp = 0
        self._sent = 0

    def room_for(self, accounts: Iterable[str]) -> bool:
        """Whether there is room for those of them that are new."""
        new = sum(account not in self._entries for account in accounts)
        return not new or len(self._entries) + new <= self.accounts_max

    def key(self, account: str) -> int:
        """Where it stands, in micro-credits per share."""
        entry = self._entries.get(account)
        return entry.lift + entry.raised if entry else 0

    def virtual(self, account: str) -> int:
        """The virtual time among its children."""
        entry = self._entries.get(account)
        return entry.virtual if entry else 0

    def total(self, account: str) -> int:
        """What all shards have served it, in micro-credits."""
        entry = self._entries.get(account)
        return sum(row.charged - row.refunded for row in _rows(entry)) if entry else 0

    def totals(self) -> dict[str, int]:
        """The same of all accounts."""
        return {account: self.total(account) for account in self._entries}

    def own(self, account: str) -> int:
        """What this shard has served it, in micro-credits."""
        entry = self._entries.get(account)
        return entry.charged - entry.refunded if entry else 0

    def waits_at(self, account: str, shards: Iterable[str]) -> bool:
        """Whether it waits at one of these other shards, as far as is known."""
        return bool(self.waits_where(account, shards))

    def waits_where(self, account: str, shards: Iterable[str]) -> list[str]:
        """At which of these other shards it waits, as far as is known."""
        entry = self._entries.get(account)
        rows = entry.rows if entry else {}
        return [shard for shard in shards if shard in rows and rows[shard].turns % 2]

    def waits(self, account: str) -> bool:
        """Whether it waits here."""
        entry = self._entries.get(account)
        return entry is not None and entry.turns % 2 == 1

    def started(self, account: str) -> int:
        """How many of its requests all shards have given a slot."""
        entry = self._entries.get(account)
        return sum(row.started for row in _rows(entry)) if entry else 0

    def in_flight_at(self, account: str, shards: Iterable[str]) -> int:
        """How many of its requests wait or run at these other shards, as far as is known."""
        entry = self._entries.get(account)
        rows = [entry.rows.get(shard) for shard in shards] if entry else []
        return sum(row.came - row.left for row in rows if row)

    def charge(self, account: str, *, micro_credits: int, raised: int) -> None:
        """This shard has charged it so much, which has raised its key; a refund is negative."""
        entry = self._change(account)
        entry.charged += max(0, micro_credits)
        entry.refunded += max(0, -micro_credits)
        entry.own_raised += max(0, raised)
        entry.own_lowered += max(0, -raised)
        entry.raised += raised

    def lift(self, account: str, key: int) -> None:
        """Let its key be at least this."""
        entry = self._change(account)
        entry.lift = max(entry.lift, key - entry.raised)

    def start(self, account: str) -> None:
        """A request of it, or of one below it, was given a slot here."""
        self._change(account).started += 1

    def advance(self, account: str, key: int) -> None:
        """A child of it that had this key was given a slot."""
        entry = self._change(account)
        entry.virtual = max(entry.virtual, key)

    def turn(self, account: str, *, waits: bool) -> None:
        """It has begun to wait here, or waits here no more."""
        entry = self._change(account)
        entry.turns += 1
        assert entry.turns % 2 == waits

    def come(self, account: str) -> None:
        """A request of it begins to wait here, or to run."""
        self._change(account).came += 1

    def leave(self, account: str) -> None:
        """A request of it ceases to wait here, or to run."""
        entry = self._change(account)
        entry.left += 1
        assert entry.left <= entry.came

    def changed(self, since: int, most: int) -> tuple[tuple[Row, ...], int]:
        """Own rows that changed after stamp `since`, and the stamp up to which these are all."""
        new = takewhile(lambda account: self._stamps[account] > since, reversed(self._stamps))
        accounts = list(new)[::-1][:most]
        upto = self._stamps[accounts[-1]] if accounts else since
        self._sent = max(self._sent, upto)
        return tuple(self._entries[account].own() for account in accounts), upto

    def merge(self, shard: str, rows: Iterable[Row]) -> tuple[list[str], bool]:
        """Take another shard's rows: whose keys have moved, and whether there was room for all."""
        moved: list[str] = []
        whole = True
        for row in rows:
            entry = self._entries.get(row.account)
            if entry is None:
                if not self.room_for((row.account,)):
                    whole = False
                    continue
                entry = self._entries[row.account] = _Entry(row.account)
            key = entry.lift + entry.raised
            _merge(entry, shard, row)
            if entry.lift + entry.raised != key:
                moved.append(row.account)
        return moved, whole

    def _change(self, account: str) -> _Entry:
        entry = self._entries.get(account)
        if entry is None:
            entry = self._entries[account] = _Entry(account)
        if self._stamps.get(account, 0) <= self._sent:
            self._stamp += 1
            self._stamps[account] = self._stamp
            self._stamps.move_to_end(account)
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Sums of {len(self._entries)} accounts, stamp {self._stamp}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        for account, entry in self._entries.items():
            assert entry.account == account
            assert entry.raised == sum(row.raised - row.lowered for row in _rows(entry))
            assert all(row.lift <= entry.lift for row in _rows(entry))
            assert all(row.virtual <= entry.virtual for row in _rows(entry))
        stamps = list(self._stamps.values())
        assert stamps == sorted(set(stamps))


def _rows(entry: _Entry) -> list[Row]:
    return [entry.own(), *entry.rows.values()]


def _merge(entry: _Entry, shard: str, row: Row) -> None:
    former = entry.rows.get(shard) or Row(account=row.account)
    row = entry.rows[shard] = former.merged(row)
    entry.raised += row.raised - row.lowered - former.raised + former.lowered
    entry.lift = max(entry.lift, row.lift)
    entry.virtual = max(entry.virtual, row.virtual)
