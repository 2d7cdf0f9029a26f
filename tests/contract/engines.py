"""The engines that the contract suite of the Engine port runs on.

A new adapter adds a maker here: an async context manager that yields a ready engine with at least
four slots and a context of 2,048 tokens or less, and the name of its model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from anser.adapters.engine_http import HttpEngine
from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.adapters.memory_engine import MemoryEngine, Pace
from anser.config import EngineSettings
from anser.core.fleet import Node
from anser.ports import Engine
from tests.llama_server import llama_server
from tests.model import model_path

__all__ = ["MAKERS", "MODEL", "Maker"]

MODEL = "contract-model"
Maker = Callable[[], AbstractAsyncContextManager[Engine]]


@asynccontextmanager
async def memory() -> AsyncGenerator[Engine]:
    """The engine for simulation, quick enough for tests."""
    pace = Pace(step_s=0.005, step_each_s=0.0, prefill_tokens_s=20_000)
    engine = MemoryEngine(MODEL, slots=4, context_tokens=1_024, pace=pace)
    yield engine
    await engine.aclose()


@asynccontextmanager
async def llamacpp() -> AsyncGenerator[Engine]:
    """The real thing."""
    engine = LlamaCppEngine(MODEL, EngineSettings(slots=4, context_tokens=1_024))
    try:
        await engine.start(model_path())
        yield engine
    finally:
        await engine.aclose()


@asynccontextmanager
async def http() -> AsyncGenerator[Engine]:
    """The real thing as a listed provider, behind its own HTTP server."""
    async with llama_server(alias=MODEL, slots=4, context_tokens=1_024) as server:
        engine = HttpEngine(Node(id="n", url=server.url))
        yield engine
        await engine.aclose()


MAKERS: dict[str, Maker] = {"memory": memory, "llamacpp": llamacpp, "http": http}
