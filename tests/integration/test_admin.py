"""The admin API, usage, receipts, the pool and metrics, over the real applications and services."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from anser.api import admin, metrics, usage
from anser.config import Config, EngineSettings, ServerSettings
from anser.core.events import Request
from anser.core.ledger import LeaseRecord, Outcome, Receipt, Usage
from anser.platform import Platform, open_platform
from anser.services.why import Trail

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The two applications of one platform, asked from different places."""

    platform: Platform
    socket: httpx.AsyncClient  # the admin application on the platform's own socket
    listener: httpx.AsyncClient  # the admin application on its separate listener
    public: httpx.AsyncClient

    async def key(self, member: str, *, scope: str = "use") -> dict[str, str]:
        """Headers with a fresh key of this member, which is added if need be."""
        await self.socket.post("/admin/v1/members", json={"id": member})
        made = await self.socket.post("/admin/v1/keys", json={"member": member, "scope": scope})
        return {"authorization": f"Bearer {made.json()['key']}"}


def client(app: ASGIApp, *, peer: tuple[str, int] | None, local: tuple[str, int | None]) -> Any:
    """A client that an application sees at `peer`, on its listener `local`."""

    async def seen(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "client": peer, "server": local}, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(seen), base_url=f"http://{HOST}")


@asynccontextmanager
async def asked(data_dir: Path, config: Config | None = None) -> AsyncIterator[Asked]:
    """A platform without engine, and clients of it."""
    config = config or Config(data_dir=data_dir, engine=EngineSettings(enabled=False))
    peer, local = ("127.0.0.1", 50_000), ("127.0.0.1", 8_000)
    async with (
        open_platform(config, engine=False) as platform,
        client(platform.admin_app, peer=None, local=("/d/anser.sock", None)) as socket,
        client(platform.admin_app, peer=peer, local=local) as listener,
        client(platform.public_app, peer=peer, local=local) as public,
    ):
        yield Asked(platform=platform, socket=socket, listener=listener, public=public)


@pytest.fixture
async def at(data_dir: Path) -> AsyncIterator[Asked]:
    """A platform without engine, and clients of it."""
    async with asked(data_dir) as found:
        yield found


def receipt(request: str, member: str, *, tokens: int = 5) -> Receipt:
    """A finished request of `member`."""
    lease = LeaseRecord(
        lease=f"{request}.1", node="n", started_ms=1, ended_ms=2, completion_tokens=tokens
    )
    return Receipt(
        request=request,
        member=member,
        model="m",
        outcome=Outcome.FINISHED,
        error=None,
        usage=Usage(prompt_tokens=7, cached_tokens=2, completion_tokens=tokens),
        leases=(lease,),
        queued_ms=1,
        first_token_ms=2,
        ended_ms=0,
    )


async def record(at: Asked, request: str, member: str) -> None:
    """Have a receipt of this member in the ledger, ended now."""
    now_ms = int(at.platform.services.clock.wall() * 1_000)
    await at.platform.services.ledger.record(replace(receipt(request, member), ended_ms=now_ms))


def refused(response: httpx.Response, status: int, code: str) -> str:
    """The message of an answer that must be this refusal, in the one envelope."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    message: str = error["message"]
    return message


# ---------------------------------------------------------------------------------- who may


def addresses() -> list[tuple[str, str]]:
    """Every admin address, with its parameters filled in."""
    return [(method, path.replace("{", "").replace("}", "")) for method, path in admin.PATHS]


@pytest.mark.parametrize(("method", "path"), addresses())
async def test_operators_only(at: Asked, method: str, path: str) -> None:
    """On a listener: no key 401, a wrong one 401, a member's 403; on the public address 404."""
    member = await at.key("guests")
    wrong = {"authorization": "Bearer hf_wrong"}
    body = {} if method in ("POST", "PATCH") else None
    ask = at.listener.request
    refused(await ask(method, path, json=body), 401, "invalid_api_key")
    refused(await ask(method, path, json=body, headers=wrong), 401, "invalid_api_key")
    refused(await ask(method, path, json=body, headers=member), 403, "forbidden")
    operator = await at.key("staff", scope="operate")
    missing = await at.public.request(method, path, json=body, headers=operator)
    refused(missing, 404, "not_found")
    assert (await ask(method, path, json=body, headers=operator)).status_code not in (401, 403)


