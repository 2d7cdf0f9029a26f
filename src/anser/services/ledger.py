"""The ledger: every receipt is durable and signed before the end of its answer is sent.

Theory of operation. `record` puts a receipt's leaf into a bounded queue and waits. `run` takes
whatever has piled up, hashes it into one Merkle tree, signs the root once and stores the batch in
one transaction; then it wakes everybody who waited. While one batch is being written the next one
piles up, so a busy ledger makes few large batches and an idle one answers at the disk's speed;
nothing is ever delayed on purpose.

A commit that fails is raised to each who waits for it, and its receipts are kept: they are tried
again until they are stored or the platform stops; then their loss is logged. Who waits goes before
what is kept, in batches of its own, so that a failing store delays nobody twice. If the store finds
that a batch contradicts what it holds (Conflict), each receipt is tried alone, so that only the
culprit fails.

Invariants:
- at most one receipt per request is pending at a time, and one is kept;
- all receipts that are not durable yet stay within their limit: whoever asks for `room` before
  admitting a request is never refused its receipt;
- `signed_ms` never goes back, whatever the clock does;
- when `run` has ended, nobody waits;
- whoever subscribes hears of each receipt once, when it is durable.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import anyio
import structlog

from anser.core import limits, tlog
from anser.core.contribution import Credit
from anser.core.errors import (
    AnserError,
    Conflict,
    NotFound,
    Overloaded,
    ReceiptError,
    ShuttingDown,
    StoreCorrupt,
    StoreError,
)
from anser.core.ledger import Receipt, batch_message
from anser.ports import Clock, ReceiptStore, SignedBatch, Signer, UsageRow
from anser.services.receipt_file import canonical, document_of, leaf_of, verify

__all__ = ["Ledger", "Told", "late", "verify"]

Told = Callable[[AnserError | None], None]
"""Called once: with None when a receipt is durable, else with what keeps it from being so."""

_RETRY_S = 1.0
_log = structlog.get_logger("anser.ledger")


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A receipt that waits for its commit, and all who are to be told of it."""

    receipt: Receipt
    leaf: bytes
    told: list[Told] = field(default_factory=list["Told"])


