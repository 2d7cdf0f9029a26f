"""What the machine does to the store: full and read-only disks, locks, damage, interruption.

Each fault is a real one. What must hold: a clear error that names the file, nothing half-written,
never a silent loss, and service again as soon as the fault is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from anser.adapters import sqlite_schema
from anser.adapters.clock import SystemClock
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.core import limits
from anser.core.errors import (
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreNewer,
)
from anser.core.members import Member
from anser.ports import Signer
from anser.services.ledger import Ledger
from tests.receipts import make_batch, make_receipt

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A real Ed25519 key."""
    return KeyFileSigner.open(tmp_path_factory.mktemp("key") / "signing.key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store's file is."""
    return tmp_path / "anser.db"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, or to a deadline."""
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Generator[Path]:
    """A file system of its own in memory; skips where none can be mounted."""
    folder.mkdir(exist_ok=True)
    try:
        done = run("mount", "-t", "tmpfs", "-o", options, "tmpfs", folder)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        assert run("umount", folder).returncode == 0


def remount(disk: Path, option: str) -> None:
    """Make a mounted file system read-only (ro) or not (rw)."""
    assert run("mount", "-o", f"remount,{option}", disk).returncode == 0


def content(path: Path) -> bytes:
    """The whole file."""
    return path.read_bytes()


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Generator[subprocess.Popen[bytes]]:
    """Another Python process that has printed its first line; ended at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline()
            yield child
        finally:
            child.kill()


def assert_whole(path: Path) -> int:
    """The file is undamaged and every batch in it complete; the number of its receipts."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        torn = """
            SELECT b.id FROM batches AS b LEFT JOIN receipts AS r ON r.batch = b.id
            GROUP BY b.id HAVING count(r.id) != b.size
        """
        assert connection.execute(torn).fetchall() == []
        count: int = connection.execute("SELECT count(*) FROM receipts").fetchone()[0]
        return count


async def record_until_full(ledger: Ledger, *, first: int, size: int) -> int:
    """Record groups of receipts until the disk is full; how many were acknowledged."""
    stored = 0
    while stored < 100_000:
        numbers = range(first + stored, first + stored + size)
        outcomes = await asyncio.gather(
            *(ledger.record(make_receipt(number)) for number in numbers), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if outcome is not None]
        if failures:
            for failure in failures:
                assert isinstance(failure, StoreFull)
                assert re.search(r"anser\.db: cannot .* disk is full", failure.message)
            assert len(failures) == size  # the batch failed as a whole
            return stored
        stored += size
    raise AssertionError("the disk never filled up")


async def test_full_disk_fails_loudly_and_recovers(tmp_path: Path, signer: Signer) -> None:
    """On a full disk each receipt's end fails with a clear error; with space all are stored."""
    with mounted(tmp_path / "disk", "size=2m") as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1024 * 1024))
        async with SqliteStore.open(disk / "anser.db") as store:
            ledger = Ledger(store, signer, SystemClock())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ledger.run())
                stored = await record_until_full(ledger, first=0, size=50)
                stored += await record_until_full(ledger, first=100_000, size=1)
                assert len(await ledger.recent(limit=100_000)) == stored
                ballast.unlink()
                await ledger.record(make_receipt(2_000_000))
                await ledger.aclose()
            rows = await store.usage(since_ms=0, until_ms=2**53, member=None)
            assert sum(row.requests for row in rows) == stored + 50 + 1 + 1
        assert assert_whole(disk / "anser.db") == stored + 50 + 1 + 1


async def test_full_disk_at_the_start(tmp_path: Path) -> None:
    """A platform that starts on a full disk stops with the cure, and starts once there is room."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        ballast = disk / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            file.write(bytes(65_536))
        with pytest.raises(StoreFull, match=r"anser\.db"):
            async with SqliteStore.open(disk / "anser.db"):
                pass
    with mounted(tmp_path / "disk", "size=1m") as disk:
        async with SqliteStore.open(disk / "anser.db") as store:
            assert await store.members() == []


FULL_QUOTA = """
import asyncio, resource, signal, sys
from pathlib import Path
from anser.adapters.sqlite import SqliteStore
from anser.core.errors import StoreFull
from anser.core.members import Member