async def test_a_client_without_address_is_not_the_owner(at: Asked) -> None:
    """A TCP client that hung up has no address: only the listening side tells the own socket."""
    apps = at.platform.admin_app
    async with client(apps, peer=None, local=("127.0.0.1", 9_000)) as gone:
        refused(await gone.get("/admin/v1/members"), 401, "invalid_api_key")
        assert (await gone.get("/v1/usage")).status_code == 401


async def test_a_page_of_another_site_cannot_ask_for_an_operator(at: Asked) -> None:
    """Without a key in the request nothing is done, whatever a browser sends along."""
    headers = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    response = await at.listener.post("/admin/v1/members", json={"id": "x"}, headers=headers)
    assert response.status_code in (401, 403)


# ---------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("members", {}, None),
        ("members", {"id": 5}, "id"),
        ("members", {"id": ""}, "id"),
        ("members", {"id": "a" * 300}, "id"),
        ("members", {"id": "a", "wieght": 5}, None),
        ("members", {"id": "a", "weight": 0}, "weight"),
        ("members", {"id": "a", "weight": 1.5}, "weight"),
        ("members", {"id": "a", "weight": "1"}, "weight"),
        ("members", {"id": "a", "weight": 10**30}, "weight"),
        ("members", {"id": "a", "limits": {"queued_max": 0}}, "limits.queued_max"),
        ("members", {"id": "a", "limits": {"queued": 1}}, "limits"),
        ("members", {"id": "a", "limits": None}, "limits"),
        ("members", {"id": "a/../b"}, "member"),
        ("members", {"id": "anonymous/x"}, "member"),
        ("keys", {"member": "local", "scope": "root"}, "scope"),
        ("keys", {"member": "local", "label": "x" * 101}, "label"),
        ("keys", {"member": "local", "label": "a\x1b[0m"}, "label"),
        ("keys", {"member": "local", "expires_in_s": 0}, "expires_in_s"),
        ("keys", {"member": "local", "expires_in_s": -5}, "expires_in_s"),
        ("keys", {"member": "nobody"}, "member"),
        ("nodes", {"url": "file:///etc/passwd"}, "url"),
        ("nodes", {"url": "http://user:pass@host"}, "url"),
        ("nodes", {"url": "http://h", "slots": True}, "slots"),
        ("nodes", {"url": "http://h", "slots": 0}, "slots"),
        ("nodes", {"url": "http://h", "id": "../x"}, "id"),
        ("nodes", {"url": "http://h", "jurisdiction": "Germany"}, "jurisdiction"),
        ("nodes", {"url": "http://h", "model": "a\nb"}, "model"),
    ],
)
async def test_bodies_are_read_strictly(
    at: Asked, path: str, body: dict[str, object], param: str | None
) -> None:
    """A wrong type, range, name or field is refused, and the field is named."""
    response = await at.socket.post(f"/admin/v1/{path}", json=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert "\x1b" not in response.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"id": "a", "id": "b"}', 400),
        (b'{"id": "\xff"}', 400),
        (b'{"id": ' + b"[" * 5_000, 400),
        (b'{"id": "' + b"a" * 70_000 + b'"}', 413),
    ],
)
async def test_what_is_no_object_is_refused(at: Asked, content: bytes, status: int) -> None:
    """No JSON, no object, a key twice, wrong bytes, depth and length: refused, nothing done."""
    response = await at.socket.post("/admin/v1/members", content=content)
    assert response.status_code == status, response.text
    listed = (await at.socket.get("/admin/v1/members")).json()["members"]
    assert len(listed) == 4


# ---------------------------------------------------------------------------------- members


async def test_members_and_keys(at: Asked) -> None:
    """A member and its keys are made, listed and closed; a key's text is told once."""
    body = {"id": "physics", "weight": 2_000, "limits": {"tokens_per_day": 9}}
    added = (await at.socket.post("/admin/v1/members", json=body)).json()
    none = {"in_flight_max": None, "queued_max": None, "tokens_per_minute": None}
    assert added["limits"] == {**none, "tokens_per_day": 9}
    refused(await at.socket.post("/admin/v1/members", json=body), 409, "conflict")
    listed = (await at.socket.get("/admin/v1/members")).json()["members"]
    assert added in listed
    made = await at.socket.post(
        "/admin/v1/keys", json={"member": "physics", "label": "x", "expires_in_s": 60}
    )
    assert made.headers["cache-control"] == "no-store"
    key = made.json()
    assert key["expires_at"] - key["created_at"] == pytest.approx(60)
    keys = (await at.socket.get("/admin/v1/keys", params={"member": "physics"})).json()["keys"]
    assert keys == [{name: key[name] for name in key if name != "key"}]
    gone = (await at.socket.delete(f"/admin/v1/keys/{key['id']}")).json()
    assert gone["revoked_at"] is not None
    again = (await at.socket.delete(f"/admin/v1/keys/{key['id']}")).json()
    assert again == gone
    refused(await at.socket.delete("/admin/v1/keys/key_none"), 404, "not_found")


