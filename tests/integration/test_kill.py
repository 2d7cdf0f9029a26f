"""kill -9 at any instant: what a client was told is on the disk, once, and the store opens.

A platform is killed in the middle of its work, at random instants, and started again on the same
data folder. Afterwards every receipt whose end somebody saw must be there, exactly once, in a whole
batch whose signature holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import rfc8785

from anser.adapters.clock import SystemClock
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.services.ledger import Ledger, verify
from tests.model import model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]

KILLS = 50
SAMPLE = 10

RECORDER = """
import asyncio, os, sys
from pathlib import Path
from anser.adapters.clock import SystemClock
from anser.adapters.datadir import DataDir
from anser.adapters.signer import KeyFileSigner
from anser.adapters.sqlite import SqliteStore
from anser.services.ledger import Ledger
from tests.receipts import make_receipt

async def client(ledger, number, step):
    while True:
        receipt = make_receipt(number)
        await ledger.record(receipt)
        os.write(1, f"{receipt.request}\\n".encode())  # the client has seen the end
        number += step

async def main(folder, first):
    with DataDir.open(folder) as data:
        async with SqliteStore.open(data.store) as store:
            ledger = Ledger(store, KeyFileSigner.open(data.signing_key), SystemClock())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ledger.run())
                for number in range(first, first + 16):
                    tasks.create_task(client(ledger, number, 16))

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def stored_requests(path: Path) -> set[str]:
    """Every request with a receipt, read without Anser; none is there twice, no batch is torn."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        torn = """
            SELECT b.id FROM batches AS b LEFT JOIN receipts AS r ON r.batch = b.id
            GROUP BY b.id HAVING count(r.id) != b.size
        """
        assert connection.execute(torn).fetchall() == []
        leaves = connection.execute("SELECT request, leaf FROM receipts").fetchall()
    stored = [json.loads(leaf)["request"] for _, leaf in leaves]  # what was signed, not a column
    assert stored == [request for request, _ in leaves]
    assert len(stored) == len(set(stored)), "a receipt is there twice"
    return set(stored)


async def check(folder: Path, seen: list[str]) -> None:
    """The store opens; each request whose end was seen has one receipt, and samples verify."""
    signer = KeyFileSigner.open(folder / "signing.key")
    async with SqliteStore.open(folder / "anser.db") as store:
        assert set(seen) <= stored_requests(folder / "anser.db"), "a seen end has no receipt"
        ledger = Ledger(store, signer, SystemClock())
        for request in seen[-SAMPLE:]:
            document = rfc8785.dumps(await ledger.export(request))
            assert verify(document, public_key=signer.public_key).request == request


@pytest.mark.anyio
async def test_ledger_is_killed_while_it_writes(tmp_path: Path) -> None:
    """At full speed, killed at random instants on one growing file, the ledger loses nothing."""
    folder, seen, chance = tmp_path / "data", list[str](), random.Random()
    for turn in range(KILLS):
        command = [sys.executable, "-c", RECORDER, str(folder), str(turn * 1_000_000)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as recorder:
            assert recorder.stdout is not None
            first = recorder.stdout.readline()
            timer = threading.Timer(chance.uniform(0, 0.15), recorder.kill)
            timer.start()
            lines = (first + recorder.stdout.read()).split(b"\n")
            timer.join()
        assert recorder.returncode == -signal.SIGKILL
        assert lines.pop() == b""
        seen += [line.decode() for line in lines]
        left = shutil.copytree(folder, tmp_path / str(turn))  # the next one finds it untouched
        await check(left, seen)
        shutil.rmtree(left)
    assert len(seen) > 10 * KILLS


class Platform:
    """`anser serve` on a data folder, until it is killed."""

    def __init__(self, folder: Path, model: Path) -> None:
        command = [sys.executable, "-m", "anser", "serve", "--json", "--port", "0"]
        command += ["--data-dir", str(folder), "--model", str(model), "--no-key"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "listening":
                self.address = urlsplit(event["url"]).netloc
                self.model = event["model"]
                return
        raise AssertionError(f"no platform: {self.end()}")

    def kill(self) -> None:
        """End it as the machine's power cut would end a process: without any last word."""
        self._process.kill()

    def end(self) -> str:
        """Wait for its end; what it said on standard error."""
        _, complaints = self._process.communicate(timeout=60)
        return complaints.decode()

    @property
    def killed(self) -> bool:
        """Whether the kill is what ended it."""
        return self._process.returncode == -signal.SIGKILL


def ask_until_killed(platform: Platform, seen: list[str], streaming: threading.Event) -> None:
    """Stream short answers one after the other; note the request of each whose end has come."""
    with contextlib.suppress(OSError, HTTPException):
        while True:
            connection = HTTPConnection(platform.address, timeout=60)
            with contextlib.closing(connection):
                body = {
                    "model": platform.model,
                    "messages": [{"role": "user", "content": "Count."}],
                    "max_tokens": 3,
                    "stream": True,
                }
                headers = {"content-type": "application/json"}
                path = "/v1/chat/completions"
                connection.request("POST", path, json.dumps(body), headers)
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                for line in answer:
                    streaming.set()
                    if b'"finish_reason":"' in line.replace(b" ", b""):
                        seen.append(answer.headers["x-request-id"])


@pytest.mark.engine
def test_platform_is_killed_in_mid_stream(tmp_path: Path) -> None:
    """Whoever has seen the end of a streamed answer finds its receipt after any crash."""
    folder, model = tmp_path / "data", model_path()
    seen, chance = list[str](), random.Random()
    for turn in range(KILLS):
        platform = Platform(folder, model)  # starts on what the last kill left
        assert set(seen) <= stored_requests(folder / "anser.db"), f"lost after kill {turn}"
        streaming = threading.Event()
        arguments = (platform, seen, streaming)
        clients = [threading.Thread(target=ask_until_killed, args=arguments) for _ in range(6)]
        for client in clients:
            client.start()
        assert streaming.wait(60), platform.end()
        latest_s = 1 if len(seen) > turn else 4  # a slow machine has to come to some ends, too
        threading.Timer(chance.uniform(0, latest_s), platform.kill).start()
        complaints = platform.end()
        for client in clients:
            client.join(60)
        assert platform.killed, complaints
    asyncio.run(check(folder, seen))
    assert len(seen) > KILLS