class Ledger:
    """Records receipts durably, in signed batches, and gives them out with their proofs."""

    def __init__(self, store: ReceiptStore, signer: Signer, clock: Clock) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._kept: dict[str, _Pending] = {}  # after a failed commit
        self._failing = False  # so the last commit said
        self._writing: list[_Pending] = []
        self._signed: SignedBatch | None = None  # of what is being written
        self._signed_ms = 0
        self._work = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._closing = False
        self._batches = 0
        self._receipts = 0
        self._listeners: list[Callable[[Receipt], None]] = []

    def __repr__(self) -> str:
        return (
            f"<Ledger pending={len(self._pending)} kept={len(self._kept)}"
            f" writing={len(self._writing)} batches={self._batches}"
            f" receipts={self._receipts} running={self._running}>"
        )

    def validate(self) -> None:
        """Assert the invariants."""
        assert self.room >= 0
        assert len(self._writing) <= limits.BATCH_RECEIPTS_MAX
        assert self._running or not self._writing
        assert bool(self._writing) == (self._signed is not None)
        for entries in (self._pending, self._kept):
            assert all(key == entry.receipt.request for key, entry in entries.items())

    @property
    def public_key(self) -> bytes:
        """The 32 bytes that check this platform's receipts."""
        return self._signer.public_key

    @property
    def room(self) -> int:
        """How many more receipts may wait for the disk."""
        waiting = len(self._pending) + len(self._kept) + len(self._writing)
        return limits.RECEIPTS_PENDING_MAX - waiting

    def subscribe(self, listener: Callable[[Receipt], None]) -> None:
        """Have `listener` called for each receipt that becomes durable from now on."""
        self._listeners.append(listener)

    async def record(self, receipt: Receipt) -> None:
        """Return when the receipt is durable; recording the same one again changes nothing.

        Raises StoreError if it is not durable now: it will be stored later. Raises Conflict if
        another receipt of this request exists, Overloaded and ShuttingDown if it is not accepted.
        """
        waiter = asyncio.get_running_loop().create_future()

        def told(error: AnserError | None) -> None:
            if not waiter.done():  # else it has waited long enough
                waiter.set_exception(error) if error else waiter.set_result(None)

        self.tell(receipt, told)
        try:
            async with asyncio.timeout(limits.RECORD_TIMEOUT_S):
                await waiter
        except TimeoutError:
            raise late() from None

    def tell(self, receipt: Receipt, told: Told) -> None:
        """Store the receipt, and tell when it is durable; never before this has returned.

        Raises Conflict, Overloaded and ShuttingDown as `record` does. How long that may take is for
        the caller to say (`late`).
        """
        self._accept(receipt).told.append(told)

    def enqueue(self, receipt: Receipt) -> None:
        """Store the receipt soon; for a client that has left. A loss is logged, never raised."""
        with suppress(AnserError):
            self._accept(receipt)

    async def run(self) -> None:
        """Commit batches until `aclose` or cancelled; what was accepted by then is written first.

        Raises StoreError if the newest batch cannot be read at the start.
        """
        assert not self._running
        self._running = True
        try:
            await self._resume_time()
            while not self._closing:
                with anyio.move_on_after(_RETRY_S if self._kept else math.inf) as pause:
                    await self._work.wait()
                self._work.clear()
                self._failing &= not pause.cancelled_caught
                await self._flush()
        finally:
            self._closing = True
            self._failing = False
            try:
                with anyio.move_on_after(limits.LEDGER_FLUSH_S, shield=True):
                    await self._flush()
            finally:
                self._abandon()

    async def aclose(self) -> None:
        """Accept nothing more and return when `run` has written what was accepted. Idempotent."""
        self._closing = True
        self._work.set()
        if self._running:
            with anyio.move_on_after(limits.LEDGER_FLUSH_S):
                await self._ended.wait()

    async def export(self, request: str) -> dict[str, Any]:
        """The receipt file of one request, checked once more. Raises NotFound, StoreError."""
        stored = await self._store.find(request)
        if stored is None:
            raise NotFound("There is no receipt of this request.")
        document = document_of(stored)
        try:
            verify(canonical(document))
        except ReceiptError as error:
            raise StoreCorrupt(f"A stored receipt does not verify: {error.message}") from None
        return document

    async def usage(
        self, *, since_ms: int, until_ms: int, member: str | None = None
    ) -> list[UsageRow]:
        """Sums of receipts ended in [since, until), of `member` and all below it, or of all."""
        return await self._store.usage(since_ms=since_ms, until_ms=until_ms, member=member)

    async def recent(self, *, limit: int, member: str | None = None) -> list[Receipt]:
        """The newest receipts first, of `member` and all below it, or of all."""
        return await self._store.recent(limit=limit, member=member)

    async def credits(self, *, since_ms: int, until_ms: int) -> list[Credit]:
        """What owners of nodes earned by receipts ended in [since, until), by pieces of time."""
        return await self._store.credits(since_ms=since_ms, until_ms=until_ms)

    def _accept(self, receipt: Receipt) -> _Pending:
        try:
            return self._entry(receipt)
        except AnserError as refusal:
            _lost(receipt, refusal.code)
            raise

    def _entry(self, receipt: Receipt) -> _Pending:
        """Where this receipt waits for its commit, from now on or already."""
        if self._closing:
            raise ShuttingDown("The ledger is closed.")
        request = receipt.request
        same = self._pending.get(request) or self._kept.get(request)
        if same is not None and same.receipt != receipt:
            raise Conflict(f"Another receipt of request {request} is being written.")
        if same is None:
            if self.room <= 0:
                raise Overloaded("Too many receipts wait for the disk.")
            same = _Pending(receipt=receipt, leaf=leaf_of(receipt))
        self._kept.pop(request, None)
        self._pending[request] = same
        self._work.set()
        return same

    async def _resume_time(self) -> None:
        """Take up `signed_ms` where the newest stored batch left it."""
        newest = await self._store.recent(limit=1, member=None)
        stored = await self._store.find(newest[0].request) if newest else None
        if stored is not None:
            self._signed_ms = max(self._signed_ms, stored.batch.signed_ms)

    async def _flush(self) -> None:
        """Write all that waits, and in turn what is kept for as long as the store takes it."""
        while self._writing or self._pending or (self._kept and not self._failing):
            if self._writing or self._pending:
                await self._commit(self._pending)
            if self._kept and not self._failing:
                await self._commit(self._kept)

    async def _commit(self, waiting: dict[str, _Pending]) -> None:
        """Write the oldest of these, up to one batch, and tell their waiters.

        If an earlier call was cut off in mid-write, its very same batch is written again, which
        changes nothing if it was stored after all.
        """
        if self._signed is None:
            names = list(islice(waiting, limits.BATCH_RECEIPTS_MAX))
            self._writing = [waiting.pop(name) for name in names]
            self._signed = self._sign(self._writing)
        try:
            await self._append(self._writing, self._signed)
        except Conflict as conflict:
            await self._commit_singly(conflict)
        except StoreError as error:
            self._fail(self._writing, error)
        self._writing, self._signed = [], None

    async def _commit_singly(self, conflict: Conflict) -> None:
        if len(self._writing) == 1:
            self._fail(self._writing, conflict)
            return
        for entry in self._writing:
            try:
                await self._append([entry], self._sign([entry]))
            except (Conflict, StoreError) as error:
                self._fail([entry], error)

    async def _append(self, entries: list[_Pending], signed: SignedBatch) -> None:
        await self._store.append(signed)
        self._failing = False
        self._batches += 1
        self._receipts += len(entries)
        for entry in entries:
            for listener in self._listeners:
                listener(entry.receipt)
        _tell(entries, lambda: None)

    def _fail(self, entries: Sequence[_Pending], error: StoreError | Conflict) -> None:
        """Tell all who wait; what the store may take later is kept."""
        for entry in entries:
            if isinstance(error, StoreError):
                self._failing = True
                self._kept.setdefault(entry.receipt.request, entry)
            else:
                _lost(entry.receipt, error.code)
        _tell(entries, lambda: type(error)(error.message))

    def _sign(self, entries: Sequence[_Pending]) -> SignedBatch:
        leaves = tuple(entry.leaf for entry in entries)
        root = tlog.root_hash([tlog.leaf_hash(leaf) for leaf in leaves])
        self._signed_ms = max(self._signed_ms, int(self._clock.wall() * 1_000))
        message = batch_message(root=root, size=len(leaves), signed_ms=self._signed_ms)
        return SignedBatch(
            leaves=leaves,
            receipts=tuple(entry.receipt for entry in entries),
            root=root,
            public_key=self._signer.public_key,
            signature=self._signer.sign(message),
            signed_ms=self._signed_ms,
        )

    def _abandon(self) -> None:
        """Nobody waits when the loop has ended."""
        left = [*self._writing, *self._kept.values(), *self._pending.values()]
        self._pending, self._writing, self._kept, self._signed = {}, [], {}, None
        for entry in left:
            _lost(entry.receipt, ShuttingDown.code)
        message = "The platform stopped before the receipt was known to be stored."
        _tell(left, lambda: StoreError(message))
        self._running = False
        self._ended.set()


def _lost(receipt: Receipt, code: str) -> None:
    _log.error("receipt lost", request=receipt.request, code=code)


def _tell(entries: Sequence[_Pending], what: Callable[[], AnserError | None]) -> None:
    """Tell all who wait for these, once."""
    for entry in entries:
        waiting, entry.told = entry.told, []
        for told in waiting:
            told(what())


def late() -> StoreError:
    """What is said where a receipt was not durable within RECORD_TIMEOUT_S."""
    return StoreError(f"The receipt was not durable within {limits.RECORD_TIMEOUT_S:g} s.")
