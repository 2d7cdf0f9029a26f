"""The ledger's group commit: durable, signed, and honest when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import rfc8785

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.adapters.signer import KeyFileSigner
from anser.core import limits
from anser.core.errors import (
    Conflict,
    NotFound,
    Overloaded,
    ReceiptError,
    ShuttingDown,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
)
from anser.core.ledger import Outcome
from anser.ports import SignedBatch, Signer
from anser.services.ledger import Ledger, verify
from tests.receipts import make_batch, make_receipt

pytestmark = pytest.mark.anyio


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path / "signing.key")


class SlowStore(MemoryStore):
    """A store whose writes wait until `gate` is opened; it counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.sizes: list[int] = []

    async def append(self, batch: SignedBatch) -> None:
        """Store a whole batch once the gate is open."""
        self.sizes.append(len(batch.leaves))
        await self.gate.wait()
        await super().append(batch)


@asynccontextmanager
async def running(
    store: MemoryStore, signer: Signer, clock: MemoryClock | None = None
) -> AsyncGenerator[Ledger]:
    """A ledger with its loop, closed in order."""
    ledger = Ledger(store, signer, clock or MemoryClock())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ledger.run())
        try:
            yield ledger
            ledger.validate()
        finally:
            await ledger.aclose()
    ledger.validate()
    store.validate()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_recorded_receipt_is_stored_and_verifies(signer: Signer) -> None:
    """When `record` returns, the receipt is stored and its file checks against the key."""
    async with running(MemoryStore(), signer) as ledger:
        receipt = make_receipt(1)
        await ledger.record(receipt)
        document = rfc8785.dumps(await ledger.export("request-1"))
    assert verify(document, public_key=ledger.public_key) == receipt


async def test_receipts_that_pile_up_share_a_signature(signer: Signer) -> None:
    """All that waits while a batch is written goes into the next one."""
    store = SlowStore()
    async with running(store, signer) as ledger, asyncio.TaskGroup() as tasks:
        tasks.create_task(ledger.record(make_receipt(0)))
        await settle()
        for number in range(1, 40):
            tasks.create_task(ledger.record(make_receipt(number)))
        await settle()
        store.gate.set()
    assert store.sizes == [1, 39]


async def test_batch_has_its_limit(signer: Signer) -> None:
    """No batch is larger than BATCH_RECEIPTS_MAX; the rest goes into the next one."""
    store = SlowStore()
    async with running(store, signer) as ledger, asyncio.TaskGroup() as tasks:
        for number in range(limits.BATCH_RECEIPTS_MAX + 1):
            tasks.create_task(ledger.record(make_receipt(number)))
        store.gate.set()
    assert store.sizes == [limits.BATCH_RECEIPTS_MAX, 1]


