"""The engine in this process with the real model: answers of a given form, and refusals."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
from collections.abc import AsyncGenerator
from datetime import date
from typing import Any

import pytest

from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.core.errors import ContextTooLong, EngineRefused, InvalidField
from anser.ports import Call, Route
from tests.llamacpp import (
    MODEL,
    chat,
    choices,
    collect,
    completion,
    finish_of,
    form_of,
    loaded,
    text_of,
)

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that the model is loaded once."""
    return "asyncio"


@pytest.fixture(scope="module")
async def engine() -> AsyncGenerator[LlamaCppEngine]:
    """The engine, loaded."""
    async with loaded() as made:
        yield made


# ----------------------------------------------------------------- shape by grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 2},
        "note": True,
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


async def test_an_answer_fits_its_schema(engine: LlamaCppEngine) -> None:
    """json_schema is enforced, whatever the model would rather say."""
    schema = {**PERSON, "properties": {**PERSON["properties"]}}  # type: ignore[dict-item]
    del schema["properties"]["note"]  # type: ignore[attr-defined]
    for seed in range(3):
        ask = {"max_tokens": 200, "temperature": 1.5, "seed": seed}
        chunks = await collect(engine, chat("Somebody.", response_format=form_of(schema), **ask))
        person = json.loads(text_of(chunks))
        assert set(person) == {"name", "age", "likes"}
        assert 0 <= person["age"] <= 150
        assert set(person["likes"]) <= {"tea", "coffee"}


async def test_schemas_that_it_does_not_know_itself(engine: LlamaCppEngine) -> None:
    """`true` as a schema and `"$ref": "#"` work, although llama.cpp knows neither."""
    ask = {"max_tokens": 30, "seed": 3}
    chunks = await collect(engine, chat("Somebody.", response_format=form_of(PERSON), **ask))
    assert text_of(chunks).lstrip().startswith("{")
    tree = {
        "type": "object",
        "properties": {
            "value": {"enum": [1, 2]},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
        "required": ["value", "children"],
    }
    chunks = await collect(engine, chat("A tree.", response_format=form_of(tree), **ask))
    assert json.loads(text_of(chunks).split(",")[0] + "}")["value"] in {1, 2}


async def test_json_object_is_json(engine: LlamaCppEngine) -> None:
    """json_object means that the answer is an object."""
    ask = {"response_format": {"type": "json_object"}, "max_tokens": 400, "seed": 1}
    chunks = await collect(engine, chat("Give me a JSON object with one key.", **ask))
    assert text_of(chunks).lstrip().startswith("{")
    if finish_of(chunks) == "stop":
        assert isinstance(json.loads(text_of(chunks)), dict)


CRASHES = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}
FETCHES = {"$ref": "http://127.0.0.1:9/schema.json"}
FILLS = {"type": "array", "items": {"type": "null"}, "minItems": 4, "maxItems": 2}
STALLS = {"type": "string", "pattern": "^(((a{0,50}){0,50}){0,50}){0,50}$"}


@pytest.mark.parametrize("schema", [CRASHES, FETCHES, FILLS, STALLS])
async def test_a_dangerous_schema_never_reaches_it(engine: LlamaCppEngine, schema: object) -> None:
    """A schema that ends the process, fetches, fills the memory or stalls others is refused."""
    with pytest.raises(InvalidField):
        await collect(engine, chat(response_format=form_of(schema)))
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for choice in ("auto", "required"):
        with pytest.raises((InvalidField, EngineRefused)):
            await collect(engine, chat(tools=[tool], tool_choice=choice))


def tool(name: str, shelf: object = None, **properties: object) -> dict[str, object]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    if shelf is not None:
        parameters["$defs"] = shelf
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("weather", {"c": {"type": "string", "maxLength": 12}}, city={"$ref": "#/$defs/c"}),
    tool("add", {"c": {"type": "integer"}}, a={"$ref": "#/$defs/c"}, b={"$ref": "#/$defs/c"}),
]


def calls_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [call for choice in choices(chunks) for call in choice["delta"].get("tool_calls") or ()]