async def test_a_member_is_changed(at: Asked) -> None:
    """What is named changes, null takes a limit away, the rest stays; the body is read strictly."""
    limits = {"queued_max": 3, "tokens_per_day": 9}
    await at.socket.post("/admin/v1/members", json={"id": "physics", "limits": limits})
    change = {"id": "physics", "weight": 3_000, "limits": {"queued_max": None, "in_flight_max": 2}}
    changed = (await at.socket.patch("/admin/v1/members", json=change)).json()
    assert changed["weight"] == 3_000
    assert (changed["limits"]["queued_max"], changed["limits"]["tokens_per_day"]) == (None, 9)
    assert changed["limits"]["in_flight_max"] == 2
    assert (await at.socket.patch("/admin/v1/members", json={"id": "physics"})).json() == changed
    assert changed in (await at.socket.get("/admin/v1/members")).json()["members"]
    wrong = await at.socket.patch("/admin/v1/members", json={"id": "physics", "weight": 0})
    assert wrong.json()["error"]["param"] == "weight"
    refused(await at.socket.patch("/admin/v1/members", json={"id": "nobody"}), 404, "not_found")


async def test_nodes(at: Asked) -> None:
    """A node is listed though it does not answer, named by its URL, drained, and removed."""
    body = {"url": "http://127.0.0.1:9", "slots": 3, "model": "m", "jurisdiction": "de"}
    added = (await at.socket.post("/admin/v1/nodes", json=body)).json()
    assert (added["slots"], added["jurisdiction"], added["busy"]) == (3, "DE", 0)
    assert added["error"]
    refused(await at.socket.post("/admin/v1/nodes", json=body), 409, "conflict")
    node = added["id"]
    drained = await at.socket.post(f"/admin/v1/nodes/{node}/drain", json={})
    assert (drained.json()["id"], drained.json()["state"]) == (node, "draining")
    resumed = await at.socket.post(f"/admin/v1/nodes/{node}/resume", json={})
    assert resumed.json()["state"] == "down"
    pool = (await at.public.get("/v1/pool")).json()
    assert [row["id"] for row in pool["nodes"]] == [node]
    assert "http" not in json.dumps(pool["nodes"]), "a node's address is nobody's business"
    assert (await at.socket.delete(f"/admin/v1/nodes/{node}")).json()["removed"] is True
    assert (await at.socket.get("/admin/v1/nodes")).json()["nodes"] == []
    refused(await at.socket.delete(f"/admin/v1/nodes/{node}"), 404, "not_found")
    drain = await at.socket.post(f"/admin/v1/nodes/{node}/drain", json={})
    refused(drain, 404, "not_found")


async def test_settings_are_told_without_secrets(data_dir: Path) -> None:
    """Every setting is told; a password in an address is not."""
    engine = EngineSettings(enabled=False, mirrors=("https://me:secret@host/x", "http://plain"))
    async with asked(data_dir, Config(data_dir=data_dir, engine=engine)) as at:
        response = await at.socket.get("/admin/v1/config")
        rows = {row["path"]: row["value"] for row in response.json()["settings"]}
        assert rows["engine.mirrors"] == ["https://host/x", "http://plain"]
        assert rows["data_dir"] == str(data_dir)
        assert "secret" not in response.text
        state = (await at.socket.get("/admin/v1/state")).json()
        assert (state["engine"], state["data_dir"]) == (None, str(data_dir))


# ---------------------------------------------------------------------------------- usage


