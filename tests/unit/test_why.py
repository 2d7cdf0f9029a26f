"""Why a request waited and why it went where it went: what is remembered, and how it is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.api.why import told, why_of
from anser.cli.why import in_words
from anser.core.errors import DeadlineUnreachable, EngineBroken, NotFound
from anser.core.events import Lease, Request, Rule, Why
from anser.core.limits import WHY_MAX
from anser.ports import Call
from anser.services.gateway import Demand
from anser.services.why import Trail, Whys
from tests.pool import Pool, demand, open_pool
from tests.stage import stage

pytestmark = pytest.mark.anyio

SLOW = Pace(step_s=0.005)
CHAT: dict[str, Any] = {
    "model": "memory",
    "messages": [{"role": "user", "content": "What do geese say? " * 100}],
    "max_tokens": 2,
}


def trail(name: str = "r") -> Trail:
    """A request that has just come, at 10 s."""
    request = Request(id=name, member="a/b/c", model="m", prompt_tokens=100, output_tokens_max=5)
    return Trail(request=request, came_ms=1, queued=3, queued_own=1, waits_since=10.0)


def lease(attempt: int = 1, node: str = "n") -> Lease:
    """A lease of that request."""
    return Lease(id=f"r.{attempt}", request="r", node=node, model="m", attempt=attempt)


async def ask(pool: Pool, wanted: Demand) -> None:
    """Read one answer to its end."""
    async with pool.gateway.answer(wanted) as answer:
        assert [piece async for piece in answer]


def broken_once(call: Call) -> Fault | None:
    """Each request's first lease fails."""
    return Fault(kind=FaultKind.BREAK) if call.lease.endswith(".1") else None


def test_no_more_than_the_limit_are_remembered() -> None:
    """At WHY_MAX the oldest trail is forgotten; one that comes again is the newest."""
    whys = Whys()
    for number in range(WHY_MAX):
        whys.add(trail(str(number)))
    whys.add(trail("0"))
    assert whys.find("1") is not None
    whys.add(trail("more"))
    assert whys.find("1") is None
    assert whys.find("0") is not None
    assert f"{WHY_MAX}/{WHY_MAX}" in repr(whys)
    whys.validate()


def test_waits_add_up() -> None:
    """What was waited for each lease is told, and all of it together; the end stops the clock."""
    one = trail()
    assert one.waited_s(12.0) == 2.0
    one.began(lease(), Why(rule=Rule.LEAST), 13.0)
    one.waits_again(lease().id, "engine_broken", 14.0)
    assert one.waited_s(15.0) == 4.0
    one.began(lease(2), Why(rule=Rule.FREE), 16.0)
    assert [step.waited_s for step in one.steps] == [3.0, 2.0]
    one.waits_again(lease(2).id, "engine_broken", 17.0)
    one.end("queue_timeout", 20.0, retry_after_s=4.0)
    one.end("cancelled", 30.0)
    assert (one.ended, one.retry_after_s, one.waited_s(99.0)) == ("queue_timeout", 4.0, 8.0)


async def test_a_request_that_starts_at_once_is_told_so() -> None:
    """Where a slot is free nobody is compared; the wait is none."""
    async with open_pool({"a": MemoryEngine()}) as pool:
        await ask(pool, demand())
        found = pool.gateway.whys.find("r")
        assert found is not None
        [step] = found.steps
    assert (step.why.rule, step.lease.node, found.queued) == (Rule.FREE, "a", 0)
    assert found.waited_s(1e9) < 0.01
    assert found.ended is None


async def test_a_request_that_waits_is_told_what_was_compared() -> None:
    """What waited when it came, the rule that gave it its slot, and the keys."""
    async with open_pool({"a": MemoryEngine(slots=1, pace=SLOW)}) as pool:
        asks = [demand("first"), demand("own"), demand("other", member="anonymous/bucket-1")]
        await asyncio.gather(*(ask(pool, one) for one in asks))
        own, other = pool.gateway.whys.find("own"), pool.gateway.whys.find("other")
        assert own is not None
        assert other is not None
    assert (own.queued, other.queued, other.queued_own) == (0, 1, 0)
    assert own.waited_s(0) > other.waited_s(0) > 0
    assert other.steps[0].why.rule is Rule.LIGHT
    assert own.steps[0].why.key > 0


