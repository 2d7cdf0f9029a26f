"""Whatever happens to the store and to those who wait, the ledger tells the truth."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.adapters.signer import KeyFileSigner
from anser.core.errors import Conflict, StoreError, StoreFull, StoreLocked
from anser.core.ledger import Receipt
from anser.ports import SignedBatch, Signer
from anser.services.ledger import Ledger
from anser.services.receipt_file import canonical, document_of, verify
from tests.receipts import make_receipt

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")


class UnreliableStore(MemoryStore):
    """Takes its time, fails at random, and at times says so only after having stored."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.healed = False

    async def append(self, batch: SignedBatch) -> None:
        """Store, fail, or store and fail."""
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)
        fate = 1.0 if self.healed else self.chance.random()
        if fate < 0.2:
            raise StoreFull("The disk is full.")
        await super().append(batch)
        if fate < 0.3:
            raise StoreLocked("It did not answer in time.")


@dataclass
class Told:
    """What was told to those who asked."""

    stored: list[Receipt] = field(default_factory=list[Receipt])
    enqueued: list[Receipt] = field(default_factory=list[Receipt])
    failed: int = 0
    gave_up: int = 0


async def ask(ledger: Ledger, told: Told, receipt: Receipt, patience: float) -> None:
    """Record one receipt, or lose patience."""
    try:
        async with asyncio.timeout(patience):
            await ledger.record(receipt)
        told.stored.append(receipt)
    except (StoreError, Conflict):
        told.failed += 1
    except TimeoutError:
        told.gave_up += 1


async def live(ledger: Ledger, told: Told, chance: random.Random) -> None:
    """A while of traffic: records, repetitions, contradictions, clients who leave."""
    async with asyncio.TaskGroup() as tasks:
        for _ in range(chance.randrange(1, 40)):
            number = chance.randrange(20)
            member = "lab" if chance.random() < 0.9 else "other"
            receipt = make_receipt(number, member=member)
            if chance.random() < 0.3:
                receipt = make_receipt(1_000 + len(told.enqueued))
                told.enqueued.append(receipt)
                ledger.enqueue(receipt)
            else:
                patience = chance.choice([0.0, 0.001, 60.0])
                tasks.create_task(ask(ledger, told, receipt, patience))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            ledger.validate()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), cancel=st.booleans())
async def test_what_was_told_is_true(signer: Signer, *, seed: int, cancel: bool) -> None:
    """A receipt told as stored is stored, once, as it was; a client who left is not forgotten."""
    chance = random.Random(seed)
    store, told = UnreliableStore(chance), Told()
    ledger = Ledger(store, signer, MemoryClock())
    loop = asyncio.ensure_future(ledger.run())
    await asyncio.sleep(0)  # a loop that never began cannot write what was accepted
    await live(ledger, told, chance)
    store.healed = True
    if cancel:
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
    else:
        await ledger.aclose()
        await loop
    ledger.validate()
    store.validate()  # no request has two receipts
    for receipt in told.stored + told.enqueued:
        found = await store.find(receipt.request)
        assert found is not None, f"{receipt.request} is lost"
        assert found.batch.receipts[found.index] == receipt
        assert verify(canonical(document_of(found)), public_key=signer.public_key) == receipt


def test_the_store_of_these_tests_does_fail(tmp_path: Path) -> None:
    """The unreliable store fails both ways, or the test above would show nothing."""

    async def fates() -> set[type[Exception]]:
        store, found = UnreliableStore(random.Random(1)), set[type[Exception]]()
        ledger = Ledger(store, KeyFileSigner.open(tmp_path / "signing.key"), MemoryClock())
        loop = asyncio.ensure_future(ledger.run())
        for number in range(50):
            try:
                await ledger.record(make_receipt(number))
            except StoreError as error:
                found.add(type(error))
        store.healed = True
        await ledger.aclose()
        await loop
        return found

    assert asyncio.run(fates()) == {StoreFull, StoreLocked}