async def test_hard_constraints_are_kept(engine: LlamaCppEngine) -> None:
    """Patterns, formats, lengths and bounds hold, however warm the model is."""
    schema = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": r"^\d{3}-[a-z]{1,4}$"},
            "quoted": {"type": "string", "pattern": '^"[^"]{0,5}"$'},
            "day": {"type": "string", "format": "date"},
            "address": {"type": "string", "format": "ipv4"},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "odd": {"type": "integer", "exclusiveMinimum": 6, "maximum": 1_000},
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        },
    }
    schema["required"] = list(schema["properties"])
    for seed in range(3):
        ask = {"max_tokens": 300, "temperature": 1.5, "seed": seed}
        chunks = await collect(engine, chat("Anything.", response_format=form_of(schema), **ask))
        found = json.loads(text_of(chunks))
        assert re.fullmatch(r"[0-9]{3}-[a-z]{1,4}", found["code"])
        assert re.fullmatch('"[^"]{0,5}"', found["quoted"])
        date.fromisoformat(found["day"])
        ipaddress.IPv4Address(found["address"])
        assert 0 <= found["share"] <= 1
        assert 6 < found["odd"] <= 1_000
        assert 2 <= len(found["list"]) <= 3


BIG = {
    "type": "object",
    "properties": {
        "SECRET": {"enum": [f"CANARY{index}" for index in range(80)]},
        "many": {"type": "array", "items": {"$ref": "#/properties/SECRET"}, "maxItems": 1_999},
        "long": {"type": "string", "maxLength": 60_000, "minLength": 3_000},
        "nested": {"type": "string", "pattern": "^(([a-z]{1,8}-){10}!){10}$"},
    },
}


@pytest.mark.parametrize(
    "pattern", ["^CANARY\n\x1b]0;x\x07\\w$", "^CANARY(?=x)$", "CANARY", "^\\d$"]
)
async def test_no_schema_is_written_to_the_log(
    engine: LlamaCppEngine, capfd: pytest.CaptureFixture[str], pattern: str
) -> None:
    """llama.cpp prints what it cannot convert: nothing of a caller's ever gets there."""
    schemas = (BIG, {"properties": {"CANARY": {"type": "string", "pattern": pattern}}})
    for schema in schemas:
        function = {"name": "f", "parameters": {"type": "object", **schema}}
        tools = [{"type": "function", "function": function}]
        asks: list[dict[str, object]] = [{"response_format": form_of(schema)}]
        asks += [{"tools": tools, "tool_choice": choice} for choice in ("auto", "required")]
        for ask in asks:
            with contextlib.suppress(EngineRefused):
                await collect(engine, chat("CANARY", max_tokens=3, **ask))
    out, err = capfd.readouterr()
    assert "CANARY" not in out + err


async def test_the_model_sees_tools_and_may_call_them(engine: LlamaCppEngine) -> None:
    """`auto`: the tools are in the prompt, and so are earlier calls; what it calls has its form."""

    def asked(city: str) -> dict[str, object]:
        return {"role": "user", "content": f"What is the weather in {city}?"}

    def called(city: str) -> dict[str, object]:
        call = {"name": "weather", "arguments": json.dumps({"city": city})}
        return {"role": "assistant", "tool_calls": [{"id": city, "function": call}]}

    history: list[dict[str, object]] = []
    for city in ("Rome", "Paris", "Berlin", "Oslo"):
        history += [asked(city), called(city)]
    ask = {"messages": [*history, asked("Bern")], "max_tokens": 60, "temperature": 0}
    chunks = await collect(engine, chat(tools=TOOLS, **ask))
    assert finish_of(chunks) == "tool_calls"
    first, *rest = calls_of(chunks)
    assert first["function"]["name"] == "weather"
    assert "city" in json.loads("".join(call["function"]["arguments"] for call in rest))
    assert not text_of(chunks)
    without = await collect(engine, chat(**ask))
    assert chunks[-1]["usage"]["prompt_tokens"] > without[-1]["usage"]["prompt_tokens"] + 50


async def test_text_is_free_beside_tools(engine: LlamaCppEngine) -> None:
    """`auto` with an answer in words: just text, with its stop."""
    chunks = await collect(engine, chat("Say hello.", tools=TOOLS, max_tokens=12, seed=1))
    assert text_of(chunks)
    assert not calls_of(chunks)


async def test_every_seed_repeats(engine: LlamaCppEngine) -> None:
    """Also the seed that llama.cpp itself takes for none."""
    for seed in (-1, 2**63 - 1):
        ask = {"seed": seed, "temperature": 1.5, "max_tokens": 12}
        first = text_of(await collect(engine, chat("A poem.", **ask)))
        assert text_of(await collect(engine, chat("A poem.", **ask))) == first


@pytest.mark.parametrize(("fields", "count"), [({}, 0), ({"top_logprobs": 0}, 0),
                                               ({"top_logprobs": 2}, 2)])  # fmt: skip
async def test_logprobs_have_so_many_alternatives(
    engine: LlamaCppEngine, fields: dict[str, object], count: int
) -> None:
    """Each chosen token, with as many alternatives as were asked for."""
    chunks = await collect(engine, chat(logprobs=True, max_tokens=3, temperature=0, **fields))
    tokens = [t for c in choices(chunks) for t in (c.get("logprobs") or {}).get("content", ())]
    assert [len(token["top_logprobs"]) for token in tokens] == [count] * 3