async def main(path):
    async with SqliteStore.open(path) as store:
        size = 0
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            while size < 100_000:
                await store.put_member(Member(id=f"m{size}"))
                size += 1
        except StoreFull as error:
            print(size, error.message, sep="|")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        await store.put_member(Member(id="last"))
        assert len(await store.members()) == size + 1

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
asyncio.run(main(Path(sys.argv[1])))
"""


async def test_file_size_limit_is_a_full_disk(path: Path) -> None:
    """A quota or file size limit is told as a full disk, and service returns when it is lifted."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = run(sys.executable, "-c", FULL_QUOTA, path)
    assert done.returncode == 0, done.stderr
    stored, message = done.stdout.split("|")
    assert int(stored) > 0
    assert "disk is full, over its quota" in message
    async with SqliteStore.open(path) as store:
        assert len(await store.members()) == int(stored) + 1
    assert_whole(path)


async def test_read_only_folder(tmp_path: Path) -> None:
    """On a read-only disk the start stops and says so, whether the file exists or not."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        remount(disk, "ro")
        with pytest.raises(StoreFull, match=r"anser\.db cannot be written: Read-only"):
            async with SqliteStore.open(disk / "anser.db"):
                pass
        remount(disk, "rw")
        async with SqliteStore.open(disk / "anser.db") as store:
            await store.put_member(Member(id="lab"))
        remount(disk, "ro")
        with pytest.raises(StoreFull, match=r"anser\.db cannot be written: Read-only"):
            async with SqliteStore.open(disk / "anser.db"):
                pass
        remount(disk, "rw")
        async with SqliteStore.open(disk / "anser.db") as store:
            assert await store.members() == [Member(id="lab")]


async def test_missing_folder_and_folder_in_the_way(tmp_path: Path) -> None:
    """A path that cannot be a database is refused by name."""
    with pytest.raises(StoreFull, match="No such file or directory"):
        async with SqliteStore.open(tmp_path / "missing" / "anser.db"):
            pass
    with pytest.raises(StoreError, match="is a folder, not a database"):
        async with SqliteStore.open(tmp_path):
            pass


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
if len(sys.argv) > 2:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
connection.execute("BEGIN IMMEDIATE")
connection.execute("INSERT INTO nodes (id, url, draining) VALUES ('x', 'http://x', 0)")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
print("free", flush=True)
"""


