"""What goes wrong, as the official client's exceptions; and what a client that leaves frees."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from anser.core.limits import BODY_BYTES_MAX
from tests.server import Server, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]
LONG: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Write a very long story about a goose."}
]
ENDLESS = {"max_tokens": 3_000, "logit_bias": {"2": -100, "0": -100}}  # it never ends its turn


@pytest.fixture
def narrow(server: Server) -> Iterator[openai.OpenAI]:
    """A client whose member may have one request in flight."""
    member = f"narrow-{secrets.token_hex(4)}"
    server.admin("POST", "/members", {"id": member, "limits": {"in_flight_max": 1}})
    key = server.admin("POST", "/keys", {"member": member})["key"]
    with openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0) as client:
        yield client


def test_a_bad_request_names_the_field(client: openai.OpenAI, server: Server) -> None:
    """400 is BadRequestError, with param, code and the request's identifier."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=server.model, messages=HELLO, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    assert caught.value.type == "invalid_request_error"
    assert (caught.value.request_id or "").startswith("req_")


def test_an_unknown_field_is_a_bad_request(client: openai.OpenAI, server: Server) -> None:
    """What may not reach an engine is refused by name."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=server.model, messages=HELLO, extra_body={"id_slot": 0}
        )
    assert (caught.value.param, caught.value.code) == ("id_slot", "unknown_parameter")


@pytest.mark.parametrize("key", ["hf_" + 43 * "A", "sk-wrong", "x" * 300])
def test_a_wrong_key_is_an_authentication_error(server: Server, key: str) -> None:
    """401 is AuthenticationError, whatever the key looks like."""
    with (
        openai.OpenAI(base_url=server.base_url, api_key=key) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert key not in str(caught.value)


def test_an_unknown_model_is_not_found(client: openai.OpenAI, server: Server) -> None:
    """404 is NotFoundError, and gives near names."""
    with pytest.raises(openai.NotFoundError, match=server.model) as caught:
        client.chat.completions.create(model="smollm2-136m-instruct", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing-like-it")


def test_a_prompt_beyond_the_context_is_a_bad_request(
    client: openai.OpenAI, server: Server
) -> None:
    """Too long a prompt is refused with the counts, by the engine where only it can tell."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "goose " * 9_000}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="4096") as caught:
        client.chat.completions.create(model=server.model, messages=HELLO, max_tokens=5_000)
    assert caught.value.code == "context_length_exceeded"


def test_too_large_a_body_is_told(client: openai.OpenAI, server: Server) -> None:
    """413 reaches the client although it is still sending."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "x" * (BODY_BYTES_MAX + 1)}],
        )
    assert caught.value.status_code == 413


def test_a_members_limit_is_a_rate_limit_error(
    narrow: openai.OpenAI, client: openai.OpenAI, server: Server
) -> None:
    """429 is RateLimitError with a retry-after; other members are served meanwhile."""
    with narrow.chat.completions.create(
        model=server.model, messages=LONG, stream=True, extra_body=ENDLESS
    ) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            narrow.chat.completions.create(model=server.model, messages=HELLO)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        client.chat.completions.create(model=server.model, messages=HELLO, max_tokens=2)


def test_the_client_retries_after_a_rate_limit(narrow: openai.OpenAI, server: Server) -> None:
    """A client that may try again waits as told, and then succeeds."""
    stream = narrow.chat.completions.create(
        model=server.model, messages=LONG, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    waiting = narrow.with_options(max_retries=3)
    before = time.monotonic()
    threading.Timer(1.0, stream.close).start()
    answer = waiting.chat.completions.create(model=server.model, messages=HELLO, max_tokens=2)
    assert answer.choices
    assert time.monotonic() - before >= 1.0


def test_a_timeout_frees_the_slot(client: openai.OpenAI, server: Server) -> None:
    """A client whose patience ends gets its own error, and its work is stopped."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).chat.completions.create(
            model=server.model, messages=LONG, extra_body=ENDLESS
        )
    wait_until(lambda: idle(server), within_s=3)


def test_closing_a_stream_frees_the_slot(client: openai.OpenAI, server: Server) -> None:
    """Leaving in mid-stream stops the engine; the receipt says cancelled, and what was sent."""
    raw = client.chat.completions.with_raw_response.create(
        model=server.model, messages=LONG, stream=True, extra_body=ENDLESS
    )
    stream = raw.parse()
    for _, _ in zip(range(5), stream, strict=False):
        pass
    assert server.pool()["running"] == 1
    stream.close()
    wait_until(lambda: idle(server), within_s=2)
    receipt = server.receipt(raw.headers["x-request-id"])
    assert receipt["outcome"] == "cancelled"
    assert 3 <= receipt["usage"]["completion_tokens"] <= 40


def waiting(server: Server) -> int:
    """How many wait of seven that ask, once all of them are here."""
    pool = server.pool()
    return int(pool["queued"]) if pool["queued"] + pool["running"] == 7 else 0


async def test_leaving_the_queue_takes_its_place_away(
    aclient: openai.AsyncOpenAI, server: Server
) -> None:
    """Requests cancelled while they wait are gone from the queue at once."""

    async def ask() -> None:
        await aclient.chat.completions.create(model=server.model, messages=LONG, extra_body=ENDLESS)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask()) for _ in range(7)]
        # Of its four slots the last may be kept for somebody else who was there a moment ago.
        await asyncio.to_thread(wait_until, lambda: waiting(server) in (3, 4))
        for task in tasks:
            task.cancel()
    await asyncio.to_thread(wait_until, lambda: idle(server), within_s=5)


async def test_one_of_several_answers_leaves_with_the_rest(
    aclient: openai.AsyncOpenAI, server: Server
) -> None:
    """Closing a stream of several choices stops them all."""
    stream = await aclient.chat.completions.create(
        model=server.model, messages=LONG, stream=True, n=3, extra_body=ENDLESS
    )
    seen: set[int] = set()
    async for chunk in stream:
        seen |= {choice.index for choice in chunk.choices}
        if len(seen) == 3:
            break
    await stream.close()
    await asyncio.to_thread(wait_until, lambda: idle(server), within_s=3)


def idle(server: Server) -> bool:
    """Whether nothing waits and nothing runs."""
    pool = server.pool()
    return pool["queued"] == 0 and pool["running"] == 0


def test_no_key_is_anonymous_on_loopback(server: Server) -> None:
    """Whoever cannot leave the key out writes `anonymous`; on loopback that is served."""
    with openai.OpenAI(base_url=server.base_url, api_key="anonymous") as client:
        answer = client.chat.completions.create(model=server.model, messages=HELLO, max_tokens=2)
    receipt = server.receipt(answer._request_id or "")
    assert receipt["member"].startswith("anonymous/")
