"""Tools and structured output through the official client: the shape, not the judgement."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from pydantic import BaseModel

from tests.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The weather in Paris?"}]
WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
STOCKS: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_stock",
        "parameters": {
            "type": "object",
            "properties": {"symbol": {"type": "string", "maxLength": 5}},
            "required": ["symbol"],
        },
    },
}


class City(BaseModel):
    """What a city is, in few tokens."""

    capital: bool
    size: int


def check_weather(arguments: str) -> None:
    """The arguments are what the schema asks for."""
    found = json.loads(arguments)
    assert set(found) == {"city", "unit"}
    assert isinstance(found["city"], str)
    assert found["unit"] in ("C", "F")


def test_a_forced_tool_is_called(client: openai.OpenAI, server: Server) -> None:
    """The named tool is called with arguments that fit its schema."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=ASK,
        tools=[WEATHER, STOCKS],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)


def test_a_required_tool_is_called(client: openai.OpenAI, server: Server) -> None:
    """`required` leaves the choice of the tool, not whether there is one."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=ASK,
        tools=[WEATHER, STOCKS],
        tool_choice="required",
        max_tokens=80,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name in ("get_weather", "get_stock")
    assert isinstance(json.loads(calls[0].function.arguments), dict)


async def test_a_tool_call_is_streamed(aclient: openai.AsyncOpenAI, server: Server) -> None:
    """The client's own stream helper puts a streamed call together."""
    async with aclient.chat.completions.stream(
        model=server.model,
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
    ) as stream:
        pieces = [
            event.arguments_delta
            async for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls
    assert final.choices[0].finish_reason == "tool_calls"
    assert "".join(pieces) == calls[0].function.arguments
    check_weather(calls[0].function.arguments)


def test_a_tools_answer_is_read(client: openai.OpenAI, server: Server) -> None:
    """The call and the tool's answer go back in, and text comes out."""
    first = client.chat.completions.create(
        model=server.model,
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=80,
    )
    message = first.choices[0].message
    assert message.tool_calls is not None
    second = client.chat.completions.create(
        model=server.model,
        messages=[
            *ASK,
            message,  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
        ],
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=12,
    )
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI, server: Server) -> None:
    """`parse` with a pydantic model gives an instance of it."""
    answer = client.chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": "Is Paris a capital, and how big is it?"}],
        response_format=City,
        max_tokens=60,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_a_schema_is_kept_to_in_a_stream(client: openai.OpenAI, server: Server) -> None:
    """`response_format` with a schema constrains a stream as well."""
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "A colour?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "colour", "schema": schema, "strict": True},
        },
        max_tokens=40,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text)["colour"] in ("red", "green")


def test_a_json_object_is_json(client: openai.OpenAI, server: Server) -> None:
    """`json_object` gives an object, as far as the answer is let run."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": 'Answer with {"ok": true} and nothing else.'}],
        response_format={"type": "json_object"},
        max_tokens=120,
        temperature=0,
        seed=1,
    )
    text = (answer.choices[0].message.content or "").strip()
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_dangerous_schema_is_a_bad_request(client: openai.OpenAI, server: Server) -> None:
    """A schema that would make an engine fetch, or never end, is refused by its path."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=server.model,
            messages=ASK,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"$ref": "http://127.0.0.1/x"}},
            },
        )
    assert caught.value.param == "response_format.json_schema.schema"