async def test_locked_by_another_process(
    path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process writes, reads go on and writes fail as locked; then all goes on."""
    monkeypatch.setattr(limits, "STORE_BUSY_S", 0.1)
    async with SqliteStore.open(path) as store:
        await store.append(make_batch([make_receipt(1)], signer))
        with process(HOLDER, path) as other:
            with pytest.raises(StoreLocked, match="locked by another process"):
                await store.append(make_batch([make_receipt(2)], signer))
            assert len(await store.recent(limit=9, member=None)) == 1
            other.communicate(b"\n", timeout=20)
            await store.append(make_batch([make_receipt(2)], signer))
        assert len(await store.recent(limit=9, member=None)) == 2
        assert await store.nodes() == []


async def test_short_lock_is_waited_for(path: Path, signer: Signer) -> None:
    """A lock that goes away within STORE_BUSY_S delays a receipt and fails nothing."""
    async with SqliteStore.open(path) as store:
        with process(HOLDER, path) as other:
            append = asyncio.ensure_future(store.append(make_batch([make_receipt(1)], signer)))
            await asyncio.sleep(0.3)
            assert not append.done()
            other.communicate(b"\n", timeout=20)
            await append
        assert await store.find("request-1") is not None


async def test_locked_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that another process holds for itself alone stops the start as locked."""
    monkeypatch.setattr(limits, "STORE_BUSY_S", 0.1)
    async with SqliteStore.open(path):
        pass
    with process(HOLDER, path, "exclusive"), pytest.raises(StoreLocked, match=str(path)):
        async with SqliteStore.open(path):
            pass


async def test_newer_version_is_refused_and_left_alone(path: Path) -> None:
    """A file that a newer Anser wrote is not touched, and the error says what to do."""
    async with SqliteStore.open(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")
    before = content(path)
    with pytest.raises(StoreNewer, match=r"written by a newer Anser \(form 999; .*Upgrade"):
        async with SqliteStore.open(path):
            pass
    assert content(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


async def test_other_databases_are_refused_and_left_alone(path: Path) -> None:
    """The database of another program is neither changed nor called damaged."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE cookies (id INTEGER)")
    before = content(path)
    with pytest.raises(StoreError, match="database of another program"):
        async with SqliteStore.open(path):
            pass
    assert content(path) == before


async def fill(path: Path, signer: Signer) -> None:
    """A store with some hundred pages of receipts."""
    async with SqliteStore.open(path) as store:
        for first in range(0, 2_000, 500):
            receipts = [make_receipt(first + step) for step in range(500)]
            await store.append(make_batch(receipts, signer))


def damage(path: Path, *, page: int) -> None:
    """Overwrite one page of the file."""
    with path.open("r+b") as file:
        file.seek(4_096 * (page - 1))
        file.write(b"\xa5" * 4_096)


async def test_what_is_no_database_is_damaged(path: Path) -> None:
    """A file whose beginning is gone is reported as damaged, with the cure, and left alone."""
    with path.open("wb") as file:
        file.write(b"not a database at all, but long enough to look like one" * 100)
    before = content(path)
    with pytest.raises(StoreCorrupt, match=r"anser\.db is damaged .*backup.*\.recover"):
        async with SqliteStore.open(path):
            pass
    assert content(path) == before


async def test_damage_is_found_at_the_start_after_a_crash(path: Path, signer: Signer) -> None:
    """After an unclean end the file is checked: a damaged page stops the start, with the cure."""
    await fill(path, signer)
    leave_log_behind(path)
    damage(path, page=100)
    assert sqlite_schema.unclean(path)
    with pytest.raises(StoreCorrupt, match=r"anser\.db is damaged .*backup"):
        async with SqliteStore.open(path):
            pass


async def test_large_file_is_checked_in_part(
    path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a very large file only the small tables are checked, so that the start stays quick."""
    await fill(path, signer)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_schema"))
    leave_log_behind(path)
    monkeypatch.setattr(limits, "STORE_CHECK_BYTES_MAX", 4_096)
    async with SqliteStore.open(path):
        pass
    leave_log_behind(path)
    damage(path, page=pages["batches"])
    with pytest.raises(StoreCorrupt):
        async with SqliteStore.open(path):
            pass


def leave_log_behind(path: Path) -> None:
    """A writer that dies leaves its log, as after kill -9."""
    code = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute("DELETE FROM nodes")
connection.execute("INSERT INTO nodes (id, url, draining) VALUES ('x', 'http://x', 0)")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(sys.executable, "-c", code, path)
    assert done.returncode == -signal.SIGKILL


async def test_damage_is_reported_where_it_is_met(path: Path, signer: Signer) -> None:
    """Damage that the start did not look for fails the call that meets it, with the cure."""
    await fill(path, signer)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_schema"))
    damage(path, page=pages["receipts"])
    async with SqliteStore.open(path) as store:
        for call in (
            store.find("request-7"),
            store.recent(limit=1, member=None),
            store.append(make_batch([make_receipt(9_999)], signer)),
        ):
            with pytest.raises(StoreCorrupt, match=r"anser\.db is damaged"):
                await call
        await store.put_member(Member(id="lab"))  # the rest still works


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE receipts SET leaf = x'7b' WHERE id = 2",
        "UPDATE receipts SET leaf = x'7b7d' WHERE id = 2",
        "DELETE FROM receipts WHERE id = 3",
    ],
)
async def test_tampered_receipt_is_reported(path: Path, signer: Signer, change: str) -> None:
    """A receipt that was changed or taken from its batch is never given out as whole."""
    async with SqliteStore.open(path) as store:
        await store.append(make_batch([make_receipt(number) for number in range(3)], signer))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(change)
        assert connection.total_changes == 1
    async with SqliteStore.open(path) as store:
        with pytest.raises(StoreCorrupt, match=r"anser\.db is damaged .*backup"):
            await store.find("request-0")


MIGRATE = """
import os, signal, sys
from pathlib import Path
from anser.adapters.sqlite_connection import connect
from anser.adapters.sqlite_schema import create_file, prepare

path, left = Path(sys.argv[1]), int(sys.argv[2])
create_file(path)
connection = connect(path)

def count(statement):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

connection.set_trace_callback(count)
prepare(connection, path, check=False)
connection.close()
"""


async def test_interrupted_migration_has_not_happened(tmp_path: Path) -> None:
    """A first start that is killed before any statement of its migration leaves a usable file."""
    for statements in range(100):
        path = tmp_path / f"{statements}.db"
        done = run(sys.executable, "-c", MIGRATE, path, statements)
        async with SqliteStore.open(path) as store:
            assert await store.members() == []
        assert_whole(path)
        if done.returncode == 0:
            assert statements > 10
            return
        assert done.returncode == -signal.SIGKILL
    raise AssertionError("the migration never ended")