async def test_usage_is_ones_own(at: Asked) -> None:
    """A member sees itself and all below it; others are answered like what does not exist."""
    physics, lattice = await at.key("physics"), await at.key("physics/lattice")
    await at.key("chemistry")
    await record(at, "req_1", "physics/lattice")
    await record(at, "req_2", "chemistry")

    async def seen(headers: dict[str, str], **query: str) -> list[str]:
        response = await at.public.get("/v1/usage", headers=headers, params=query)
        return [row["member"] for row in response.json()["usage"]]

    assert await seen(physics) == ["physics/lattice"]
    assert await seen(lattice) == ["physics/lattice"]
    assert await seen(physics, member="physics/lattice") == ["physics/lattice"]
    for other in ("chemistry", "physic", "local", "nobody", "physics/"):
        asking = await at.public.get("/v1/usage", headers=lattice, params={"member": other})
        refused(asking, 404, "not_found")
    above = await at.public.get("/v1/usage", headers=lattice, params={"member": "physics"})
    refused(above, 404, "not_found")
    operator = await at.key("staff", scope="operate")
    assert await seen(operator) == ["chemistry", "physics/lattice"]
    assert await seen(operator, member="chemistry") == ["chemistry"]
    for path in ("/v1/usage", "/admin/v1/usage"):
        missing = await at.socket.get(path, params={"member": "chemisty"})
        assert "chemisty" in refused(missing, 404, "not_found")
        nobody = await at.socket.get(path, params={"member": "anonymous/bucket-7"})
        assert nobody.json()["usage"] == []
    refused(await at.public.get("/v1/usage"), 401, "invalid_api_key")


async def test_sums_are_of_the_time_asked_for(at: Asked) -> None:
    """Only what ended in the time asked for is counted, and every kind of token."""
    await record(at, "req_1", "local")
    await at.platform.services.ledger.record(receipt("req_0", "local"))  # in 1970
    rows = (await at.socket.get("/v1/usage", params={"since_s": "60"})).json()["usage"]
    row = {"requests": 1, "failed": 0, "cancelled": 0}
    tokens = {"prompt_tokens": 7, "cached_tokens": 2, "completion_tokens": 5}
    assert rows == [{"member": "local", "model": "m", **row, **tokens}]
    for wrong in ("-1", "nan", "soon", "1e99"):
        response = await at.socket.get("/v1/usage", params={"since_s": wrong})
        refused(response, 400, "invalid_value")
    twice = await at.socket.get("/v1/usage?member=a&member=b")
    refused(twice, 400, "invalid_value")


async def test_receipts_are_ones_own(at: Asked) -> None:
    """One's own receipt is given, by request or answer id; others' are not told from none."""
    await at.key("physics")
    owner, other = await at.key("physics/lattice"), await at.key("chemistry")
    await record(at, "req_1f", "physics/lattice")
    mine = await at.public.get("/v1/receipts/req_1f", headers=owner)
    assert mine.json()["receipt"]["request"] == "req_1f"
    same = await at.public.get("/v1/receipts/chatcmpl-1f", headers=owner)
    assert same.json() == mine.json()
    theirs = refused(await at.public.get("/v1/receipts/req_1f", headers=other), 404, "not_found")
    missing = await at.public.get("/v1/receipts/req_none", headers=other)
    assert refused(missing, 404, "not_found") == theirs
    long = await at.public.get(f"/v1/receipts/{'x' * 200}", headers=owner)
    assert refused(long, 404, "not_found") == theirs
    refused(await at.public.get("/v1/receipts/req_1f"), 404, "not_found")
    operator = await at.key("staff", scope="operate")
    assert (await at.public.get("/v1/receipts/req_1f", headers=operator)).status_code == 200
    assert (await at.socket.get("/admin/v1/receipts/req_1f")).json() == mine.json()


async def test_waits_are_ones_own(at: Asked) -> None:
    """One's own, and those below oneself, are told; others' are not told from none."""
    await at.key("physics")
    owner, other = await at.key("physics/lattice"), await at.key("chemistry")
    wanted = Request(
        id="req_1f",
        member="physics/lattice/ann",
        model="m",
        prompt_tokens=1,
        output_tokens_max=1,
    )
    trail = Trail(request=wanted, came_ms=1, queued=0, queued_own=0, waits_since=0.0)
    at.platform.services.gateway.whys.add(trail)
    trail.end("overloaded", 2.5)
    mine = await at.public.get("/v1/why/chatcmpl-1f", headers=owner)
    assert (mine.json()["waited_s"], mine.json()["ended"]) == (2.5, "overloaded")
    theirs = refused(await at.public.get("/v1/why/req_1f", headers=other), 404, "not_found")
    missing = await at.public.get("/v1/why/req_none", headers=other)
    assert refused(missing, 404, "not_found") == theirs
    assert (await at.socket.get("/admin/v1/why/req_1f")).json() == mine.json()
    refused(await at.socket.get("/admin/v1/why/req_none"), 404, "not_found")