async def test_a_node_that_failed_is_told() -> None:
    """Each lease has its step, the failed one with its error, and the last try its end."""
    engines = {name: MemoryEngine(pace=SLOW, fault_of=broken_once) for name in "ab"}
    async with open_pool({**engines}) as pool:
        await ask(pool, demand())
        found = pool.gateway.whys.find("r")
        assert found is not None
        assert [step.error for step in found.steps] == ["engine_broken", None]
        assert {step.lease.node for step in found.steps} == {"a", "b"}
    always = {n: MemoryEngine(fault_of=lambda _: Fault(kind=FaultKind.BREAK)) for n in "abc"}
    async with open_pool({**always}) as pool:
        with pytest.raises(EngineBroken):
            await ask(pool, demand())
        found = pool.gateway.whys.find("r")
        assert found is not None
        assert (len(found.steps), found.ended) == (3, "retries_exhausted")


async def test_who_gets_no_slot_is_told_why() -> None:
    """A refusal and a client's leaving end the trail."""
    async with open_pool({"a": MemoryEngine(slots=1, pace=SLOW)}) as pool:
        long = demand("long", output_tokens_max=500, body={"messages": [], "max_tokens": 500})
        scheduler = pool.gateway.scheduler
        holding = asyncio.ensure_future(ask(pool, long))
        while not scheduler.running:
            await asyncio.sleep(0.001)
        leaving = asyncio.ensure_future(ask(pool, demand("gone")))
        while not scheduler.queued:
            await asyncio.sleep(0.001)
        late = demand("late", deadline=pool.gateway.clock.now() + 0.01)
        with pytest.raises(DeadlineUnreachable):
            await ask(pool, late)
        for task in (leaving, holding):  # in turn, or the slot that is freed is the other's
            task.cancel()
            await asyncio.wait({task})
        gone, refused = pool.gateway.whys.find("gone"), pool.gateway.whys.find("late")
        assert gone is not None
        assert refused is not None
        assert gone.ended == "cancelled"
        assert (refused.ended, refused.queued) == ("deadline_unreachable", 1)
        assert refused.retry_after_s
        assert "ended=deadline_unreachable" in told(refused, 0.0)


def test_the_short_form_is_one_line() -> None:
    """What the header says: the wait, the node and rule, the keys in credits, and the prefix."""
    one = trail()
    why = Why(rule=Rule.NEAREST, key=12_500_000, least_key=9_000_000, rivals=4, cached_tokens=64)
    one.began(lease(), Why(rule=Rule.FREE), 10.0)
    assert told(one, 0.0) == "waited=0.000s queued=3 node=n rule=free rivals=0 cached=0/100"
    one.waits_again(lease().id, "engine_broken", 11.0)
    one.began(lease(2, "m"), why, 11.5)
    assert told(one, 0.0) == (
        "waited=0.500s queued=3 node=m rule=nearest key=12 least=9 rivals=4 cached=64/100 attempt=2"
    )


def test_the_short_form_is_of_the_lease_that_went_on() -> None:
    """Of two leases at once the one that was slower is not why it went where it went."""
    one = trail()
    second = Lease(id="r+1.1", request="r+1", node="m", model="memory", attempt=1)
    one.began(lease(), Why(rule=Rule.FREE), 10.0)
    one.began(second, Why(rule=Rule.FREE), 10.5)
    one.lost(second.id, "hedged")
    assert "node=n" in told(one, 0.0)
    assert [step.hedge for step in one.steps] == [False, True]
    assert one.waited_s(99.0) == 0.0


async def test_the_header_is_given_to_who_asks_for_it(tmp_path: Path) -> None:
    """With `x-anser-explain: 1` an answer, whole, streamed or several, says why; else it does not.

    A second turn says how much of its prompt is expected in the node's cache.
    """
    async with stage(tmp_path) as scene:
        bare = await scene.client().post(CHAT)
        bodies = [CHAT, {**CHAT, "stream": True}, {**CHAT, "n": 2}]
        body = [json.dumps(one).encode() for one in bodies]
        path = "/v1/chat/completions"
        asked = [await scene.client().ask("POST", path, one, x_anser_explain="1") for one in body]
        vector = b'{"model": "memory", "input": "x"}'
        embedded = await scene.client().ask("POST", "/v1/embeddings", vector, x_anser_explain="1")
        nothing = await scene.client().ask("POST", path, b"{}", x_anser_explain="1")
    assert "x-anser-why" not in bare.headers
    assert "x-anser-why" not in nothing.headers
    for answer in (*asked, embedded):
        assert "node=one rule=free" in answer.headers["x-anser-why"]
    assert "cached=0/" not in asked[0].headers["x-anser-why"]


