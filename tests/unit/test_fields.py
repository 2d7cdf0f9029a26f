"""api.checks, api.fields, api.messages and api.tools: types and ranges of what a caller sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from anser.api.checks import check_fields
from anser.api.fields import ChatFields, CompletionFields, EmbeddingFields
from anser.api.messages import engine_message
from anser.api.tools import engine_format, engine_tools
from anser.core.errors import InvalidField, RequestError, UnknownField
from anser.core.limits import (
    ANSWERS_MAX,
    ECHO_CHARS_MAX,
    EMBEDDING_INPUTS_MAX,
    MESSAGES_MAX,
    STOP_CHARS_MAX,
    STOP_MAX,
    TOOLS_MAX,
    TOP_LOGPROBS_MAX,
)
from tests.cost import measured

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}


def chat(**fields: object) -> ChatFields:
    return check_fields({"model": "m", "messages": [HELLO], **fields}, ChatFields)


def completion(**fields: object) -> CompletionFields:
    return check_fields({"model": "m", "prompt": "p", **fields}, CompletionFields)


def tool(name: str = "f", **function: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}

GOOD: dict[str, list[object]] = {
    "stream": [True, False, None],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": False}, {}, None],
    "n": [1, ANSWERS_MAX, None],
    "seed": [0, -1, 2**63 - 1, -(2**63), None],
    "temperature": [0, 0.5, 2, None],
    "top_p": [0, 1, 0.1, None],
    "presence_penalty": [-2, 2.0, None],
    "frequency_penalty": [-2, 2.0, None],
    "logit_bias": [{"50256": -100, "0": 3.5}, {}, None],
    "logprobs": [True, False, None],
    "top_logprobs": [0, TOP_LOGPROBS_MAX, None],
    "max_tokens": [1, 2**31 - 1, None],
    "max_completion_tokens": [1, 2**31 - 1, None],
    "stop": ["x", ["x"] * STOP_MAX, [], "x" * STOP_CHARS_MAX, None],
    "response_format": [{"type": "text"}, {"type": "json_object"}, JSON_SCHEMA, None],
    "tools": [[], [tool()], [tool(f"f{i}") for i in range(TOOLS_MAX)], None],
    "tool_choice": ["none", "auto", "required", tool(), None],
    "parallel_tool_calls": [True, False, None],
    "user": ["someone", None],
    "metadata": [{"a": "b"}, None],
    "store": [True, False, None],
    "service_tier": ["auto", "priority", None],
    "modalities": [["text"], None],
    "reasoning_effort": ["low", "none", None],
    "prediction": [{"type": "content", "content": "x"}, None],
    "top_k": [0, 40, -1],
    "min_p": [0.05],
    "mirostat": [0, 2],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in GOOD.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_documented_values_pass(name: str, value: object) -> None:
    """Every documented field takes its documented values, null among them, up to its limits."""
    chat(**{name: value})


BAD: dict[str, list[object]] = {
    "model": ["", "x" * 257, 5, None, ["m"]],
    "messages": [[], {}, "hi", None, [HELLO] * (MESSAGES_MAX + 1)],
    "stream": [1, "true", []],
    "n": [0, -1, ANSWERS_MAX + 1, 10**6, 1.5, "1", True, 2**70],
    "seed": [1.5, "1", 2**63, -(2**63) - 1],
    "temperature": [-0.1, 2.1, "0.5", True, [], 10**400],
    "top_p": [-0.1, 1.1, "1"],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [[], {"the": 1}, {"1": 101}, {"1": "x"}, {"-1": 0}, "x"],
    "logprobs": [1, "yes"],
    "top_logprobs": [-1, TOP_LOGPROBS_MAX + 1, 1.5],
    "max_tokens": [0, -1, 2**31, 2**63, 1.5, "10"],
    "max_completion_tokens": [0, -1, 2**31, 2**63],
    "stop": ["", [""], ["x"] * (STOP_MAX + 1), ["x"] * 10**5, "x" * (STOP_CHARS_MAX + 1), 5],
    "tools": ["f", [tool()] * 10**4, {}],
    "tool_choice": ["any", 5, []],
    "user": [5, "x" * 513],
    "metadata": [{"a": 1}, {str(i): "" for i in range(17)}],
    "service_tier": ["gold"],
    "modalities": [["audio"], "text"],
    "reasoning_effort": ["very"],
    "stream_options": [True, [], {"include_usage": "yes"}],
    "top_k": [1.5, "40"],
    "mirostat": [3],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_wrong_types_and_ranges_name_the_field(name: str, value: object) -> None:
    """A wrong value is refused in bounded time, and `param` begins with the field's name."""
    with measured() as cost, pytest.raises(InvalidField) as caught:
        chat(**{name: value})
    assert cost.million_steps < 50
    assert (caught.value.param or "").split(".")[0].split("[")[0] == name
    assert len(caught.value.message) < 400


