"""What the machine does to a platform: too few files, a clock that jumps, two on one machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from anser.adapters.clock import SystemClock
from anser.adapters.memory_engine import Fault, MemoryEngine, Pace
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.config import Config, EngineSettings, MemberSettings
from anser.core.errors import LimitReached
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.limits import FILES_MAX
from anser.platform import open_platform
from anser.ports import Call
from anser.services.ledger import Ledger
from anser.services.members import OWNER
from tests.outside import node
from tests.pool import Pool, demand, open_pool
from tests.receipts import make_receipt
from tests.server import Server, serving, wait_until
from tests.streams import WAIT_S, Stream, crowd, gated, get, idlers, soon
from tests.vitals import cpu_s, limit_of, needs_proc, open_files

pytestmark = pytest.mark.anyio

HOUR_S = 3_600.0


# Files and sockets


@needs_proc
async def test_out_of_files(data_dir: Path) -> None:
    """With room for 96 files, 300 connections are refused with 503 or closed without burning
    processor time; when they go, the platform serves again by itself.
    """
    with serving(data_dir, "--no-engine", descriptors=96) as server:
        pid = server.process.pid
        assert limit_of(pid, "Max open files") == "96"
        async with node(server), AsyncExitStack() as stack:
            peers = await stack.enter_async_context(idlers(server.port, 300))
            await soon(settled(server, reader) for reader, _ in peers[-50:])
            refused = await get(server, "/health")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert open_files(pid) < 96, "there is room for the platform's own files"
            assert len(server.admin("GET", "/nodes")["nodes"]) == 1
            begun, used = time.monotonic(), cpu_s(pid)
            await asyncio.sleep(1)
            assert cpu_s(pid) - used < 0.3 * (time.monotonic() - begun)
            await stack.aclose()
            await asyncio.to_thread(wait_until, lambda: open_files(pid) < 40)
            async with crowd(server, 10) as streams:
                await soon(stream.rest() for stream in streams)
            assert all(stream.whole for stream in streams)
        assert server.process.poll() is None
    assert server.process.returncode == 0
    assert server.complaints == ""


async def settled(server: Server, reader: asyncio.StreamReader) -> None:
    """Wait until this connection has been refused or closed."""
    async with asyncio.timeout(WAIT_S):
        try:
            said = await reader.read(65_536)
        except ConnectionError:
            said = b""
    assert said == b"" or b" 503 " in said.split(b"\r\n", 1)[0], said
    assert server.process.poll() is None


@needs_proc
async def test_a_platform_sets_its_own_limits(data_dir: Path) -> None:
    """A platform takes as many open files as it may have, not the few that it was given; and
    whatever it was given, it never leaves a core dump, which would hold prompts and keys.
    """
    given = 'ulimit -S -n 256; ulimit -S -c "$(ulimit -H -c)"; ulimit -H -n'
    serve = f'exec "{sys.executable}" -m anser serve --no-engine --port 0 --json --data-dir "$0"'
    command = ["sh", "-c", f"{given}; {serve}", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        most = process.stdout.readline().strip()
        assert '"listening"' in process.stdout.readline()
        wish = FILES_MAX if most == "unlimited" else min(int(most), FILES_MAX)
        assert limit_of(process.pid, "Max open files") == str(wish)
        assert limit_of(process.pid, "Max core file size") == "0"
        process.terminate()


# The clock


@dataclass(slots=True)
class JumpingClock:
    """The machine's clock, whose date somebody keeps setting."""

    off_s: float = 0.0

    def now(self) -> float:
        """Monotonic seconds."""
        return SystemClock().now()

    def wall(self) -> float:
        """Unix seconds, wrong by `off_s`."""
        return SystemClock().wall() + self.off_s

    def jump(self) -> None:
        """An hour ahead, then an hour behind, and so on."""
        self.off_s = -self.off_s or HOUR_S


async def read(pool: Pool, name: str, **fields: object) -> str:
    """Ask, and read to the end; returns the name."""
    async with pool.gateway.answer(demand(name, **fields)) as answer:
        async for _ in answer:
            pass
    return name


async def test_requests_outlive_jumps_of_the_clock() -> None:
    """Whatever the date does while requests wait and run, all finish; no time in a receipt lies
    before an earlier one of the same request, and no batch is signed before the one before it.
    """
    clock = JumpingClock()

    def jump(_call: Call) -> Fault | None:
        clock.jump()
        return None

    engine = MemoryEngine(slots=2, pace=Pace(step_s=0.002), fault_of=jump)
    async with open_pool({"n": engine}, clock=clock) as pool:
        names = [f"r{number}" for number in range(20)]
        await soon(read(pool, name) for name in names)
        receipts = await pool.receipts()
        signed = [await signed_ms(pool, name) for name in names]
        last = await signed_ms(pool, await read(pool, "last"))
    assert {receipt.request for receipt in receipts} == set(names)
    for receipt in receipts:
        assert receipt.outcome is Outcome.FINISHED
        times = times_of(receipt)
        assert times == sorted(times)
    assert last >= max(signed)


async def signed_ms(pool: Pool, request: str) -> int:
    """When the receipt's batch was signed, as it says."""
    batch = (await pool.ledger.export(request))["batch"]
    return int(batch["signed_ms"])


