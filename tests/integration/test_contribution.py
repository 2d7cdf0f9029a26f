"""What a member's node serves to others becomes the member's weight, and outlasts a restart."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.config import Config, EngineSettings, MemberSettings
from anser.core.fleet import Node
from anser.core.ledger import Outcome
from anser.platform import Platform, open_platform
from anser.services.contribution import Contribution
from anser.services.gateway import Gateway
from anser.services.members import OWNER
from anser.services.receipt_file import verify
from tests.hostile import Hostile, Script, Talk, answer, stream
from tests.pool import demand, open_pool

pytestmark = pytest.mark.anyio

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@asynccontextmanager
async def platform_in(folder: Path) -> AsyncGenerator[tuple[Platform, httpx.AsyncClient]]:
    """A platform without an engine of its own, and its operator's client on the socket."""
    config = Config(
        data_dir=folder,
        engine=EngineSettings(enabled=False),
        members=MemberSettings(public_share=0.5),
    )
    async with open_platform(config, engine=False) as platform:

        async def local(scope: Any, receive: Any, send: Any) -> None:
            app = platform.admin_app if "admin" in scope["path"] else platform.public_app
            there = ("127.0.0.1", 50_000)
            seen = {"client": there, "server": ("127.0.0.1", 8_000)}
            if "admin" in scope["path"]:
                seen = {"client": None, "server": ("/d/anser.sock", None)}
            await app({**scope, **seen}, receive, send)

        transport = httpx.ASGITransport(local)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            yield platform, http


async def key_of(http: httpx.AsyncClient, member: str) -> dict[str, str]:
    """Headers with a key of this member, which is added with all above it."""
    parts = member.split("/")
    for depth in range(len(parts)):
        await http.post("/admin/v1/members", json={"id": "/".join(parts[: depth + 1])})
    made = await http.post("/admin/v1/keys", json={"member": member})
    return {"authorization": f"Bearer {made.json()['key']}"}


def engine(model: str) -> Script:
    """An engine that serves this one model and says hello."""

    async def script(talk: Talk) -> None:
        while True:
            request = await talk.request()
            if request.method == "POST":
                await talk.say(stream("hel", "lo"))
            elif request.path == "/v1/models":
                row = {"id": model, "object": "model", "owned_by": "vllm"}
                await talk.say(answer(json.dumps({"data": [row]}).encode()))
            else:
                await talk.say(answer(b"{}", status="404 Not Found"))

    return script


async def ask(gateway: Gateway, name: str, member: str = OWNER) -> None:
    """One short answer, to its end."""
    async with gateway.answer(demand(name, member=member)) as answer:
        assert [piece async for piece in answer]


async def level_of(http: httpx.AsyncClient, headers: dict[str, str]) -> dict[str, Any]:
    """What a member is told of its organisation."""
    await asyncio.sleep(1.01)  # a look is up to a second old
    found = (await http.get("/v1/fairness", headers=headers)).json()
    level: dict[str, Any] = found["levels"][0]
    return level


async def test_serving_others_raises_the_owners_weight_and_lasts(data_dir: Path) -> None:
    """Own use earns nothing; what others had is weight, the same after a restart."""
    async with Hostile(engine("m")) as theirs, Hostile(engine("own")) as ours:
        async with platform_in(data_dir) as (platform, http):
            lab, uni = await key_of(http, "lab/ocean/mei"), await key_of(http, "uni")
            node = {"url": theirs.url, "member": "lab"}
            added = (await http.post("/admin/v1/nodes", json=node)).json()
            assert added["member"] == "lab"
            shown = (await http.get("/v1/pool")).json()["nodes"]
            assert "member" not in shown[0], "who owns a node is for operators"
            await http.post("/admin/v1/nodes", json={"url": ours.url})
            contribution = platform.services.contribution

            assert (await http.post("/v1/chat/completions", json=BODY, headers=lab)).is_success
            contribution.weigh()
            assert contribution.parts == {}

            asked = await http.post("/v1/chat/completions", json=BODY, headers=uni)
            contribution.weigh()
            assert contribution.parts == {"lab": 1.0}

            receipt = await http.get(f"/v1/receipts/{asked.json()['id']}", headers=uni)
            assert receipt.json()["receipt"]["owner"] == "lab"
            assert verify(receipt.content).factor_milli == 1_000

            own = await http.post("/v1/chat/completions", json=BODY | {"model": "own"}, headers=lab)
            assert own.is_success
            contribution.weigh()
            before = contribution.parts
            assert before["lab"] == pytest.approx(0.5, abs=0.01), "the platform's nodes count, too"

        async with platform_in(data_dir) as (platform, http):
            contribution = platform.services.contribution
            assert contribution.parts == pytest.approx(before, rel=1e-6)
            # Nobody is awake: lab's weight would be 1,000 of 1,000, and half as much for its half.
            found = await level_of(http, lab)
            assert found["weight"] == pytest.approx(1_500, abs=10)
            assert found["contribution"]["part"] == pytest.approx(0.5, abs=0.01)
            assert found["contribution"]["weight"] == found["weight"] - 1_000
            assert (await level_of(http, uni))["contribution"] is None
            [theirs_again] = [
                row
                for row in (await http.get("/admin/v1/nodes")).json()["nodes"]
                if row["member"] == "lab"
            ]
            assert theirs_again["id"] == added["id"]


