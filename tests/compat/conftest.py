"""One platform with the real model, and OpenAI's own clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from tests.server import Server, serving_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`anser serve` with SmolLM2, for the whole session."""
    with serving_model(tmp_path_factory.mktemp("compat") / "data") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not try twice unless a test says so."""
    with openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's asynchronous client."""
    async with openai.AsyncOpenAI(
        base_url=server.base_url, api_key=server.key, max_retries=0
    ) as client:
        yield client
