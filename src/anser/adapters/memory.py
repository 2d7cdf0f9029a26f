"""Stores and a clock in memory: what the simulation and short-lived platforms run on.

Theory of operation. `MemoryStore` keeps dictionaries and follows the same contracts as the
embedded store, except that nothing outlives it. A `fault` makes every write fail with that error,
as a full disk would, until it is taken away. `MemoryClock` stands still until it is told to move.

Invariants: the receipts found by request are the receipts of the stored batches, no more, no less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from anser.core.contribution import CREDIT_SPAN_MS, Credit, credit_of
from anser.core.errors import Conflict, StoreError
from anser.core.fleet import Node
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.members import Key, Member
from anser.ports import SignedBatch, StoredReceipt, UsageRow

__all__ = ["MemoryClock", "MemoryStore"]


class MemoryClock:
    """A clock that is set by hand. `wall` may be moved alone, as a jump of the machine's clock."""

    def __init__(self, *, wall: float = 1_800_000_000.0) -> None:
        self._now = 0.0
        self._wall = wall

    def __repr__(self) -> str:
        return f"<MemoryClock now={self._now:.3f} wall={self._wall:.3f}>"

    def now(self) -> float:
        """Monotonic seconds since an arbitrary origin."""
        return self._now

    def wall(self) -> float:
        """Unix seconds."""
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        assert seconds >= 0
        self._now += seconds
        self._wall += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or, with a negative number, back."""
        self._wall += seconds


class MemoryStore:
    """Fills MemberStore, NodeStore and ReceiptStore."""

    def __init__(self) -> None:
        self.fault: StoreError | None = None
        self._members: dict[str, Member] = {}
        self._keys: dict[str, Key] = {}
        self._nodes: dict[str, Node] = {}
        self._batches: list[SignedBatch] = []
        self._places: dict[str, StoredReceipt] = {}  # by request, in the order they came

    def __repr__(self) -> str:
        return (
            f"<MemoryStore members={len(self._members)} keys={len(self._keys)}"
            f" nodes={len(self._nodes)} receipts={len(self._places)} fault={self.fault!r}>"
        )

    def validate(self) -> None:
        """Assert the invariants."""
        receipts = [receipt for batch in self._batches for receipt in batch.receipts]
        assert [receipt.request for receipt in receipts] == list(self._places)

    async def members(self) -> list[Member]:
        """All members, parents before children."""
        return [self._members[id_] for id_ in sorted(self._members)]

    async def put_member(self, member: Member) -> None:
        """Insert or replace by `id`."""
        self._check_writable()
        self._members[member.id] = member

    async def keys(self) -> list[Key]:
        """All keys, also expired and revoked ones."""
        return [self._keys[id_] for id_ in sorted(self._keys)]

    async def put_key(self, key: Key) -> None:
        """Insert or replace by `id`."""
        self._check_writable()
        self._keys[key.id] = key

    async def forget_keys(self, ids: tuple[str, ...]) -> None:
        """Delete these keys, all or none; unknown ones are passed over."""
        self._check_writable()
        for id_ in ids:
            self._keys.pop(id_, None)

    async def nodes(self) -> list[Node]:
        """All nodes, by id."""
        return [self._nodes[id_] for id_ in sorted(self._nodes)]

    async def put_node(self, node: Node) -> None:
        """Insert or replace by `id`."""
        self._check_writable()
        self._nodes[node.id] = node

    async def forget_node(self, node: str) -> None:
        """Delete; an unknown one is passed over."""
        self._check_writable()
        self._nodes.pop(node, None)

    async def append(self, batch: SignedBatch) -> None:
        """Store a whole batch or nothing; nothing changes if all of it is stored already."""
        assert 0 < len(batch.leaves) == len(batch.receipts)
        self._check_writable()
        if self._has_all(batch):
            return
        for index, receipt in enumerate(batch.receipts):
            self._places[receipt.request] = StoredReceipt(index=index, batch=batch)
        self._batches.append(batch)

    async def find(self, request: str) -> StoredReceipt | None:
        """The receipt of one request."""
        return self._places.get(request)

    async def usage(self, *, since_ms: int, until_ms: int, member: str | None) -> list[UsageRow]:
        """Sums over receipts ended in [since, until), of `member` and all below it, or of all."""
        groups: dict[tuple[str, str], list[Receipt]] = defaultdict(list)
        for receipt in self._of(member):
            if since_ms <= receipt.ended_ms < until_ms:
                groups[receipt.member, receipt.model].append(receipt)
        return [_sum(groups[group]) for group in sorted(groups)]

    async def recent(self, *, limit: int, member: str | None) -> list[Receipt]:
        """The newest receipts first, of `member` and all below it, or of all."""
        return list(self._of(member))[::-1][: max(limit, 0)]

    async def credits(self, *, since_ms: int, until_ms: int) -> list[Credit]:
        """Sums of credit of receipts ended in [since, until), for each owner and some hours."""
        groups: dict[tuple[str, int], list[Credit]] = defaultdict(list)
        for receipt in self._of(None):
            credit = credit_of(receipt)
            if credit is not None and since_ms <= credit.at_ms < until_ms:
                span = (credit.at_ms - since_ms) // CREDIT_SPAN_MS
                groups[credit.owner, span].append(credit)
        return [_whole(groups[group]) for group in sorted(groups)]

    def _check_writable(self) -> None:
        if self.fault is not None:
            raise type(self.fault)(self.fault.message)

    def _has_all(self, batch: SignedBatch) -> bool:
        """Whether all receipts are stored; Conflict if only some are, or with another content."""
        for receipt, leaf in zip(batch.receipts, batch.leaves, strict=True):
            place = self._places.get(receipt.request)
            if place is not None and place.batch.leaves[place.index] != leaf:
                raise Conflict(f"Another receipt of request {receipt.request} is stored.")
        requests = [receipt.request for receipt in batch.receipts]
        stored = [request for request in requests if request in self._places]
        if len(stored) == len(requests):
            return True
        if stored or len(set(requests)) != len(requests):
            raise Conflict("Some receipts of the batch are stored already, others are not.")
        return False

    def _of(self, member: str | None) -> Iterable[Receipt]:
        for place in self._places.values():
            receipt = place.batch.receipts[place.index]
            if member is None or f"{receipt.member}/".startswith(f"{member}/"):
                yield receipt


def _sum(receipts: list[Receipt]) -> UsageRow:
    total = sum((receipt.usage for receipt in receipts), Usage())
    outcomes = [receipt.outcome for receipt in receipts]
    return UsageRow(
        member=receipts[0].member,
        model=receipts[0].model,
        requests=len(receipts),
        failed=outcomes.count(Outcome.FAILED),
        cancelled=outcomes.count(Outcome.CANCELLED),
        prompt_tokens=total.prompt_tokens,
        cached_tokens=total.cached_tokens,
        completion_tokens=total.completion_tokens,
    )


def _whole(credits: list[Credit]) -> Credit:
    """All of them, at their mean time, by amount."""
    total = sum(credit.micro_credits for credit in credits)
    mean_ms = sum(credit.micro_credits * credit.at_ms for credit in credits) / total
    return Credit(owner=credits[0].owner, micro_credits=total, at_ms=round(mean_ms))