async def test_queue_has_its_limit(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue refuses with Overloaded; what was accepted is stored all the same."""
    monkeypatch.setattr(limits, "RECEIPTS_PENDING_MAX", 3)
    store = SlowStore()
    async with running(store, signer) as ledger:
        for number in range(3):
            ledger.enqueue(make_receipt(number))
        with pytest.raises(Overloaded):
            await ledger.record(make_receipt(3))
        ledger.enqueue(make_receipt(4))  # lost, which is logged
        store.gate.set()
    assert len(await store.recent(limit=10, member=None)) == 3


async def test_failure_is_told_to_each_and_its_receipts_are_stored_later(signer: Signer) -> None:
    """A full disk is told to each who waits; once there is space all are stored, each once."""
    store = MemoryStore()
    async with running(store, signer) as ledger:
        store.fault = StoreFull("The disk is full.")
        outcomes = await asyncio.gather(
            ledger.record(make_receipt(1)), ledger.record(make_receipt(2)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [StoreFull, StoreFull]
        assert outcomes[0] is not outcomes[1]
        store.fault = None
        await ledger.record(make_receipt(3))
    stored = [receipt.request for receipt in await store.recent(limit=9, member=None)]
    assert sorted(stored) == ["request-1", "request-2", "request-3"]


async def test_a_kept_receipt_can_be_waited_for_again(signer: Signer) -> None:
    """Recording what is kept waits for the same entry; another receipt of it is refused."""
    store = MemoryStore()
    async with running(store, signer) as ledger:
        store.fault = StoreLocked("Locked.")
        with pytest.raises(StoreLocked):
            await ledger.record(make_receipt(1))
        with pytest.raises(Conflict):
            await ledger.record(make_receipt(1, member="lab"))
        store.fault = None
        await ledger.record(make_receipt(1))
        assert "kept=0" in repr(ledger)
    assert len(await store.recent(limit=9, member=None)) == 1


async def test_who_waits_goes_before_what_is_kept(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is kept, a client learns at the next commit how its own receipt fares."""
    monkeypatch.setattr(limits, "BATCH_RECEIPTS_MAX", 4)
    batches: list[list[str]] = []

    class FailingStore(MemoryStore):
        async def append(self, batch: SignedBatch) -> None:
            batches.append([receipt.request for receipt in batch.receipts])
            await super().append(batch)

    store = FailingStore()
    async with running(store, signer) as ledger:
        store.fault = StoreFull("Full.")
        for number in range(8):
            ledger.enqueue(make_receipt(number))
        await settle()
        batches.clear()
        with pytest.raises(StoreFull):
            await ledger.record(make_receipt(9))
        assert batches == [["request-9"]]
        store.fault = None
        await ledger.record(make_receipt(10))
        assert batches[1] == ["request-10"]
    assert len(await store.recent(limit=99, member=None)) == 10


async def test_a_failing_store_is_left_alone_for_a_while(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a whole batch kept and nobody waiting, the ledger sleeps between two tries."""
    monkeypatch.setattr(limits, "BATCH_RECEIPTS_MAX", 4)
    monkeypatch.setattr("anser.services.ledger._RETRY_S", 0.05)
    tries: list[int] = []

    class FailingStore(MemoryStore):
        async def append(self, batch: SignedBatch) -> None:
            tries.append(len(batch.leaves))
            assert len(tries) < 100, "no pause between two tries"
            await super().append(batch)

    store = FailingStore()
    async with running(store, signer) as ledger:
        store.fault = StoreFull("Full.")
        for number in range(12):
            ledger.enqueue(make_receipt(number))
        await asyncio.sleep(0.18)
        assert 4 <= len(tries) <= 7
        store.fault = None
    assert len(await store.recent(limit=99, member=None)) == 12


async def test_stopping_on_a_failing_store_tries_once_more(signer: Signer) -> None:
    """At the end what is kept is tried a last time, and the ledger ends whatever comes of it."""
    store = MemoryStore()
    store.fault = StoreFull("Full.")
    async with asyncio.timeout(5), running(store, signer) as ledger:
        for number in range(limits.BATCH_RECEIPTS_MAX + 1):
            ledger.enqueue(make_receipt(number))
        await settle()
    assert "pending=0 kept=0 writing=0" in repr(ledger)


async def test_kept_receipts_take_room(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it waits, is written or is kept, a receipt counts in the one limit."""
    monkeypatch.setattr(limits, "RECEIPTS_PENDING_MAX", 2)
    store = SlowStore()
    async with running(store, signer) as ledger:
        store.fault = StoreFull("Full.")
        ledger.enqueue(make_receipt(1))
        await settle()
        assert ledger.room == 1  # it is being written
        store.gate.set()
        await settle()
        assert ledger.room == 1  # it is kept
        ledger.enqueue(make_receipt(2))
        with pytest.raises(Overloaded):
            await ledger.record(make_receipt(3))
        store.fault = None


async def test_receipt_of_a_client_who_left_outlives_a_failure(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody waits for is tried again by itself until it is stored."""
    monkeypatch.setattr("anser.services.ledger._RETRY_S", 0.01)
    stored = asyncio.Event()

    class TellingStore(MemoryStore):
        async def append(self, batch: SignedBatch) -> None:
            await super().append(batch)
            stored.set()

    store = TellingStore()
    async with running(store, signer) as ledger:
        store.fault = StoreLocked("Locked.")
        ledger.enqueue(make_receipt(1, outcome=Outcome.CANCELLED))
        await asyncio.sleep(0.05)
        assert "kept=1" in repr(ledger)
        ledger.validate()
        store.fault = None
        async with asyncio.timeout(5):
            await stored.wait()
    assert await store.find("request-1") is not None


async def test_receipt_is_written_though_its_waiter_gave_up(signer: Signer) -> None:
    """Once accepted, a receipt is stored even if the one who waited is cancelled."""
    store = SlowStore()
    async with running(store, signer) as ledger:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ledger.record(make_receipt(1))
        store.gate.set()
    assert await store.find("request-1") is not None


async def test_waiting_has_a_deadline(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receipt that is not durable in time fails with StoreError, instead of waiting for ever."""
    monkeypatch.setattr(limits, "RECORD_TIMEOUT_S", 0.01)
    store = SlowStore()
    async with running(store, signer) as ledger:
        with pytest.raises(StoreError, match="not durable within"):
            await ledger.record(make_receipt(1))
        store.gate.set()


async def test_recording_twice_changes_nothing(signer: Signer) -> None:
    """The same receipt, at once, while it is written, or later, is stored once."""
    store = SlowStore()
    async with running(store, signer) as ledger:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ledger.record(make_receipt(1)))
            await settle()  # it is being written
            tasks.create_task(ledger.record(make_receipt(1)))
            tasks.create_task(ledger.record(make_receipt(1)))
            tasks.create_task(ledger.record(make_receipt(2)))
            await settle()
            store.gate.set()
        await ledger.record(make_receipt(1))
    requests = [receipt.request for receipt in await store.recent(limit=9, member=None)]
    assert sorted(requests) == ["request-1", "request-2"]


async def test_two_receipts_of_one_request_conflict(signer: Signer) -> None:
    """A second, different receipt of a request is refused; others in its batch are stored."""
    store = SlowStore()
    store.gate.set()
    other = make_receipt(1, member="lab")
    async with running(store, signer) as ledger:
        await ledger.record(make_receipt(1))
        outcomes = await asyncio.gather(
            ledger.record(other), ledger.record(make_receipt(2)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [Conflict, type(None)]
        with pytest.raises(Conflict):
            await ledger.record(other)
        ledger.enqueue(other)  # lost, which is logged
        store.gate.clear()
        ledger.enqueue(make_receipt(3))
        with pytest.raises(Conflict):
            await ledger.record(make_receipt(3, member="lab"))
        store.gate.set()
    found = await store.find("request-1")
    assert found is not None
    assert found.batch.receipts[found.index] == make_receipt(1)


async def test_conflict_and_full_disk_together(signer: Signer) -> None:
    """While each is tried alone, a failure fails that one only."""

    class FillingStore(MemoryStore):
        async def append(self, batch: SignedBatch) -> None:
            if [receipt.request for receipt in batch.receipts] == ["request-3"]:
                raise StoreFull("The disk is full.")
            await super().append(batch)

    store = FillingStore()
    async with running(store, signer) as ledger:
        await ledger.record(make_receipt(1))
        outcomes = await asyncio.gather(
            *(ledger.record(make_receipt(number)) for number in (1, 2, 3)),
            return_exceptions=True,
        )
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), StoreFull]


async def test_closing_writes_what_was_accepted(signer: Signer) -> None:
    """`aclose` returns when all that was accepted is stored; later receipts are refused."""
    store = SlowStore()
    async with running(store, signer) as ledger:
        for number in range(3):
            ledger.enqueue(make_receipt(number))
        await settle()
        for number in range(3, 6):
            ledger.enqueue(make_receipt(number))
        asyncio.get_running_loop().call_later(0.02, store.gate.set)
        await ledger.aclose()
        assert len(await store.recent(limit=9, member=None)) == 6
        with pytest.raises(ShuttingDown):
            await ledger.record(make_receipt(9))
        await ledger.aclose()


async def test_cancelled_loop_writes_what_was_accepted(signer: Signer) -> None:
    """A loop that is cancelled in mid-write still stores everything, each receipt once."""
    store = SlowStore()
    ledger = Ledger(store, signer, MemoryClock())
    loop = asyncio.ensure_future(ledger.run())
    waiters = [asyncio.ensure_future(ledger.record(make_receipt(0)))]
    await settle()
    waiters.append(asyncio.ensure_future(ledger.record(make_receipt(1))))
    await settle()
    loop.cancel()
    await settle()
    store.gate.set()
    await asyncio.gather(*waiters)
    with pytest.raises(asyncio.CancelledError):
        await loop
    ledger.validate()
    assert len(await store.recent(limit=9, member=None)) == 2


async def test_the_last_write_is_not_cut_off(signer: Signer) -> None:
    """A loop whose whole task group is cancelled stores what it had accepted all the same."""
    store = SlowStore()
    ledger = Ledger(store, signer, MemoryClock())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ledger.run)
        await settle()
        ledger.enqueue(make_receipt(0))
        await settle()
        asyncio.get_running_loop().call_later(0.02, store.gate.set)
        tasks.cancel_scope.cancel()
    assert await store.find("request-0") is not None


async def test_nobody_waits_when_the_loop_has_ended(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk hangs while the platform stops, all who wait are told; nothing hangs."""
    monkeypatch.setattr(limits, "LEDGER_FLUSH_S", 0.05)
    ledger = Ledger(SlowStore(), signer, MemoryClock())
    loop = asyncio.ensure_future(ledger.run())
    waiter = asyncio.ensure_future(ledger.record(make_receipt(0)))
    ledger.enqueue(make_receipt(1))  # lost, which is logged
    await settle()
    loop.cancel()
    with pytest.raises(StoreError, match="stopped before"):
        await waiter
    with pytest.raises(asyncio.CancelledError):
        await loop
    ledger.validate()


async def test_signing_time_never_goes_back(signer: Signer) -> None:
    """The clock may jump back by an hour, also across a restart: batches stay in order."""
    store, clock = MemoryStore(), MemoryClock()
    for number in range(2):
        async with running(store, signer, clock) as ledger:
            await ledger.record(make_receipt(2 * number))
            clock.jump(-3_600)
            await ledger.record(make_receipt(2 * number + 1))
    clock.jump(3 * 3_600)
    async with running(store, signer, clock) as ledger:
        await ledger.record(make_receipt(9))
        exported = [await ledger.export(f"request-{number}") for number in (0, 1, 2, 3, 9)]
    times = [document["batch"]["signed_ms"] for document in exported]
    assert times == sorted(times)
    assert times[0] == times[3] < times[4] == int(clock.wall() * 1_000)


async def test_unknown_request_has_no_receipt(signer: Signer) -> None:
    """Asking for a receipt that does not exist raises NotFound."""
    async with running(MemoryStore(), signer) as ledger:
        with pytest.raises(NotFound):
            await ledger.export("request-1")


async def test_damaged_receipt_is_never_given_out(signer: Signer) -> None:
    """What no longer verifies in the store is reported as damage, not exported."""
    store = MemoryStore()
    good = make_batch([make_receipt(1)], signer)
    await store.append(
        SignedBatch(
            leaves=good.leaves,
            receipts=(make_receipt(1, member="lab"),),
            root=good.root,
            public_key=good.public_key,
            signature=good.signature,
            signed_ms=good.signed_ms,
        )
    )
    async with running(store, signer) as ledger:
        with pytest.raises(StoreCorrupt, match="does not verify"):
            await ledger.export("request-1")


async def test_text_that_is_not_unicode_is_refused_alone(signer: Signer) -> None:
    """A receipt that has no canonical form is refused before it is accepted."""
    store = MemoryStore()
    async with running(store, signer) as ledger:
        with pytest.raises(ReceiptError):
            await ledger.record(make_receipt(1, model="\ud800"))
        await ledger.record(make_receipt(2))
    assert await store.find("request-1") is None


async def test_usage_and_recent_come_from_the_store(signer: Signer) -> None:
    """Sums and the newest receipts are those of the store."""
    async with running(MemoryStore(), signer) as ledger:
        await ledger.record(make_receipt(1))
        rows = await ledger.usage(since_ms=0, until_ms=2**50, member="lab")
        assert [row.requests for row in rows] == [1]
        assert await ledger.recent(limit=1) == [make_receipt(1)]
