"""api.exchange and api.app: one request at a time, whatever its client and handler do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from anser.adapters.blobs import DiskBlobs
from anser.adapters.clock import SystemClock
from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.api.app import _App, public_app
from anser.api.auth import Doorkeeper
from anser.api.context import Services
from anser.api.exchange import Bodies, Exchange
from anser.api.models import served
from anser.api.routes import ROUTES, find_direct
from anser.config import Config, MemberSettings, ServerSettings
from anser.core.errors import ModelNotFound, NoNode, Overloaded
from anser.core.fleet import Ability
from anser.core.ledger import Outcome
from anser.ports import Call
from anser.services.hub import Hub
from tests.pool import Pool, open_pool

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "memory",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 5,
}


@dataclass(slots=True)
class Client:
    """An ASGI server's side of one request: what it gives the application, and what it gets."""

    app: ASGIApp
    sent: list[Message] = field(default_factory=list)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    parts: list[bytes] = field(default_factory=list)

    async def receive(self) -> Message:
        if self.parts:
            body = self.parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self.parts)}
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, method: str, path: str, *parts: bytes, **headers: str) -> Client:
        """Let the application answer, to its end."""
        self.parts = list(parts) or [b""]
        lines = {"host": "127.0.0.1", **headers}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in lines.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
        }
        await self.app(scope, self.receive, self.send)
        return self

    async def post(self, body: object) -> Client:
        """A chat completion with this body."""
        return await self.ask("POST", CHAT, json.dumps(body).encode())

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


@dataclass(slots=True)
class Stage:
    """A pool with an application before it."""

    pool: Pool
    services: Services

    def client(self, app: ASGIApp | None = None) -> Client:
        return Client(app or public_app(self.services))


@asynccontextmanager
async def stage(
    folder: Path,
    *,
    slots: int = 4,
    fault: Callable[[Call], Fault | None] = lambda _: None,
    member_settings: MemberSettings | None = None,
) -> AsyncGenerator[Stage]:
    """Services over one engine in memory."""
    engine = MemoryEngine(slots=slots, pace=Pace(step_s=0.001), fault_of=fault)
    async with open_pool({"one": engine}, member_settings=member_settings) as pool:
        services = Services(
            config=Config(data_dir=folder, server=ServerSettings(body_bytes_max=10_000)),
            clock=SystemClock(),
            members=pool.members,
            fleet=pool.fleet,
            gateway=pool.gateway,
            ledger=pool.ledger,
            hub=Hub((), DiskBlobs(folder)),
        )
        yield Stage(pool, services)


async def test_an_answer_has_an_identifier_of_its_own(tmp_path: Path) -> None:
    """Every answer, also an error's or a page's, names its request; no two alike."""
    async with stage(tmp_path) as scene:
        paths = [("GET", "/health"), ("GET", "/v1/nothing"), ("PUT", CHAT), ("GET", "/")]
        answers = [await scene.client().ask(method, path) for method, path in paths]
    names = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", name) for name in names)
    assert len(set(names)) == len(names)


async def test_a_client_that_leaves_while_it_sends_is_forgotten(tmp_path: Path) -> None:
    """A body that ends in a hang-up is not answered, not read on, and not held."""
    async with stage(tmp_path) as scene:
        client = scene.client()
        client.leaving.set()
        client.parts = []
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "client": None}
        await client.app({**scope, "server": ("127.0.0.1", 80)}, client.receive, client.send)
        assert client.sent == []


async def test_bodies_are_held_within_bounds(tmp_path: Path) -> None:
    """A request that would hold too much of all is 503; what ended is held no longer."""
    async with stage(tmp_path) as scene:
        door = Doorkeeper(scene.services.members, scene.services.clock)
        app = _App(scene.services, door, [])
        bodies = app._bodies
        bodies.most = 1_000
        first = await scene.client(app).ask("POST", CHAT, b" " * 900)
        assert first.status == 400
        assert bodies.held == 0
        bodies.take(200)
        refused = await scene.client(app).ask("POST", CHAT, b" " * 900)
        assert refused.status == 503
        assert refused.error["code"] == "overloaded"
        assert bodies.held == 200
        bodies.validate()


def test_bodies_refuse_at_their_limit() -> None:
    """The last byte within the limit is held, the next one is refused and changes nothing."""
    bodies = Bodies(most=10)
    bodies.take(10)
    with pytest.raises(Overloaded):
        bodies.take(1)
    assert bodies.held == 10
    bodies.validate()


async def test_a_body_in_parts_is_refused_at_the_limit(tmp_path: Path) -> None:
    """Parts are counted as they come, whatever length was declared."""
    async with stage(tmp_path) as scene:
        at_limit = await scene.client().ask("POST", CHAT, b" " * 5_000, b" " * 5_000)
        over = await scene.client().ask("POST", CHAT, b" " * 5_000, b" " * 5_001)
    assert (at_limit.status, over.status) == (400, 413)


async def test_hanging_up_cancels_once(tmp_path: Path) -> None:
    """A client's leaving cancels its request; the clean-up is let finish, the receipt written."""
    async with stage(tmp_path) as scene:
        client = scene.client()
        body = {**HELLO, "max_tokens": 3_000, "stream": True}
        asking = asyncio.ensure_future(client.post(body))
        async with asyncio.timeout(5):
            while len(client.sent) < 4:
                await asyncio.sleep(0.005)
            client.leaving.set()
            await asking
            await scene.pool.gateway.empty.wait()
        (receipt,) = await scene.pool.receipts()
    assert receipt.outcome is Outcome.CANCELLED
    assert receipt.request == client.headers["x-request-id"]