NESTED: list[tuple[dict[str, object], str]] = [
    ({"messages": [HELLO, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"tools": [tool("bad name")]}, "tools[0].function.name"),
    ({"tools": [tool("f" * 65)]}, "tools[0].function.name"),
    ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("fields", "param"), NESTED, ids=[param for _, param in NESTED])
def test_a_nested_fault_is_named_by_its_path(fields: dict[str, object], param: str) -> None:
    """`param` is the path to what is wrong, with indexes."""
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "video_url", "video_url": {"url": "http://[64:ff9b::a9fe:a9fe]/"}},
    ],
    ids=lambda part: part["type"],
)
def test_nothing_but_text_is_read(part: dict[str, object]) -> None:
    """No part that could make an engine fetch passes, and the message says why."""
    with pytest.raises(InvalidField, match="only text parts are") as caught:
        chat(messages=[{"role": "user", "content": [part]}])
    assert caught.value.param == "messages[0].content[0].type"


DANGEROUS = (
    "n_predict n_probs id_slot slot_id cache_prompt cache_salt priority lora loras extra_body"
    " kv_transfer_params grammar chat_template prompt_logprobs add_generation_prompt provider"
    " model_kwargs return_token_ids stop_token_ids ignore_eos n_keep t_max_predict_ms"
    " mm_processor_kwargs bootstrap_host rid session_params web_search_options functions audio"
    " function_call"
).split()


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("ask", [chat, completion])
def test_unknown_fields_are_refused_by_name(name: str, ask: Callable[..., object]) -> None:
    """What is not documented and not on the allow-list is refused, and named."""
    with pytest.raises(UnknownField) as caught:
        ask(**{name: 1})
    assert caught.value.param == name


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("ask", [chat, completion])
def test_null_is_no_field(name: str, ask: Callable[..., object]) -> None:
    """Clients that write every field they know as null are understood: it is as if not there."""
    assert ask(**{name: None}) == ask()


def test_null_is_no_value_of_a_required_field() -> None:
    """A required field that is null is missing, and named."""
    with pytest.raises(InvalidField, match="`messages` is required") as caught:
        chat(messages=None)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"metadata": {"a": 1}}, "`metadata`: expected string, got integer as a value."),
        ({"logit_bias": {"1": "x"}}, "`logit_bias`: expected number, got string as a value."),
    ],
)
def test_a_wrong_value_in_a_map_names_the_map(fields: dict[str, object], sentence: str) -> None:
    """A fault of one of a map's values is told with the map's own name, as `param`, too."""
    with pytest.raises(InvalidField) as caught:
        chat(**fields)
    assert caught.value.message == sentence
    assert caught.value.param == next(iter(fields))


def test_unknown_fields_deep_inside_are_refused() -> None:
    """A message or a tool has no place for unknown fields either."""
    for fields, param in (
        ({"messages": [{**HELLO, "cache_control": {}}]}, "messages[0].cache_control"),
        ({"tools": [{**tool(), "server_url": "http://x"}]}, "tools[0].server_url"),
    ):
        with pytest.raises(UnknownField) as caught:
            chat(**fields)
        assert caught.value.param == param


