"""Prompts, the names of their blocks, and whose caches are kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anser.adapters.memory_engine import Fault
from anser.api.demands import Asker, ask_chat, ask_completion
from anser.config import GatewaySettings
from anser.core.events import Lease
from anser.core.fleet import EngineKind, Offer
from anser.core.members import ANONYMOUS
from anser.ports import Call
from anser.services.caches import chain_salt, engine_salt
from anser.services.run import call_for
from tests.pool import demand
from tests.stage import Stage, stage

pytestmark = pytest.mark.anyio

LONG = "What geese say to each other when they take turns at the lead. " * 20
TOOLS = [{"type": "function", "function": {"name": "f", "description": LONG}}]
FIRST: dict[str, Any] = {"role": "user", "content": LONG}
ALICE, BOB = "physics/lattice/alice", "physics/lattice/bob"
CAROL = "history/rome/carol"


def chat(scene: Stage, member: str, *messages: dict[str, Any], **fields: Any) -> Any:
    """The demands of a chat."""
    asker = Asker(services=scene.services, member=member, request_id="req_1")
    return ask_chat(asker, {"model": "memory", "messages": list(messages), **fields}).demands


def apart() -> GatewaySettings:
    """Organisations have caches of their own."""
    return GatewaySettings(probe_interval_s=0.05, cache_sharing="organisation")


async def test_a_growing_conversation_shares_its_beginning(tmp_path: Path) -> None:
    """The blocks of one turn are the first blocks of the next one; tools stand before both."""
    async with stage(tmp_path) as scene:
        answer = {"role": "assistant", "content": "Honk."}
        [before] = chat(scene, ALICE, FIRST, tools=TOOLS, max_tokens=5)
        [after] = chat(scene, ALICE, FIRST, answer, FIRST, max_tokens=9, tools=TOOLS)
        [bare] = chat(scene, ALICE, FIRST)
    assert len(before.chain) > len(bare.chain) > 3
    assert after.chain[: len(before.chain)] == before.chain
    assert before.chain[0] != bare.chain[0]
    assert before.prompt_bytes >= 256 * len(before.chain)


async def test_all_answers_to_one_prompt_have_its_chain(tmp_path: Path) -> None:
    """Each prompt is named once, however many answers it gets, with its own identifier and seed."""
    async with stage(tmp_path) as scene:
        asker = Asker(services=scene.services, member=ALICE, request_id="req_1")
        body = {"model": "memory", "prompt": [LONG, "short"], "n": 2, "seed": 7}
        demands = ask_completion(asker, body).demands
    assert [one.id for one in demands] == ["req_1-0", "req_1-1", "req_1-2", "req_1-3"]
    assert [one.body["seed"] for one in demands] == [7, 8, 9, 10]
    assert demands[0].chain is demands[1].chain
    assert demands[0].chain
    assert demands[2].chain == ()


async def test_the_platform_shares_its_caches(tmp_path: Path) -> None:
    """By default, what one member has sent another finds; engines are given no salt."""
    async with stage(tmp_path) as scene:
        [alice], [carol] = chat(scene, ALICE, FIRST), chat(scene, CAROL, FIRST)
    assert alice.chain == carol.chain
    assert alice.cache_salt is carol.cache_salt is None


async def test_organisations_may_keep_caches_apart(tmp_path: Path) -> None:
    """Then a beginning is known within its organisation only, and so are its engine's salts."""
    async with stage(tmp_path, settings=apart()) as scene:
        [alice], [bob], [carol] = (chat(scene, who, FIRST) for who in (ALICE, BOB, CAROL))
    assert alice.chain == bob.chain
    assert not set(alice.chain) & set(carol.chain)
    assert alice.cache_salt == bob.cache_salt != carol.cache_salt
    assert "physics" not in str(alice.cache_salt)


def test_salts_keep_models_and_strangers_apart() -> None:
    """One model's caches are not another's; each anonymous network stands for itself."""
    assert chain_salt("m", ALICE, shared=True) != chain_salt("n", ALICE, shared=True)
    networks = [f"{ANONYMOUS}/bucket-{number}" for number in (1, 2)]
    assert len({chain_salt("m", one, shared=False) for one in networks}) == 2
    assert len({engine_salt(one, pepper=b"p" * 32) for one in networks}) == 2
    assert engine_salt(ALICE, pepper=b"p" * 32) != engine_salt(ALICE, pepper=b"q" * 32)


@pytest.mark.parametrize("kind", list(EngineKind))
def test_only_engines_that_read_a_salt_are_given_one(kind: EngineKind) -> None:
    """vLLM keeps caches apart by `cache_salt`; no other engine sees a field it does not know."""
    lease = Lease(id="r.1", request="r", node="n", model="memory", attempt=1)
    offer = Offer(node="n", model="memory", engine_model="m", engine=kind)
    salted = call_for(demand(cache_salt="s"), lease, offer).body
    assert salted.get("cache_salt") == ("s" if kind is EngineKind.VLLM else None)
    assert "cache_salt" not in call_for(demand(), lease, offer).body


async def test_the_scheduler_is_told_of_the_chain(tmp_path: Path) -> None:
    """A second turn is expected to find the first one in its node's cache."""
    seen: list[Call] = []

    def look(call: Call) -> Fault | None:
        seen.append(call)
        return None

    async with stage(tmp_path, fault=look) as scene:
        body = json.dumps({"model": "memory", "messages": [FIRST], "max_tokens": 2}).encode()
        for _ in range(2):
            answer = await scene.client().ask("POST", "/v1/chat/completions", body)
            assert answer.status == 200
        known = len(scene.pool.gateway.scheduler._index)
        [sent] = chat(scene, ALICE, FIRST)
    assert known == len(sent.chain)
    assert [call.body["messages"] for call in seen] == [[FIRST]] * 2