async def test_a_refusal_says_why_too(tmp_path: Path) -> None:
    """A request that is refused after it was queued has the header on its error."""
    async with stage(tmp_path, fault=lambda _: Fault(kind=FaultKind.STALL)) as scene:
        body, path = json.dumps(CHAT).encode(), "/v1/chat/completions"
        wishes = {"x_anser_explain": "1", "x_anser_deadline": "0.05"}
        late = await scene.client().ask("POST", path, body, **wishes)
    assert late.status == 503
    assert "node=one" in late.headers["x-anser-why"]


async def test_it_is_told_to_who_asked(tmp_path: Path) -> None:
    """By the request's id or its answer's; to others it is as what there never was."""
    async with stage(tmp_path) as scene:
        answer = await scene.client().post(CHAT)
        names = (answer.headers["x-request-id"], json.loads(answer.body)["id"])
        found = [await scene.client().ask("GET", f"/v1/why/{name}") for name in names]
        scene.services.gateway.whys.add(trail("req_other"))
        other = await scene.client().ask("GET", "/v1/why/req_other")
        never = await scene.client().ask("GET", "/v1/why/req_never")
        with pytest.raises(NotFound):
            why_of(scene.services, "req_never")
    assert found[0].body == found[1].body
    shown = json.loads(found[0].body)
    assert shown["request"] == names[0]
    assert shown["leases"][0]["reason"] == Rule.FREE.value
    assert other.status == never.status == 404
    assert other.error == never.error


@pytest.mark.parametrize("language", ["en", "zh"])
def test_people_are_told_in_words(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule, the keys, the prefix, a failure, a refusal and a leaving have words."""
    monkeypatch.setenv("ANSER_LANG", language)
    first = {"lease": "r.1", "node": "a", "waited_s": 0.0, "rule": "free", "rivals": 0}
    first |= {"key_micro_credits": 0, "least_key_micro_credits": 0, "cached_tokens": 0}
    first |= {"error": None, "delivered_tokens": 0}
    steps: list[dict[str, Any]] = [{**first, "error": "engine_broken"}]
    steps.append({**first, "error": "engine_stalled", "delivered_tokens": 31})
    for rule in Rule:
        keys = {"key_micro_credits": 2_500_000, "cached_tokens": 64, "rivals": 7}
        steps.append({**first, **keys, "node": "b", "rule": rule.name.lower()})
    found: dict[str, Any] = {"request": "r", "member": "m", "model": "x", "prompt_tokens": 100}
    found |= {"queued": 5, "queued_own": 2, "waited_s": 1.25, "waiting": False, "leases": steps}
    text = "\n".join(in_words({**found, "ended": "overloaded", "retry_after_s": 12.0}))
    for word in (
        "1.250",
        "engine_broken",
        "engine_stalled",
        "31",
        "2.500",
        "64",
        "overloaded",
        "12",
    ):
        assert word in text
    lines = text.splitlines()
    assert len(lines) == 2 + 2 * 3 + 3 * len(Rule) + 2
    both = [{**first, "error": "hedged"}, {**first, "lease": "r+1.1", "node": "b", "hedge": True}]
    more = list(in_words({**found, "leases": both, "ended": None}))
    assert len(more) == 2 + 3 + 3
    assert not any("hedged" in line for line in more), "the code is told in words"
    quiet = {**found, "waited_s": 0.0, "leases": [], "ended": "cancelled", "retry_after_s": None}
    still = {**found, "waiting": True, "leases": [], "ended": None, "retry_after_s": None}
    refused = {**quiet, "ended": "no_node"}
    assert [len(list(in_words(one))) for one in (quiet, still, refused)] == [3, 2, 3]