def test_unknown_fields_are_dropped_on_wish() -> None:
    """Where the operator says drop, unknown fields are taken out at every depth."""
    body: dict[str, object] = {
        "model": "m",
        "priority": 9,
        "a.b[0]": 1,
        "messages": [
            {**HELLO, "cache_control": {}},
            {"role": "user", "content": [{"type": "text", "text": "x", "x.y": 1}]},
        ],
        "tools": [{**tool(), "function": {"name": "f", "url": "http://x"}}],
    }
    fields = check_fields(body, ChatFields, drop_unknown=True)
    assert [engine_message(message) for message in fields.messages] == [
        HELLO,
        {"role": "user", "content": "x"},
    ]


def test_dropping_has_a_limit() -> None:
    """A body of nothing but unknown fields is refused, however kind the setting."""
    body: dict[str, object] = {"model": "m", "messages": [HELLO]}
    body |= {f"x{i}": i for i in range(1_000)}
    with pytest.raises(UnknownField):
        check_fields(body, ChatFields, drop_unknown=True)


def test_a_key_that_looks_like_a_path_is_not_followed() -> None:
    """An unknown field's name cannot lead the dropping elsewhere."""
    body: dict[str, object] = {"model": "m", "messages": [HELLO]}
    body["role` - at `$.messages[0]"] = 1
    fields = check_fields(body, ChatFields, drop_unknown=True)
    assert [engine_message(message) for message in fields.messages] == [HELLO]
    body["messages"] = [{**HELLO, "x` - at `$.messages[0]": 1}]
    with pytest.raises(UnknownField):
        check_fields(body, ChatFields, drop_unknown=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 10**7: 1},
        {"tool_choice": "x" * 10**7},
        {"messages": [{"role": "x" * 10**7}]},
        {"response_format": {"type": "\x1b" * 10**6}},
    ],
)
def test_little_of_a_wrong_value_is_repeated(fields: dict[str, object]) -> None:
    """A message echoes at most ECHO_CHARS_MAX characters of the caller's, made printable."""
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert len(caught.value.message) < ECHO_CHARS_MAX + 150
    assert caught.value.message.isprintable()


def test_messages_become_plain_text() -> None:
    """Engines get strings: parts are joined, developer is system, what only servers add is gone."""
    fields = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "name": "eva", "content": [{"type": "text", "text": t} for t in "bc"]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "reasoning": "hm",
                "tool_calls": [
                    {"id": "1", "index": 0, "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "d"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": None, "refusal": "never"},
        ]
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert [engine_message(message) for message in fields.messages] == [
        {"role": "system", "content": "a"},
        {"role": "user", "name": "eva", "content": "b\nc"},
        {
            "role": "assistant",
            "tool_calls": [call],
            "reasoning": "hm",
            "reasoning_content": "hm",
        },
        {"role": "tool", "tool_call_id": "1", "content": "d"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "never"},
    ]


@pytest.mark.parametrize(
    ("more", "sent"),
    [
        ({"content": None}, {"content": ""}),
        ({}, {"content": ""}),
        ({"content": ""}, {"content": ""}),
        ({"content": None, "tool_calls": []}, {"content": ""}),
        (
            {"content": None, "reasoning_content": "hm"},
            {"content": "", "reasoning_content": "hm", "reasoning": "hm"},
        ),
        (
            {"reasoning": "hm", "reasoning_details": [{}]},
            {"content": "", "reasoning_content": "hm", "reasoning": "hm"},
        ),
    ],
)
def test_an_answer_without_text_may_come_back(
    more: dict[str, object], sent: dict[str, object]
) -> None:
    """Streams begin with null for content, and some answers are all reasoning: they are empty."""
    (message,) = chat(messages=[{"role": "assistant", **more}]).messages
    assert engine_message(message) == {"role": "assistant", **sent}