@pytest.mark.parametrize(
    ("member", "status", "words"),
    [
        ("nobody", 404, "anser member add nobody"),
        ("lab/ocean", 400, "say lab."),
        ("anonymous", 400, "leave the owner out"),
        ("La b", 400, "A member is named"),
        ("", 400, "length"),
        (7, 400, "int"),
    ],
)
async def test_only_an_organisation_that_there_is_owns_nodes(
    data_dir: Path, member: object, status: int, words: str
) -> None:
    """Anything else is refused before the node is asked, with the way out."""
    async with platform_in(data_dir) as (_, http), Hostile(engine("m")) as node:
        await key_of(http, "lab/ocean")
        body = {"url": node.url, "member": member}
        refused = await http.post("/admin/v1/nodes", json=body)
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["param"] == "member"
        assert words in refused.json()["error"]["message"]
        assert node.seen == []


async def test_a_store_of_before_there_were_owners(data_dir: Path) -> None:
    """It is migrated: its nodes are the platform's, and its receipts have earned nothing."""
    script = (files("anser.adapters") / "sql" / "0001_first.sql").read_text("utf-8")
    database = sqlite3.connect(data_dir / "anser.db")
    database.executescript(script)
    database.execute(f"PRAGMA application_id = {int.from_bytes(b'Ansr', 'big')}")
    database.execute("PRAGMA user_version = 1")
    database.execute("INSERT INTO nodes VALUES ('n', 'http://127.0.0.1:9', NULL, 1, NULL, NULL, 0)")
    database.commit()
    database.close()
    async with platform_in(data_dir) as (platform, http):
        assert (await http.get("/admin/v1/nodes")).json()["nodes"][0]["member"] is None
        assert platform.services.contribution.parts == {}


async def test_who_serves_at_last_has_earned_it() -> None:
    """A node that failed before its first token earns nothing; the one that took over does."""
    fault = Fault(kind=FaultKind.BREAK)
    bad = MemoryEngine(slots=1, pace=Pace(step_s=0.001), fault_of=lambda _: fault)
    good = MemoryEngine(slots=1, pace=Pace(step_s=0.001))
    async with open_pool({}, more={"bad": bad, "good": good}) as pool:
        for number, (owner, node) in enumerate({"uni": "bad", "lab": "good"}.items(), start=1):
            await pool.members.add_member(owner)
            await pool.fleet.add(Node(id=node, url=f"http://127.0.0.1:{number}", member=owner))
        await asyncio.gather(*(ask(pool.gateway, str(number)) for number in range(3)))
        receipts = await pool.receipts()
        assert {receipt.outcome for receipt in receipts} == {Outcome.FINISHED}
        assert {receipt.owner for receipt in receipts} == {"lab"}
        assert {lease.node for receipt in receipts for lease in receipt.leases} == {"bad", "good"}
        pool.contribution.weigh()
        assert pool.contribution.parts == {"lab": 1.0}
        pool.contribution.validate()


async def test_weights_are_told_to_the_scheduler_and_taken_back() -> None:
    """The scheduler's weight is the operator's and what contribution adds, whichever changes."""
    engines = {"n": MemoryEngine(slots=1, pace=Pace(step_s=0.001))}
    async with open_pool({}, more=dict(engines)) as pool:
        await pool.members.add_member("lab", weight=2_000)
        await pool.fleet.add(Node(id="n", url="http://127.0.0.1:1", member="lab"))
        await ask(pool.gateway, "1")
        await pool.receipts()
        scheduler, contribution = pool.gateway.scheduler, pool.contribution
        contribution.weigh()
        added = pool.members.added_weight("lab")
        assert added == round(0.7 / 0.3 * (1_000 + 2_000))  # of local, which asked, and itself
        assert pool.members.weight("lab") == 2_000 + added

        await pool.members.set_member("lab", weight=3_000, changes={})
        assert pool.members.weight("lab") == 3_000 + added
        await asyncio.gather(*(ask(pool.gateway, name, "lab") for name in "ab"))
        assert scheduler.awake_weight("lab") == pool.members.weight("lab")
        contribution.weigh()
        assert scheduler.awake_weight("lab") == 3_000 + round(0.7 / 0.3 * 4_000)
        assert scheduler.awake_weight() == scheduler.awake_weight("lab") + 1_000

        again = Contribution(
            ledger=pool.ledger,
            members=pool.members,
            scheduler=scheduler,
            clock=pool.gateway.clock,
            public_share=1.0,
        )
        await again.load()
        assert again.parts == {"lab": 1.0}
        assert pool.members.added_weight("lab") == 0, "with all of it public, nothing is added"
        assert scheduler.awake_weight("lab") == 3_000
        again.validate()
        assert "1" in repr(again)


async def test_it_is_weighed_by_itself() -> None:
    """Again and again, while the platform runs."""
    node = {"n": MemoryEngine(slots=1, pace=Pace(step_s=0.001))}
    async with open_pool({}, more=dict(node)) as pool:
        await pool.members.add_member("lab")
        await pool.fleet.add(Node(id="n", url="http://127.0.0.1:1", member="lab"))
        pool.contribution.interval_s = 0.01
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            weighing = tasks.create_task(pool.contribution.run())
            await ask(pool.gateway, "1")
            while not pool.members.added_weight("lab"):
                await asyncio.sleep(0.01)
            weighing.cancel()
