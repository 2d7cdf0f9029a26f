"""Chat completions through the official client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.hostile import Talk
from tests.hostile import stream as stream_of
from tests.outside import listed
from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hello."}]
COUNT: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You count."},
    {"role": "user", "content": "Count from one to twenty in words."},
]


def test_an_answer_is_whole(client: openai.OpenAI, server: Server) -> None:
    """A chat completion has its text, its reason to end, its usage and its model."""
    answer = client.chat.completions.create(
        model=server.model, messages=HELLO, max_tokens=12, seed=1
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert answer.model == server.model
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


async def test_the_asynchronous_client_is_served_too(
    aclient: openai.AsyncOpenAI, server: Server
) -> None:
    """Several requests at once each get their own answer."""
    answers = await asyncio.gather(
        *(
            aclient.chat.completions.create(
                model=server.model, messages=COUNT, max_tokens=5, seed=1
            )
            for _ in range(6)
        )
    )
    assert len({answer.id for answer in answers}) == 6
    assert all(answer.choices[0].message.content for answer in answers)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, server: Server) -> None:
    """Chunks put together are the answer; at temperature 0 it is the same one."""
    whole = client.chat.completions.create(
        model=server.model, messages=COUNT, max_tokens=20, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=server.model, messages=COUNT, max_tokens=20, temperature=0, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_last_if_asked_for(client: openai.OpenAI, server: Server) -> None:
    """With `include_usage` the last chunk has no choice and all tokens; no other has usage."""
    *chunks, last = client.chat.completions.create(
        model=server.model,
        messages=HELLO,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.choices == []
    assert last.usage is not None
    assert 0 < last.usage.completion_tokens <= 5
    assert all(chunk.usage is None for chunk in chunks)


async def test_the_stream_helper_works(aclient: openai.AsyncOpenAI, server: Server) -> None:
    """The client's own accumulation of events ends in a whole completion."""
    async with aclient.chat.completions.stream(
        model=server.model,
        messages=COUNT,
        temperature=0,
        stop=" ",
        stream_options={"include_usage": True},
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content
    assert final.usage is not None


@pytest.mark.parametrize("last", [0, 1, 2])
async def test_the_stream_helper_takes_several_answers(
    aclient: openai.AsyncOpenAI, server: Server, last: int
) -> None:
    """Choices are put together by index, whichever engine is the last to begin."""

    async def play(talk: Talk) -> None:
        which = talk.seen[-1].json["seed"]
        await asyncio.sleep(0.3 if which == 100 + last else 0.0)
        await talk.say(stream_of(f"text {which}"))

    async with (
        listed(server, play, slots=3),
        aclient.chat.completions.stream(
            model="m", messages=HELLO, max_tokens=9, n=3, seed=100
        ) as stream,
    ):
        final = await stream.get_final_completion()
    texts = [choice.message.content for choice in final.choices]
    assert texts == ["text 100", "text 101", "text 102"]
    assert {choice.message.role for choice in final.choices} == {"assistant"}


async def test_the_stream_helper_takes_several_real_answers(
    aclient: openai.AsyncOpenAI, server: Server
) -> None:
    """`n` answers of one engine, more than it has slots, streamed and accumulated."""
    async with aclient.chat.completions.stream(
        model=server.model, messages=COUNT, temperature=0, stop=" ", n=6
    ) as stream:
        final = await stream.get_final_completion()
    assert [choice.index for choice in final.choices] == list(range(6))
    assert all(choice.message.content for choice in final.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_n_gives_several_choices(client: openai.OpenAI, server: Server, *, stream: bool) -> None:
    """`n` answers, each at its index, under one identifier, the prompt counted once."""
    one = client.chat.completions.create(model=server.model, messages=COUNT, max_tokens=6)
    answer = client.chat.completions.create(
        model=server.model,
        messages=COUNT,
        max_tokens=6,
        n=3,
        seed=7,
        temperature=1.5,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    assert one.usage is not None
    if isinstance(answer, openai.Stream):
        chunks = list(answer)
        assert len({chunk.id for chunk in chunks}) == 1
        texts = ["", "", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        usage = chunks[-1].usage
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content or "" for choice in answer.choices]
        usage = answer.usage
    assert all(texts)
    assert len(set(texts)) > 1, "each answer has a seed of its own"
    assert usage is not None
    assert usage.prompt_tokens == one.usage.prompt_tokens
    assert usage.completion_tokens <= 18


def test_stop_ends_the_answer(client: openai.OpenAI, server: Server) -> None:
    """The text ends before the first stop sequence, and says why."""
    free = client.chat.completions.create(
        model=server.model, messages=COUNT, max_tokens=24, temperature=0
    )
    text = free.choices[0].message.content or ""
    word = text.split()[2]
    cut = client.chat.completions.create(
        model=server.model, messages=COUNT, max_tokens=24, temperature=0, stop=[word, "never"]
    )
    assert cut.choices[0].message.content == text[: text.index(word)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_seed_makes_it_repeatable(client: openai.OpenAI, server: Server) -> None:
    """The same seed gives the same text, another one gives another."""

    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=server.model, messages=HELLO, max_tokens=16, temperature=1.2, seed=seed
        )
        return answer.choices[0].message.content

    assert ask(3) == ask(3)
    assert len({ask(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_each_token(client: openai.OpenAI, server: Server, *, stream: bool) -> None:
    """Every token has its log probability and as many alternatives as were asked for."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=COUNT,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
    )
    if isinstance(answer, openai.Stream):
        tokens = [
            token
            for chunk in answer
            for choice in chunk.choices
            if choice.logprobs is not None
            for token in choice.logprobs.content or []
        ]
    else:
        assert answer.choices[0].logprobs is not None
        tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 4
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3


def test_max_completion_tokens_is_max_tokens(client: openai.OpenAI, server: Server) -> None:
    """The newer name of the limit works, and an answer that reaches it says `length`."""
    answer = client.chat.completions.create(
        model=server.model, messages=COUNT, max_completion_tokens=3, temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_fields_for_openais_own_service_are_harmless(client: openai.OpenAI, server: Server) -> None:
    """What only OpenAI's service has a use for is accepted."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=COUNT,
        max_tokens=8,
        temperature=0,
        user="u-1",
        store=False,
        metadata={"run": "7"},
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        reasoning_effort="low",
        verbosity="low",
        logit_bias={"5": -100},
        presence_penalty=0.5,
        frequency_penalty=0.5,
        top_p=0.9,
        parallel_tool_calls=False,
    )
    assert answer.choices[0].message.content


def test_every_role_is_read(client: openai.OpenAI, server: Server) -> None:
    """A conversation with all roles, an earlier answer handed back as the client holds it."""
    first = client.chat.completions.create(model=server.model, messages=HELLO, max_tokens=4)
    answer = client.chat.completions.create(
        model=server.model,
        max_tokens=4,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "eva"},
            first.choices[0].message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": "The weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_sampling_fields_of_the_engine_pass(client: openai.OpenAI, server: Server) -> None:
    """Fields beyond OpenAI's that the engine reads take effect: top_k 1 leaves one way."""

    def ask() -> str | None:
        answer = client.chat.completions.create(
            model=server.model,
            messages=HELLO,
            max_tokens=12,
            temperature=2,
            extra_body={"top_k": 1, "repeat_penalty": 1.0},
        )
        return answer.choices[0].message.content

    assert ask() == ask()


def test_the_models_are_listed(client: openai.OpenAI, server: Server) -> None:
    """The list has the model, and so has its own address."""
    assert [model.id for model in client.models.list()] == [server.model]
    model = client.models.retrieve(server.model)
    assert (model.id, model.object) == (server.model, "model")
    assert json.loads(model.model_dump_json())["context_length"] >= 512


def test_raw_headers_name_request_and_node(client: openai.OpenAI, server: Server) -> None:
    """The answer's head names the request, under which its receipt is found, and its node."""
    raw = client.chat.completions.with_raw_response.create(
        model=server.model, messages=HELLO, max_tokens=3
    )
    answer = raw.parse()
    receipt = server.receipt(raw.headers["x-request-id"])
    assert raw.headers["x-anser-node"] == receipt["leases"][0]["node"]
    assert answer.usage is not None
    assert receipt["usage"]["completion_tokens"] == answer.usage.completion_tokens
    assert receipt["outcome"] == "finished"
    assert int(raw.headers["x-ratelimit-limit-requests"]) > 0
