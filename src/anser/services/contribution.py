"""What organisations contribute, and the weight that they have for it.

Theory of operation. At the start all receipts that still matter are read, a day at a time; from
then on the ledger tells of each one as it becomes durable. So what is counted is what the receipts
say, before and after a restart, and nothing else is kept. Every few seconds each contributor's part
of all (`core.contribution`) becomes weight, which `Members` tells to the scheduler, as it does when
an operator sets one. A change too small to notice is not told, so that a weight stands still while
nothing happens; so weights are right to one in a hundred, for those who were awake at the last
look.

Invariants: nobody has weight by contribution that has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from anser.core.contribution import HALF_LIFE_S, Contributions, added_weight, credit_of
from anser.core.ledger import Receipt
from anser.core.scheduler import Scheduler
from anser.ports import Clock
from anser.services.ledger import Ledger
from anser.services.members import Members

__all__ = ["Contribution"]

_NOTICED = 0.01  # of a weight
_DAY_MS = 86_400_000
_DAYS = 10 * int(HALF_LIFE_S) // 86_400  # what is older counts for less than a thousandth


@dataclass(slots=True, kw_only=True)
class Contribution:
    """Who contributes how much of all that the pool serves."""

    ledger: Ledger
    members: Members
    scheduler: Scheduler
    clock: Clock
    public_share: float
    interval_s: float = 5.0
    parts: dict[str, float] = field(default_factory=dict[str, float])  # by member; of all, 0 to 1
    _contributions: Contributions = field(default_factory=Contributions)

    def __post_init__(self) -> None:
        self.ledger.subscribe(self._count)

    def __repr__(self) -> str:
        return f"<Contribution {self._contributions!r}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        self._contributions.validate()
        assert all(
            member.id in self.parts
            for member in self.members.members()
            if self.members.added_weight(member.id)
        )

    async def load(self) -> None:
        """Count what is stored, once, before there is anything new. Raises StoreError."""
        now_ms = int(self.clock.wall() * 1_000)
        for days in reversed(range(-1, _DAYS)):  # the clock may have been set back
            since_ms = max(0, now_ms - (days + 1) * _DAY_MS)
            until_ms = max(0, now_ms - days * _DAY_MS)
            for credit in await self.ledger.credits(since_ms=since_ms, until_ms=until_ms):
                self._contributions.add(credit)
        self.weigh()

    async def run(self) -> None:
        """Turn contribution into weight, again and again; until cancelled."""
        while True:
            await asyncio.sleep(self.interval_s)
            self.weigh()

    def weigh(self) -> None:
        """Give every contributor the weight that it has now, and take it from who has none."""
        former, self.parts = self.parts, self._contributions.parts()
        members = {**former, **self.parts}
        awake = self._awake_weight(members)
        for member in members:
            own = self.members.weight(member) - self.members.added_weight(member)
            others = 0 if self.scheduler.awake_weight(member) else own  # or it counts already
            added = added_weight(
                self.parts.get(member, 0.0), awake=awake + others, public_share=self.public_share
            )
            if self._is_noticed(member, added):
                self.members.set_added_weight(member, added)

    def _awake_weight(self, contributors: Iterable[str]) -> int:
        """The weights, as the operator gave them, of all organisations that are awake."""
        awake = (member for member in contributors if self.scheduler.awake_weight(member))
        return self.scheduler.awake_weight() - sum(map(self.members.added_weight, awake))

    def _is_noticed(self, member: str, added: int) -> bool:
        before = self.members.added_weight(member)
        return not added or abs(added - before) > _NOTICED * self.members.weight(member)

    def _count(self, receipt: Receipt) -> None:
        credit = credit_of(receipt)
        if credit is not None:
            self._contributions.add(credit)
