"""Asks the engine in this process, for tests with the real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.config import EngineSettings
from anser.ports import Call, Route
from tests.model import model_path

__all__ = [
    "LONG_S",
    "MODEL",
    "chat",
    "choices",
    "collect",
    "completion",
    "finish_of",
    "form_of",
    "loaded",
    "text_of",
]

MODEL = "smollm2"
SETTINGS = EngineSettings(slots=4, context_tokens=2_048, batch_tokens=64)
LONG_S = 120.0


@asynccontextmanager
async def loaded() -> AsyncGenerator[LlamaCppEngine]:
    """The engine with the default model."""
    engine = LlamaCppEngine(MODEL, SETTINGS)
    await engine.start(model_path())
    try:
        yield engine
        engine.validate()
    finally:
        await engine.aclose()


def chat(text: str = "Tell me about trees.", **fields: object) -> Call:
    """A chat with one message; fields are added to its body."""
    body: dict[str, object] = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
    return Call(lease="a", route=Route.CHAT, body={**body, **fields})


def completion(text: object = "The sky is", **fields: object) -> Call:
    """A text completion; fields are added to its body."""
    body: dict[str, object] = {"prompt": text, "max_tokens": 8}
    return Call(lease="a", route=Route.COMPLETIONS, body={**body, **fields})


async def collect(engine: LlamaCppEngine, call: Call) -> list[dict[str, Any]]:
    """All chunks of one answer."""
    async with asyncio.timeout(LONG_S), engine.generate(call) as answer:
        return [json.loads(data) async for data in answer]


def choices(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    return [choice for chunk in chunks for choice in chunk["choices"]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The text of an answer."""
    return "".join(
        c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices(chunks)
    )


def finish_of(chunks: list[dict[str, Any]]) -> str:
    """How an answer ended: exactly one chunk tells."""
    (finish,) = [c["finish_reason"] for c in choices(chunks) if c["finish_reason"]]
    return str(finish)


def form_of(schema: object) -> dict[str, object]:
    """A response format that forces `schema`."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