async def test_a_bug_ends_one_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unexpected exception is 500 in the envelope; the log has its place, not its words."""

    def bug(call: Call) -> Fault | None:
        raise ValueError(call.body)

    async with stage(tmp_path, fault=bug) as scene:
        secret = [{"role": "user", "content": "the secret canary"}]
        answer = await scene.client().post({**HELLO, "messages": secret})
        health = await scene.client().ask("GET", "/health")
        async with asyncio.timeout(5):
            await scene.pool.gateway.empty.wait()
    assert answer.status == 500
    assert answer.error["code"] == "internal_error"
    assert health.status == 200
    told = capsys.readouterr()
    assert "ValueError" in told.out + told.err
    assert "canary" not in told.out + told.err + answer.body.decode()


async def test_a_fault_before_the_stream_is_a_status(tmp_path: Path) -> None:
    """What fails before the first chunk is told by the status, also where a stream was asked."""

    def refuse(_: Call) -> Fault | None:
        return Fault(kind=FaultKind.REFUSE)

    async with stage(tmp_path, fault=refuse) as scene:
        answer = await scene.client().post({**HELLO, "stream": True})
    assert answer.status == 400
    assert answer.error["code"] == "engine_refused"


async def test_a_fault_in_the_stream_is_its_last_event(tmp_path: Path) -> None:
    """What fails after the first chunk ends the stream, with an error and without [DONE]."""

    def tear(_: Call) -> Fault | None:
        return Fault(kind=FaultKind.BREAK, after_tokens=2)

    async with stage(tmp_path, fault=tear) as scene:
        answer = await scene.client().post({**HELLO, "stream": True})
    *_, last = answer.body.decode().strip().split("\n\n")
    assert answer.status == 200
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_broken"
    assert "[DONE]" not in answer.body.decode()
    assert answer.sent[-1]["more_body"] is False


async def test_a_limit_that_is_reached_says_what_is_left(tmp_path: Path) -> None:
    """429 has a retry-after and the member's x-ratelimit headers."""
    settings = MemberSettings(in_flight_max=1)
    async with stage(tmp_path, member_settings=settings) as scene:
        first = scene.client()
        running = asyncio.ensure_future(first.post({**HELLO, "max_tokens": 3_000, "stream": True}))
        async with asyncio.timeout(5):
            while not first.sent:
                await asyncio.sleep(0.005)
        answer = await scene.client().post(HELLO)
        first.leaving.set()
        await running
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"


async def test_several_answers_fail_together(tmp_path: Path) -> None:
    """If one of `n` is refused at the door, none is left running."""
    settings = MemberSettings(in_flight_max=2)
    async with stage(tmp_path, member_settings=settings) as scene:
        answer = await scene.client().post({**HELLO, "n": 3, "max_tokens": 3_000})
        async with asyncio.timeout(5):
            await scene.pool.gateway.empty.wait()
    assert answer.status == 429


async def test_more_answers_than_slots_wait_their_turn(tmp_path: Path) -> None:
    """`n` beyond the slots needs no slot for all at once, streamed or whole."""
    async with stage(tmp_path, slots=1) as scene:
        for stream in (False, True):
            async with asyncio.timeout(20):
                body = {**HELLO, "n": 8, "max_tokens": 80, "stream": stream}
                answer = await scene.client().post(body)
            assert answer.status == 200
            if not stream:
                choices = json.loads(answer.body)["choices"]
                assert [choice["index"] for choice in choices] == list(range(8))


async def test_a_client_that_gives_no_answer_to_read_is_no_error(tmp_path: Path) -> None:
    """HEAD gets the head of what GET gets, and no body."""
    async with stage(tmp_path) as scene:
        get = await scene.client().ask("GET", "/v1/models")
        head = await scene.client().ask("HEAD", "/v1/models")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.body == b""


async def test_models_that_are_and_are_not(tmp_path: Path) -> None:
    """A model is served, or known without a node, or unknown with near names."""
    async with stage(tmp_path) as scene:
        assert served(scene.services, "memory", Ability.CHAT).model == "memory"
        with pytest.raises(ModelNotFound, match="Near names: memory"):
            served(scene.services, "memori", Ability.CHAT)
        with pytest.raises(ModelNotFound):
            served(scene.services, "x" * 100_000, Ability.CHAT)
        with pytest.raises(NoNode):
            served(scene.services, "smollm2-135m-instruct", Ability.CHAT)


async def test_every_address_answers(tmp_path: Path) -> None:
    """What the table of addresses lists is there, and what is not listed is 404."""
    async with stage(tmp_path) as scene:
        for method, path in ROUTES:
            if path.startswith("/admin") or "{digest}" in path:
                continue
            plain = path.replace("{model}", "memory")
            answer = await scene.client().ask("PATCH", plain)
            assert answer.status == 405, path
            assert method in answer.headers["allow"]
        assert (await scene.client().ask("GET", "/v1/files")).status == 404


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/models/org/name:tag", "/v1/models/{model}"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/", None),
        ("/v1/modelsx", None),
        ("//v1/models", None),
        ("/V1/models", None),
    ],
)
def test_a_path_is_matched_whole(path: str, found: str | None) -> None:
    """A parameter takes the rest of a path; nothing else is guessed."""
    direct = find_direct(path)
    assert (None if direct is None else direct.path) == found


def test_an_exchange_says_what_it_is(tmp_path: Path) -> None:
    """Its representation has the request, not what is in it."""
    del tmp_path

    async def nothing(*_: object) -> Any:
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/secret", "headers": []}
    exchange = Exchange(None, Bodies(), scope, nothing, nothing)  # type: ignore[arg-type]
    assert repr(exchange) == f"<Exchange {exchange.id} GET waiting>"
