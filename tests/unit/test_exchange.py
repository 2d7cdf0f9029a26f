"""api.exchange and api.app: one request at a time, whatever its client and handler do."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory_engine import Fault, FaultKind
from anser.api.app import _App
from anser.api.auth import Doorkeeper
from anser.api.exchange import Bodies, Exchange
from anser.api.models import served
from anser.api.routes import ROUTES, find_direct
from anser.config import GatewaySettings, MemberSettings
from anser.core.errors import ModelNotFound, NoNode, Overloaded
from anser.core.fleet import Ability
from anser.core.ledger import Outcome
from anser.core.limits import EMBEDDING_BATCH_MAX, EMBEDDING_INPUTS_MAX, PROMPTS_MAX
from anser.ports import Call
from anser.services.members import OWNER
from tests.stage import Stage, stage

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "memory",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 5,
}


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
        json_ = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": json_, "client": None}
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

    settings = GatewaySettings(probe_interval_s=0.05, continue_answers=False)
    async with stage(tmp_path, fault=tear, settings=settings) as scene:
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


async def test_several_answers_are_admitted_together_or_not_at_all(tmp_path: Path) -> None:
    """Where one of `n` has no place now, none is begun: 429, and no receipt of the others."""
    settings = MemberSettings(in_flight_max=2)
    async with stage(tmp_path, member_settings=settings) as scene:
        first = scene.client()
        running = asyncio.ensure_future(first.post({**HELLO, "max_tokens": 3_000, "stream": True}))
        async with asyncio.timeout(5):
            while not first.sent:
                await asyncio.sleep(0.005)
        refused = await scene.client().post({**HELLO, "n": 2})
        first.leaving.set()
        await running
        again = await scene.client().post({**HELLO, "n": 2})
        receipts = await scene.pool.receipts()
    assert (refused.status, again.status) == (429, 200)
    assert "retry-after" in refused.headers
    assert len(receipts) == 3


async def test_more_answers_than_may_ever_be_are_the_callers_mistake(tmp_path: Path) -> None:
    """`n` beyond what the limits of an idle member allow is 400: trying again cannot help."""
    async with stage(tmp_path, member_settings=MemberSettings(in_flight_max=2)) as scene:
        answer = await scene.client().post({**HELLO, "n": 3})
        assert await scene.pool.receipts() == []
    assert answer.status == 400
    assert answer.error["param"] == "n"


async def test_several_answers_refused_at_the_door_leave_no_place_taken(tmp_path: Path) -> None:
    """Places are reserved before the gateway looks: what it refuses gives them back."""
    async with stage(tmp_path) as scene:
        before = scene.pool.members.limits_left(OWNER)
        scene.pool.gateway.drain()
        answer = await scene.client().post({**HELLO, "n": 2})
        assert scene.pool.members.limits_left(OWNER) == before
    assert answer.status == 503


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_stream_has_one_identity(tmp_path: Path, path: str) -> None:
    """All chunks, that of usage too, have the platform's id, by which the receipt is found."""
    fields = {"messages": HELLO["messages"]} if path == CHAT else {"prompt": "hello"}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": "memory", "max_tokens": 5, **fields, **options}
    async with stage(tmp_path) as scene:
        answer = await scene.client().ask("POST", path, json.dumps(body).encode())
        *events, done, _ = answer.body.decode().split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        await scene.pool.receipts()
        kept = await scene.client().ask("GET", f"/v1/receipts/{chunks[0]['id']}")
    heads = {
        tuple(chunk[name] for name in ("id", "object", "created", "model")) for chunk in chunks
    }
    assert done == "data: [DONE]"
    assert len(heads) == 1
    assert chunks[0]["id"].startswith("chatcmpl-" if path == CHAT else "cmpl-")
    assert json.loads(kept.body)["receipt"]["request"] == answer.headers["x-request-id"]
    assert sum("usage" in chunk for chunk in chunks) == 1


async def test_several_answers_fail_together(tmp_path: Path) -> None:
    """If one of `n` fails, so does the whole, and none is left running."""
    left = iter([None, Fault(kind=FaultKind.BREAK, after_tokens=2)])
    settings = GatewaySettings(probe_interval_s=0.05, continue_answers=False)
    async with stage(tmp_path, fault=lambda _: next(left, None), settings=settings) as scene:
        answer = await scene.client().post({**HELLO, "n": 3, "max_tokens": 3_000})
        async with asyncio.timeout(5):
            await scene.pool.gateway.empty.wait()
    assert answer.status == 502