def times_of(receipt: Receipt) -> list[int]:
    """Its times, in the order in which they were."""
    (lease,) = receipt.leases
    assert receipt.first_token_ms is not None
    return [
        receipt.queued_ms,
        lease.started_ms,
        receipt.first_token_ms,
        lease.ended_ms,
        receipt.ended_ms,
    ]


async def test_shares_outlive_jumps_of_the_clock() -> None:
    """Two equal members take turns on one slot, whatever the date does between two answers."""
    clock, started = JumpingClock(), list[str]()

    def jump(call: Call) -> Fault | None:
        clock.jump()
        started.append(call.lease[0])
        return None

    engine = MemoryEngine(slots=1, pace=Pace(step_s=0.001), fault_of=jump)
    async with open_pool({"n": engine}, clock=clock) as pool:
        await pool.members.add_member("a")
        await pool.members.add_member("b")
        alone = asyncio.ensure_future(read(pool, "first"))  # while the others arrive
        names = [f"a{number}" for number in range(12)] + [f"b{number}" for number in range(12)]
        await soon(read(pool, name, member=name[0]) for name in names)
        await alone
    order = "".join(started).lstrip("f")
    assert len(order) == 24
    for end in range(25):
        assert abs(order.count("a", 0, end) - order.count("b", 0, end)) <= 2, order


async def test_limits_outlive_jumps_of_the_clock() -> None:
    """A token limit is neither refilled nor taken away by a new date, and the wait stays true."""
    clock, settings = JumpingClock(), MemberSettings(tokens_per_minute=60, queued_max=2)
    async with open_pool({"n": MemoryEngine()}, clock=clock, member_settings=settings) as pool:
        await soon(read(pool, f"r{number}") for number in range(6))
        waits: list[float] = []
        for _ in range(4):
            clock.jump()
            with pytest.raises(LimitReached) as caught:
                await read(pool, "late", prompt_tokens=60)
            waits.append(caught.value.retry_after_s or 0.0)
    assert 1 < min(waits) <= max(waits) < min(waits) + 5


@pytest.mark.parametrize(
    ("hours_ago", "left"),
    [(-1, 30), (0, 30), (12.5, 130), (30, 200)],
    ids=["to come", "now", "half a day", "long"],
)
async def test_a_restart_with_another_date_gives_no_fresh_day(
    data_dir: Path, hours_ago: float, left: int
) -> None:
    """What was used counts after a restart as before, also if the clock was set back meanwhile."""
    async with SqliteStore.open(data_dir / "anser.db") as store:
        ledger = Ledger(store, KeyFileSigner.open(data_dir / "signing.key"), SystemClock())
        ended_ms = int((SystemClock().wall() - hours_ago * HOUR_S) * 1_000)
        used = Usage(prompt_tokens=120, completion_tokens=50)
        receipt = make_receipt(1, member=OWNER, ended_ms=ended_ms, usage=used)
        async with asyncio.TaskGroup() as group:
            group.create_task(ledger.run())
            await ledger.record(receipt)
            await ledger.aclose()
    config = Config(
        data_dir=data_dir,
        members=MemberSettings(tokens_per_day=200),
        engine=EngineSettings(enabled=False),
    )
    async with open_platform(config, engine=False) as platform:
        headers = platform.services.members.limits_left(OWNER)
        assert int(headers["x-ratelimit-remaining-tokens"]) == left


# Two on one machine


async def test_two_platforms_serve_side_by_side(tmp_path: Path) -> None:
    """With two folders and two ports, both serve at once, each its own members and nodes only."""
    with (
        serving(tmp_path / "a", "--no-engine") as one,
        serving(tmp_path / "b", "--no-engine") as other,
    ):
        assert one.port != other.port
        async with node(one), node(other):
            async with crowd(one, 8) as here, crowd(other, 8) as there:
                await soon(stream.rest() for stream in here + there)
            assert all(stream.whole for stream in here + there)
            async with Stream.asked(one, key=other.key) as stranger:
                assert (await stranger.error())["code"] == "invalid_api_key"
            assert one.receipt(here[0].request)["outcome"] == "finished"
            with pytest.raises(AssertionError, match="not_found"):
                other.receipt(here[0].request)


async def test_a_second_platform_leaves_the_first_alone(data_dir: Path, tmp_path: Path) -> None:
    """On a folder, or on a port, that is in use, the start stops and says so in one line, while
    the first platform goes on, with its stream under way and its admin socket.
    """
    with serving(data_dir, "--no-engine") as first:
        async with gated(first, slots=1) as gate, crowd(first, 1) as (stream,):
            await stream.begun()
            folder = await refusal("--data-dir", data_dir, "--port", 0)
            assert f"{data_dir} is in use" in folder
            assert str(first.process.pid) in folder
            port = await refusal("--data-dir", tmp_path / "other", "--port", first.port)
            assert f"Port {first.port} of 127.0.0.1 cannot be opened" in port
            assert first.pool()["running"] == 1
            gate.opened.set()
            await stream.rest()
            assert stream.whole
    assert first.complaints == ""


async def refusal(*options: object) -> str:
    """The one line with which a start is refused."""
    command = [sys.executable, "-m", "anser", "serve", "--no-engine", *map(str, options)]
    ended = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    return str(line)