async def test_a_required_tool_is_called(engine: LlamaCppEngine) -> None:
    """`required`: one of the tools, first its name, then its arguments as they come."""
    for seed in range(3):
        ask = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 120, "seed": seed}
        chunks = await collect(engine, chat("What is the weather in Bern?", **ask))
        first, *rest = calls_of(chunks)
        assert first["id"].startswith("call_")
        assert (first["index"], first["type"]) == (0, "function")
        arguments = json.loads("".join(call["function"]["arguments"] for call in [first, *rest]))
        if first["function"]["name"] == "weather":
            assert len(arguments["city"]) <= 12
        else:
            assert {type(arguments[key]) for key in ("a", "b")} == {int}
        assert finish_of(chunks) == "tool_calls"
        assert not text_of(chunks)
        assert len(rest) > 1
        assert all(set(call) == {"index", "function"} for call in rest)


async def test_parameters_that_are_no_object_are_refused(engine: LlamaCppEngine) -> None:
    """A function's arguments are an object; what cannot be one is not forced."""
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    with pytest.raises(EngineRefused, match="must be an object"):
        await collect(engine, chat(tools=[wrong], tool_choice="required"))


async def test_a_named_tool_is_called(engine: LlamaCppEngine) -> None:
    """A named function is called, whatever the question was."""
    choice = {"type": "function", "function": {"name": "add"}}
    ask = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 120}
    chunks = await collect(engine, chat("What is the weather in Bern?", **ask))
    calls = calls_of(chunks)
    assert calls[0]["function"]["name"] == "add"
    arguments = json.loads("".join(call["function"]["arguments"] for call in calls))
    assert {type(arguments[key]) for key in ("a", "b")} == {int}
    assert finish_of(chunks) == "tool_calls"


async def test_a_forced_call_that_is_cut_says_so(engine: LlamaCppEngine) -> None:
    """Too few tokens for the arguments: `length`, not `tool_calls`."""
    ask = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 4}
    assert finish_of(await collect(engine, chat("Add.", **ask))) == "length"


async def test_tools_may_be_left_alone(engine: LlamaCppEngine) -> None:
    """`auto` and `none` leave the choice to the model; a history with calls is taken."""
    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    history = [
        {"role": "user", "content": "What is the weather in Bern?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for choice in ("auto", "none", "required"):
        ask = {"messages": history, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
        assert finish_of(await collect(engine, chat(**ask)))


# -------------------------------------------------------------------------- refusals


async def test_a_long_prompt_names_its_length(engine: LlamaCppEngine) -> None:
    """The refusal says how many tokens there are and how many fit."""
    with pytest.raises(ContextTooLong, match=r"2048.*\b5\d\d\d\b") as caught:
        await collect(engine, chat("word " * 5_000))
    assert caught.value.code == "context_length_exceeded"


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"max_tokens": -7},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "absent"}}},
    ],
)
async def test_what_it_cannot_use_is_the_callers_fault(
    engine: LlamaCppEngine, fields: dict[str, object]
) -> None:
    """A body that llama.cpp refuses is refused with 400 and words, and the engine goes on."""
    with pytest.raises(EngineRefused) as caught:
        await collect(engine, chat(**fields))
    assert caught.value.status == 400
    assert caught.value.message
    assert finish_of(await collect(engine, chat(max_tokens=2)))


async def test_several_prompts_are_refused(engine: LlamaCppEngine) -> None:
    """One call is one answer."""
    with pytest.raises(EngineRefused, match="One prompt"):
        await collect(engine, completion(["a", "b"]))


async def test_embeddings_take_long_inputs(engine: LlamaCppEngine) -> None:
    """Inputs far longer than a batch are embedded; beyond the limit they are refused."""

    def ask(given: object, **fields: object) -> Call:
        return Call(lease="e", route=Route.EMBEDDINGS, body={"input": given, **fields})

    answer = json.loads(await engine.embed(ask(["tree " * 300, [504, 3260]])))
    assert answer["usage"]["prompt_tokens"] > 300
    assert answer["model"] == MODEL
    packed = json.loads(await engine.embed(ask("tree", encoding_format="base64")))
    assert isinstance(packed["data"][0]["embedding"], str)
    for bad, words in (("word " * 3_000, "3001"), ("", "empty"), ([[-1]], "tokens")):
        with pytest.raises((ContextTooLong, EngineRefused), match=words):
            await engine.embed(ask(bad))
    with pytest.raises(EngineRefused, match="shortened"):
        await engine.embed(ask("a", dimensions=8))