async def test_every_share_is_for_operators(at: Asked) -> None:
    """A member gets its own path and one figure for all; an operator's key also gets the rows."""
    await at.key("physics")
    owner = await at.key("physics/lattice")
    mine = (await at.public.get("/v1/fairness", headers=owner)).json()
    assert [level["member"] for level in mine["levels"]] == ["physics", "physics/lattice"]
    assert [level["entitlement"] for level in mine["levels"]] == [1.0, 1.0]
    assert "members" not in mine
    operator = await at.key("staff", scope="operate")
    assert (await at.listener.get("/admin/v1/fairness", headers=operator)).json()["members"] == []
    assert (await at.socket.get("/v1/fairness")).json()["members"] == []


async def test_the_signing_key_is_public(at: Asked) -> None:
    """Anybody may have the key that checks receipts; it is the platform's."""
    found = (await at.public.get("/v1/signing-key")).json()
    assert bytes.fromhex(found["public_key"]) == at.platform.services.ledger.public_key


# ---------------------------------------------------------------------------------- metrics


async def test_metrics_can_be_parsed_and_name_no_member(at: Asked) -> None:
    """What Prometheus reads is well-formed, and no member, key or address is in it."""
    headers = await at.key("physics")
    await at.socket.post("/admin/v1/nodes", json={"url": "http://127.0.0.1:9", "id": "gpu-1"})
    asking = await at.public.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(asking.text)}
    assert families["gen_ai_server_time_to_first_token_seconds"].type == "histogram"
    assert families["gen_ai_server_request_duration_seconds"].type == "histogram"
    assert families["anser_num_requests_waiting"].samples[0].value == 0
    nodes = families["anser_node_up"].samples
    assert [(sample.labels, sample.value) for sample in nodes] == [({"node": "gpu-1"}, 0)]
    secret = headers["authorization"].split()[1]
    assert [word for word in ("physics", secret, "127.0.0.1") if word in asking.text] == []
    names = {"accept": "application/openmetrics-text; version=1.0.0"}
    assert (await at.public.get("/metrics", headers=names)).text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "192.0.2.1"},
        {"host": "[::1"},
        {"host": ""},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"x-real-ip": "127.0.0.1"},
        {"via": "1.1 proxy"},
    ],
)
async def test_metrics_are_for_this_machine(at: Asked, headers: dict[str, str]) -> None:
    """On the public address a request that a proxy passed, or under another name, gets 404."""
    refused(await at.public.get("/metrics", headers=headers), 404, "not_found")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"])
async def test_metrics_know_this_machines_names(at: Asked, host: str) -> None:
    """Every way to say loopback is understood."""
    assert (await at.public.get("/metrics", headers={"host": host})).status_code == 200


async def test_metrics_of_an_open_platform_are_on_the_admin_side_only(data_dir: Path) -> None:
    """Bound to more than loopback, the public address has no metrics, whoever asks."""
    server, engine = ServerSettings(host="0.0.0.0"), EngineSettings(enabled=False)
    async with asked(data_dir, Config(data_dir=data_dir, server=server, engine=engine)) as at:
        refused(await at.public.get("/metrics"), 404, "not_found")
        assert (await at.listener.get("/metrics")).status_code == 200


# ---------------------------------------------------------------------------------- addresses


async def test_the_addresses_are_those_that_are_named(at: Asked) -> None:
    """What is named as an address answers, and nothing else of these modules does."""
    named = {*admin.PATHS, *usage.PATHS, *metrics.PATHS}
    for method, path in named:
        response = await at.socket.request(method, path, json={} if method == "POST" else None)
        assert "There is nothing at" not in response.text, path
        assert response.status_code != 405, path
    for path in {path for _, path in named}:
        allowed = {method for method, other in named if other == path}
        response = await at.socket.request("PUT", path)
        refused(response, 405, "method_not_allowed")
        assert allowed <= set(response.headers["allow"].split(", "))
