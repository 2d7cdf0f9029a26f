"""The contracts of MemberStore, NodeStore and ReceiptStore, kept by every store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anser.adapters.memory import MemoryStore
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.core.contribution import Credit
from anser.core.errors import Conflict
from anser.core.fleet import Node
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.members import Key, Limits, Member, Scope
from anser.ports import Signer, UsageRow
from tests.receipts import by_node_of, make_batch, make_receipt

pytestmark = pytest.mark.anyio

Store = MemoryStore | SqliteStore
ALWAYS = {"since_ms": 0, "until_ms": 2**53}


@asynccontextmanager
async def memory_store(_: Path) -> AsyncGenerator[Store]:
    """An empty store in memory."""
    store = MemoryStore()
    yield store
    store.validate()


@asynccontextmanager
async def sqlite_store(folder: Path) -> AsyncGenerator[Store]:
    """An empty store in a file."""
    async with SqliteStore.open(folder / "anser.db") as store:
        yield store
        store.validate()


@pytest.fixture(params=[memory_store, sqlite_store])
def open_store(
    request: pytest.FixtureRequest,
) -> Callable[[Path], AbstractAsyncContextManager[Store]]:
    """Each kind of store in turn."""
    opened: Callable[[Path], AbstractAsyncContextManager[Store]] = request.param
    return opened


@pytest.fixture
async def store(
    open_store: Callable[[Path], AbstractAsyncContextManager[Store]], tmp_path: Path
) -> AsyncGenerator[Store]:
    """Each kind of store in turn, open and empty."""
    async with open_store(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")


def make_key(id_: str, **changes: object) -> Key:
    """A key whose fields are all set, except where a test says otherwise."""
    fields: dict[str, object] = {
        "hash": bytes(range(32)),
        "member": "lab/ocean",
        "label": "Mei's laptop",
        "scope": Scope.OPERATE,
        "created_at": 1_800_000_000.25,
        "expires_at": 1_900_000_000.5,
        "revoked_at": 1_850_000_000.75,
    }
    return Key(id=id_, **(fields | changes))  # type: ignore[arg-type]


class TestMemberStore:
    """Members and keys last as they were put."""

    async def test_empty(self, store: Store) -> None:
        """A new store has no members and no keys."""
        assert await store.members() == []
        assert await store.keys() == []

    async def test_member_is_kept_whole(self, store: Store) -> None:
        """Every field of a member comes back, also limits that are not set."""
        limits = Limits(in_flight_max=1, queued_max=0, tokens_per_minute=2**40, tokens_per_day=5)
        full = Member(id="lab", weight=2_500, limits=limits, created_at=1_800_000_000.125)
        bare = Member(id="lab/ocean")
        await store.put_member(full)
        await store.put_member(bare)
        assert await store.members() == [full, bare]

    async def test_member_is_replaced(self, store: Store) -> None:
        """Putting a member again replaces it; putting the same one changes nothing."""
        await store.put_member(Member(id="lab", limits=Limits(queued_max=5)))
        for _ in range(2):
            await store.put_member(Member(id="lab", weight=7))
        assert await store.members() == [Member(id="lab", weight=7)]

    async def test_parents_come_first(self, store: Store) -> None:
        """Members come with parents before children, whatever the order they were put in."""
        ids = ["b/c", "a/b/c", "a-b", "a/b", "a.b", "a", "b", "ab", "a/b-c", "a/b.c/d"]
        for id_ in ids:
            await store.put_member(Member(id=id_))
        listed = [member.id for member in await store.members()]
        assert sorted(listed) == sorted(ids)
        for place, id_ in enumerate(listed):
            parent = id_.rpartition("/")[0]
            assert parent not in listed[place:]

    async def test_key_is_kept_whole(self, store: Store) -> None:
        """Every field of a key comes back, also those that are not set, revoked ones too."""
        full = make_key("k1")
        bare = make_key("k2", scope=Scope.USE, expires_at=None, revoked_at=None, label="键")
        await store.put_key(bare)
        await store.put_key(full)
        assert await store.keys() == [full, bare]

    async def test_key_is_replaced(self, store: Store) -> None:
        """Putting a key again replaces it: so is one revoked."""
        await store.put_key(make_key("k1", revoked_at=None))
        await store.put_key(make_key("k1", revoked_at=5.0))
        assert await store.keys() == [make_key("k1", revoked_at=5.0)]

    async def test_keys_are_forgotten(self, store: Store) -> None:
        """Keys are deleted together; unknown ones are passed over; twice is as once."""
        for id_ in ("k1", "k2", "k3"):
            await store.put_key(make_key(id_))
        for _ in range(2):
            await store.forget_keys(("k1", "k3", "k9"))
        assert await store.keys() == [make_key("k2")]
        await store.forget_keys(())
        assert await store.keys() == [make_key("k2")]


class TestNodeStore:
    """Listed nodes last as they were put."""

    async def test_node_is_kept_whole(self, store: Store) -> None:
        """Every field of a node comes back, by id, also those that are not set."""
        full = Node(
            id="b",
            url="http://127.0.0.1:8001/v1",
            model="qwen3-8b",
            slots=8,
            key_file="/etc/key",
            jurisdiction="CH",
            draining=True,
            member="lab",
        )
        bare = Node(id="a", url="https://models.example/v1")
        assert await store.nodes() == []
        await store.put_node(full)
        await store.put_node(bare)
        assert await store.nodes() == [bare, full]

    async def test_node_is_replaced(self, store: Store) -> None:
        """Putting a node again replaces it."""
        await store.put_node(Node(id="a", url="http://one", slots=3))
        for _ in range(2):
            await store.put_node(Node(id="a", url="http://two", draining=True))
        assert await store.nodes() == [Node(id="a", url="http://two", draining=True)]

    async def test_node_is_forgotten(self, store: Store) -> None:
        """A node is deleted; an unknown one is passed over."""
        await store.put_node(Node(id="a", url="http://one"))
        for _ in range(2):
            await store.forget_node("a")
        assert await store.nodes() == []


class TestReceiptStore:
    """Receipts are stored in whole batches, each once, and summed exactly."""

    async def test_receipt_is_found_with_its_batch(self, store: Store, signer: Signer) -> None:
        """A receipt comes back with all that its proof needs, from any place of any batch."""
        batches = [
            make_batch([make_receipt(number) for number in numbers], signer, signed_ms=numbers[0])
            for numbers in ([1], [2, 3, 4], [5, 6])
        ]
        for batch in batches:
            await store.append(batch)
        for batch in batches:
            for index, receipt in enumerate(batch.receipts):
                found = await store.find(receipt.request)
                assert found is not None
                assert (found.index, found.batch) == (index, batch)
        assert await store.find("request-7") is None

    async def test_same_batch_again_changes_nothing(self, store: Store, signer: Signer) -> None:
        """Appending what is stored is no error and no second receipt, also under a new batch."""
        receipts = [make_receipt(number) for number in range(3)]
        for batch in (receipts, receipts, receipts[1:], receipts[:1]):
            await store.append(make_batch(batch, signer))
        [row] = await store.usage(**ALWAYS, member=None)
        assert row.requests == 3
        assert len(await store.recent(limit=9, member=None)) == 3

    @pytest.mark.parametrize(
        "second",
        [
            [make_receipt(1), make_receipt(3)],
            [make_receipt(3), make_receipt(1)],
            [make_receipt(3), make_receipt(3)],
            [make_receipt(1, member="other")],
            [make_receipt(3), make_receipt(1, member="other")],
        ],
    )
    async def test_mixed_or_contradicting_batch_is_refused(
        self, store: Store, signer: Signer, second: list[Receipt]
    ) -> None:
        """A batch is stored whole or not at all: Conflict if some is stored, or differs."""
        first = make_batch([make_receipt(1), make_receipt(2)], signer)
        await store.append(first)
        with pytest.raises(Conflict):
            await store.append(make_batch(second, signer))
        assert await store.find("request-3") is None
        found = await store.find("request-1")
        assert found is not None
        assert found.batch == first
        await store.append(make_batch([make_receipt(3)], signer))  # and the store goes on

    async def test_usage_counts_each_outcome(self, store: Store, signer: Signer) -> None:
        """Sums are per member and model, with failed and cancelled requests told apart."""
        used = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3)
        receipts = [
            make_receipt(number, member=member, model=model, outcome=outcome, usage=used)
            for number, (member, model, outcome) in enumerate(
                [
                    ("a", "m", Outcome.FINISHED),
                    ("a", "m", Outcome.FAILED),
                    ("a", "m", Outcome.CANCELLED),
                    ("a", "n", Outcome.CANCELLED),
                    ("b", "m", Outcome.FINISHED),
                ]
            )
        ]
        await store.append(make_batch(receipts, signer))

        def row(member: str, model: str, requests: int, failed: int, cancelled: int) -> UsageRow:
            return UsageRow(
                member=member,
                model=model,
                requests=requests,
                failed=failed,
                cancelled=cancelled,
                prompt_tokens=10 * requests,
                cached_tokens=4 * requests,
                completion_tokens=3 * requests,
            )

        assert await store.usage(**ALWAYS, member=None) == [
            row("a", "m", 3, 1, 1),
            row("a", "n", 1, 0, 1),
            row("b", "m", 1, 0, 0),
        ]

    async def test_usage_is_from_since_until_before_until(
        self, store: Store, signer: Signer
    ) -> None:
        """The first millisecond counts, the last does not."""
        receipts = [make_receipt(number, ended_ms=1_000 + number) for number in range(5)]
        await store.append(make_batch(receipts, signer))
        [row] = await store.usage(since_ms=1_001, until_ms=1_003, member=None)
        assert row.requests == 2
        assert await store.usage(since_ms=1_001, until_ms=1_001, member=None) == []

    @pytest.mark.parametrize(
        ("member", "expected"),
        [
            ("a/b", ["a/b", "a/b/c"]),
            ("a", ["a", "a/b", "a/b-c", "a/b.c", "a/b/c", "a/bc"]),
            ("a/bc", ["a/bc"]),
            ("a/b/c", ["a/b/c"]),
            ("b", []),
            ("", []),
        ],
    )
    async def test_a_member_is_itself_and_all_below_it(
        self, store: Store, signer: Signer, member: str, expected: list[str]
    ) -> None:
        """`a/b` covers `a/b/c`, but neither `a/bc` nor `a/b-c`, `a/b.c` or `ab`."""
        ids = ["a", "ab", "a-b", "a.b/c", "a/b", "a/b/c", "a/bc", "a/b-c", "a/b.c", "a0"]
        receipts = [make_receipt(number, member=id_) for number, id_ in enumerate(ids)]
        await store.append(make_batch(receipts, signer))
        rows = await store.usage(**ALWAYS, member=member)
        assert [row.member for row in rows] == expected
        recent = await store.recent(limit=99, member=member)
        assert sorted(receipt.member for receipt in recent) == expected

    async def test_recent_is_newest_first(self, store: Store, signer: Signer) -> None:
        """The newest are those appended last, whatever their times say; the limit is kept."""
        order = [3, 1, 4, 2, 5]
        for number in order:
            member = "a/b" if number % 2 else "a/c"
            receipt = make_receipt(number, member=member, ended_ms=number)
            await store.append(make_batch([receipt], signer))
        for member, newest in [
            (None, order[::-1]),
            ("a", order[::-1]),
            ("a/b", [5, 1, 3]),
            ("a/d", []),
        ]:
            for limit in (0, 1, 2, 9):
                recent = await store.recent(limit=limit, member=member)
                expected = [f"request-{number}" for number in newest[:limit]]
                assert [receipt.request for receipt in recent] == expected

    async def test_credit_is_summed_by_owner(self, store: Store, signer: Signer) -> None:
        """What nodes served to others than their owners is summed by owner, from since to until.

        The time of a sum is the mean, by credit; who served itself or broke off has earned nothing.
        """
        used = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=1)  # 10.4 credits
        twice = Usage(prompt_tokens=20, cached_tokens=8, completion_tokens=2)
        hour, day = 3_600_000, 86_400_000
        receipts = [
            by_node_of("lab", make_receipt(1, usage=used, ended_ms=hour, member="b/c")),
            by_node_of("lab", make_receipt(2, usage=twice, ended_ms=hour + 900, member="b")),
            by_node_of("lab", make_receipt(3, usage=used, ended_ms=day - 1, member="b")),
            by_node_of("", make_receipt(4, usage=used, ended_ms=hour, member="lab")),
            by_node_of("lab", make_receipt(5, usage=used, ended_ms=hour, member="lab/ocean")),
            by_node_of("lab", make_receipt(6, usage=used, ended_ms=day, member="b")),
            by_node_of(None, make_receipt(7, usage=used, ended_ms=hour, member="b")),
            by_node_of("b", make_receipt(8, outcome=Outcome.FAILED, ended_ms=hour)),
            by_node_of("b", make_receipt(9, usage=Usage(), ended_ms=hour)),
            by_node_of("", make_receipt(10, usage=used, ended_ms=hour - 1, member="lab")),
        ]
        await store.append(make_batch(receipts, signer))
        assert await store.credits(since_ms=hour, until_ms=day) == [
            Credit(owner="", micro_credits=10_400_000, at_ms=hour),
            Credit(owner="lab", micro_credits=31_200_000, at_ms=hour + 600),
            Credit(owner="lab", micro_credits=10_400_000, at_ms=day - 1),
        ]
        assert await store.credits(since_ms=2 * day, until_ms=3 * day) == []

    async def test_absurd_credit_is_stored(self, store: Store, signer: Signer) -> None:
        """The largest receipts that there can be are summed, not refused for their size."""
        most = Usage(prompt_tokens=2**53 - 1, completion_tokens=2**53 - 1)
        receipts = [
            by_node_of("b", make_receipt(number, usage=most, ended_ms=0)) for number in range(3)
        ]
        await store.append(make_batch(receipts, signer))
        [row] = await store.credits(**ALWAYS)
        assert row.micro_credits == pytest.approx(3 * 2**53)

    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    async def test_stores_agree(self, tmp_path: Path, signer: Signer, data: st.DataObject) -> None:
        """Whatever was appended, every store gives the same sums and the same newest receipts."""
        parts = st.sampled_from(["a", "a-b", "ab", "b", "0", "a.b"])
        paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
        times = st.integers(0, 20)
        folder = Path(mkdtemp(dir=tmp_path))
        async with memory_store(folder) as memory, sqlite_store(folder) as sqlite:
            for number in range(data.draw(st.integers(1, 12))):
                receipt = make_receipt(
                    number,
                    member=data.draw(paths),
                    model=data.draw(st.sampled_from(["m", "n"])),
                    outcome=data.draw(st.sampled_from(Outcome)),
                    ended_ms=data.draw(times),
                )
                for store in (memory, sqlite):
                    await store.append(make_batch([receipt], signer))
            for _ in range(5):
                member = data.draw(st.none() | paths)
                since_ms, until_ms = data.draw(times), data.draw(times)
                limit = data.draw(st.integers(0, 5))
                sums = [
                    await store.usage(since_ms=since_ms, until_ms=until_ms, member=member)
                    for store in (memory, sqlite)
                ]
                assert sums[0] == sums[1]
                newest = [
                    await store.recent(limit=limit, member=member) for store in (memory, sqlite)
                ]
                assert newest[0] == newest[1]
