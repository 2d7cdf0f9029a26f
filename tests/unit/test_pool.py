"""The pool as people and programs see it: what counts, and which model is asked by default."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from anser.adapters.memory_engine import MemoryEngine
from anser.config import Config
from anser.core.fleet import Ability, EngineReport, Node, ServedModel
from anser.platform import open_platform
from anser.ports import Engine
from anser.services.pool import ModelView, PoolView

pytestmark = pytest.mark.anyio


class Embedder(MemoryEngine):
    """An engine that makes embeddings, and nothing else, or the other way round."""

    def __init__(self, model: str, ability: Ability) -> None:
        super().__init__(model, slots=2)
        self._ability = ability

    async def inspect(self) -> EngineReport:
        """What it serves."""
        report = await super().inspect()
        models = tuple(ServedModel(name=m.name, ability=self._ability) for m in report.models)
        return EngineReport(kind=report.kind, version=None, models=models, slots=report.slots)


class Empty(MemoryEngine):
    """An engine that is up and serves nothing."""

    async def inspect(self) -> EngineReport:
        """Nothing."""
        report = await super().inspect()
        return EngineReport(kind=report.kind, version=None, models=(), slots=report.slots)


def test_the_default_model() -> None:
    """Ready before not, then the platform's own, then by name; one that cannot chat never is."""
    embeds = ModelView(id="a", nodes=1, nodes_ready=1, ability=Ability.EMBEDDINGS)
    away = ModelView(id="b", nodes=1, nodes_ready=0, own=True)
    here = ModelView(id="c", nodes=1, nodes_ready=1)
    own = ModelView(id="d", nodes=1, nodes_ready=1, own=True)
    assert PoolView(models=(embeds, away, here, own)).default == "d"
    assert PoolView(models=(embeds, away, here)).default == "c"
    assert PoolView(models=(embeds, away)).default == "b"
    assert PoolView(models=(embeds,)).default is None
    assert PoolView().default is None


async def ask(http: httpx.AsyncClient, path: str, model: str) -> httpx.Response:
    """A small chat or embeddings request."""
    body: dict[str, object] = {"model": model}
    if path.endswith("embeddings"):
        body["input"] = "honk"
    else:
        body["messages"] = [{"role": "user", "content": "honk"}]
    return await http.post(path, json=body)


async def test_what_a_model_cannot_do_is_refused_in_words(data_dir: Path) -> None:
    """A chat request to an embedding model is a 400 that says so, and the other way round.

    Both lists tell what each model can do, and which one is asked by default.
    """
    async with open_platform(Config(data_dir=data_dir), engine=False) as platform:
        fleet = platform.services.fleet
        engines: dict[str, Engine] = {
            "all-minilm": Embedder("all-minilm", Ability.EMBEDDINGS),
            "talker": Embedder("talker", Ability.CHAT),
        }
        for name, engine in engines.items():
            fleet.attach(Node(id=name, url="http://gpu"), engine)
        async with asyncio.timeout(10):
            while len(fleet.models()) < 2:
                await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(platform.public_app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a.example") as http:
            wrong = await ask(http, "/v1/chat/completions", "all-minilm")
            other = await ask(http, "/v1/embeddings", "talker")
            right = await ask(http, "/v1/embeddings", "all-minilm")
            models = (await http.get("/v1/models")).json()["data"]
            pool = (await http.get("/v1/pool")).json()
    assert (wrong.status_code, other.status_code, right.status_code) == (400, 400, 200)
    assert "embeddings only" in wrong.json()["error"]["message"]
    assert "makes no embeddings" in other.json()["error"]["message"]
    assert {wrong.json()["error"]["param"], other.json()["error"]["param"]} == {"model"}
    told = [(row["id"], row["capabilities"], row["default"]) for row in models]
    assert told == [("all-minilm", ["embeddings"], False), ("talker", ["chat"], True)]
    assert [row["capabilities"] for row in pool["models"]] == [["embeddings"], ["chat"]]
    assert pool["default_model"] == "talker"


async def test_ready_is_who_serves_something(data_dir: Path) -> None:
    """A node that is up without a model makes neither the platform ready nor its slots count."""
    async with open_platform(Config(data_dir=data_dir), engine=False) as platform:
        fleet = platform.services.fleet
        fleet.attach(Node(id="empty", url="http://gpu"), Empty("m", slots=3))
        async with asyncio.timeout(10):
            while fleet.status("empty").state.value != "up":
                await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(platform.public_app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a.example") as http:
            ready = await http.get("/ready")
            pool = (await http.get("/v1/pool")).json()
            fleet.attach(Node(id="full", url="http://gpu2"), MemoryEngine("m", slots=2))
            async with asyncio.timeout(10):
                while fleet.status("full").state.value != "up":
                    await asyncio.sleep(0.01)
            full = (await http.get("/v1/pool")).json()
            served = await http.get("/ready")
    assert (ready.status_code, served.status_code) == (503, 200)
    assert (pool["nodes_ready"], pool["slots"], pool["models"]) == (0, 0, [])
    assert (full["nodes_ready"], full["slots"]) == (1, 2)
    assert full["models"][0]["ready"]