async def test_several_answers_are_admitted_together(tmp_path: Path) -> None:
    """Where not all of `n` have a place none is admitted: nothing runs, no receipt is left."""
    settings = MemberSettings(in_flight_max=3)
    async with stage(tmp_path, member_settings=settings) as scene:
        first = scene.client()
        running = asyncio.ensure_future(first.post({**HELLO, "max_tokens": 3_000, "stream": True}))
        async with asyncio.timeout(5):
            while not first.sent:
                await asyncio.sleep(0.005)
        answer = await scene.client().post({**HELLO, "n": 3})
        above = await scene.client().post({**HELLO, "n": 4})
        first.leaving.set()
        await running
        assert len(await scene.pool.receipts()) == 1
    assert answer.status == 429
    assert above.status == 400
    assert "Send fewer" in above.error["message"]


async def test_many_prompts_wait_for_slots(tmp_path: Path) -> None:
    """PROMPTS_MAX prompts are answered by as many streams at once as there are slots; not one more
    prompt is taken, nor as many that the member's queue has no room for them."""
    scenes: list[Stage] = []
    most: list[int] = []

    def note(_: Call) -> None:
        most.append(scenes[0].pool.gateway.snapshot().nodes[0].running)

    async with stage(tmp_path, slots=2, fault=note) as scene:
        scenes.append(scene)
        body = {"model": "memory", "max_tokens": 3, "prompt": ["hello"] * PROMPTS_MAX}
        answer = await scene.client().post(body, "/v1/completions")
        assert answer.status == 200
        choices = json.loads(answer.body)["choices"]
        assert [choice["index"] for choice in choices] == list(range(PROMPTS_MAX))
        for wrong in ({"prompt": ["hello"] * (PROMPTS_MAX + 1)}, {"n": 2}):
            answer = await scene.client().post({**body, **wrong}, "/v1/completions")
            assert answer.status == 400
            assert answer.error["param"] == "prompt"
    assert len(most) == PROMPTS_MAX
    assert max(most) == 2


async def test_many_inputs_are_embedded_in_batches(tmp_path: Path) -> None:
    """Up to EMBEDDING_INPUTS_MAX inputs come back in order; an engine gets a batch at a time."""
    texts = [str(index % 10) for index in range(EMBEDDING_INPUTS_MAX)]
    async with stage(tmp_path) as scene:
        body = {"model": "memory", "input": texts}
        answer = await scene.client().post(body, "/v1/embeddings")
        short = await scene.client().post({**body, "input": texts[-3:]}, "/v1/embeddings")
        above = await scene.client().post({**body, "input": [*texts, "x"]}, "/v1/embeddings")
        receipts = await scene.pool.receipts()
    rows = json.loads(answer.body)["data"]
    assert [row["index"] for row in rows] == list(range(EMBEDDING_INPUTS_MAX))
    ends = [row["embedding"] for row in json.loads(short.body)["data"]]
    assert [row["embedding"] for row in rows[-3:]] == ends
    names = {receipt.request for receipt in receipts}
    of_many = {name for name in names if name.startswith(answer.headers["x-request-id"])}
    assert len(of_many) == EMBEDDING_INPUTS_MAX / EMBEDDING_BATCH_MAX
    tokens = sum(each.usage.prompt_tokens for each in receipts if each.request in of_many)
    assert json.loads(answer.body)["usage"]["prompt_tokens"] == tokens
    assert above.status == 400
    assert above.error["param"] == "input"


async def test_batches_need_their_places_first(tmp_path: Path) -> None:
    """Where a member's queue is shorter than the batches of its inputs, none is embedded."""
    async with stage(tmp_path, member_settings=MemberSettings(queued_max=1)) as scene:
        body = {"model": "memory", "input": ["hello"] * (EMBEDDING_BATCH_MAX + 1)}
        answer = await scene.client().post(body, "/v1/embeddings")
        assert await scene.pool.receipts() == []
    assert answer.status == 400
    assert "Send fewer" in answer.error["message"]


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


async def test_flexible_service_takes_what_others_leave(tmp_path: Path) -> None:
    """`service_tier: flex` is the batch band: others go first, once it has had its part."""
    order: list[str] = []

    def note(call: Call) -> None:
        (message,) = call.body["messages"]  # type: ignore[misc]
        order.append(message["content"])

    async with stage(tmp_path, slots=1, fault=note) as scene, asyncio.TaskGroup() as tasks:
        messages = [{"role": "user", "content": "alone"}]
        await scene.client().post({**HELLO, "messages": messages, "service_tier": "flex"})
        scheduler = scene.pool.gateway.scheduler
        for number, (word, tier) in enumerate(
            [("first", "auto"), ("flex", "flex"), ("second", "default"), ("third", "auto")]
        ):
            messages = [{"role": "user", "content": word}]
            body = {**HELLO, "messages": messages, "service_tier": tier, "max_tokens": 20}
            tasks.create_task(scene.client().post(body))
            async with asyncio.timeout(5):
                while scheduler.queued + scheduler.running <= number:
                    await asyncio.sleep(0.001)
    assert order == ["alone", "first", "second", "third", "flex"]