def test_what_other_stacks_add_is_passed_over() -> None:
    """An identifier of a message and a mark for caches are read, and reach no engine."""
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    for role in ("system", "user", "assistant"):
        (message,) = chat(messages=[{"role": role, "id": "msg_1", "content": [part]}]).messages
        assert engine_message(message) == {"role": role, "content": "x"}


def test_tools_and_choice_reach_the_engine() -> None:
    """Tools keep their documented fields; the choice is one of the engine's own forms."""
    function = tool("f", description="d", parameters=SCHEMA, strict=True)
    fields = chat(tools=[function, tool("g")], tool_choice=tool("f"))
    assert engine_tools(fields.tools, fields.tool_choice) == {
        "tools": [function, tool("g")],
        "tool_choice": tool("f"),
    }


def test_allowed_tools_narrow_the_list() -> None:
    """`allowed_tools` becomes the shorter list and its mode."""
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [tool("g")]},
    }
    fields = chat(tools=[tool("f"), tool("g")], tool_choice=choice)
    assert engine_tools(fields.tools, fields.tool_choice) == {
        "tools": [tool("g")],
        "tool_choice": "required",
    }


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        (None, "required", "tool_choice"),
        ([], tool("f"), "tool_choice"),
        ([tool("f")], tool("g"), "tool_choice.function.name"),
        ([tool("f"), tool("f")], None, "tools[1].function.name"),
        (
            [tool("f")],
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("g")]}},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ([tool(parameters={"$ref": "http://x/y"})], None, "tools[0].function.parameters"),
    ],
)
def test_impossible_tools_are_refused(tools: object, choice: object, param: str) -> None:
    """A choice must be one of the tools, names are unique, and schemas are safe."""
    fields = chat(tools=tools, tool_choice=choice)
    with pytest.raises(InvalidField) as caught:
        engine_tools(fields.tools, fields.tool_choice)
    assert caught.value.param == param


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_no_tools_say_nothing(choice: str | None) -> None:
    """Without tools the engine hears of none."""
    assert engine_tools(chat(tools=[], tool_choice=choice).tools, None) == {}


def test_a_format_reaches_the_engine() -> None:
    """A schema is checked and kept to; text is the default and is not mentioned."""
    assert engine_format(chat(response_format={"type": "text"}).response_format) == {}
    plain = engine_format(chat(response_format={"type": "json_object"}).response_format)
    assert plain == {"response_format": {"type": "json_object"}}
    formed = engine_format(chat(response_format=JSON_SCHEMA).response_format)
    named = {"name": "s", "schema": SCHEMA, "strict": True}
    assert formed == {"response_format": {"type": "json_schema", "json_schema": named}}


def test_a_dangerous_schema_is_refused() -> None:
    """A schema whose references grow without end never reaches an engine."""
    defs = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**defs, "a60": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with measured() as cost, pytest.raises(InvalidField) as caught:
        engine_format(chat(response_format=form).response_format)
    assert caught.value.param == "response_format.json_schema.schema"
    assert cost.million_steps < 50


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": TOP_LOGPROBS_MAX + 1}, "logprobs"),
        ({"best_of": 0}, "best_of"),
        ({"suffix": 5}, "suffix"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_completions_wrong_values_are_named(fields: dict[str, object], param: str) -> None:
    """/v1/completions checks its own fields as chat does."""
    with pytest.raises(InvalidField) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["x"] * (EMBEDDING_INPUTS_MAX + 1)}, "input"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({}, "input"),
    ],
)
def test_embeddings_wrong_values_are_named(fields: dict[str, object], param: str) -> None:
    """/v1/embeddings checks its fields."""
    with pytest.raises(InvalidField) as caught:
        check_fields({"model": "m", **fields}, EmbeddingFields)
    assert caught.value.param == param
